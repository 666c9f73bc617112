"""The builder of causal-LM trainers."""

from eft import HFCausalTrainerBuilder

__all__ = ["HFCausalTrainerBuilder"]
