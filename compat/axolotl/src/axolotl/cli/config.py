"""Reading a config file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from axolotl.utils.dict import DictDefault
from eft.config.load import load_config


def load_cfg(config: str | Path, **overrides: Any) -> DictDefault:
    """Read and check a YAML file; `overrides` replace its keys.

    Raises:
        eft.core.errors.ConfigError: the file is not a valid config; the message names every problem.
    """
    loaded = load_config(Path(config), [f"{key}={value}" for key, value in overrides.items() if value is not None])
    return DictDefault(loaded.config.model_dump())


__all__ = ["load_cfg"]
