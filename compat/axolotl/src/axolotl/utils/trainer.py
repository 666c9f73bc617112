"""The router to the builder."""

from eft import setup_trainer

__all__ = ["setup_trainer"]
