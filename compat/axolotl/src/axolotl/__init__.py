"""Axolotl's import names for SFT programs, served by eft."""
