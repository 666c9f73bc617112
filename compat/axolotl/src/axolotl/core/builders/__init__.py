"""Builders."""

from axolotl.core.builders.causal import HFCausalTrainerBuilder

__all__ = ["HFCausalTrainerBuilder"]
