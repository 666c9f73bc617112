"""Trainers."""

from axolotl.core.trainers.base import AxolotlTrainer

__all__ = ["AxolotlTrainer"]
