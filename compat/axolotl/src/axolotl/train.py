"""The whole run."""

from eft import train

__all__ = ["train"]
