"""The trainer class."""

from eft import EftTrainer

AxolotlTrainer = EftTrainer

__all__ = ["AxolotlTrainer"]
