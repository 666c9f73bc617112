"""Axolotl's import names for SFT programs, served by eft."""

from importlib.metadata import version

__version__ = version("axolotl")
