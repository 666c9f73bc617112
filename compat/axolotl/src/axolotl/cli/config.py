"""Reading a config file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from axolotl.utils.dict import DictDefault
from eft.config.load import LoadedConfig, config_from_mapping, load_config
from eft.config.root import TrainConfig


def load_cfg(config: str | Path | Mapping[str, Any], **overrides: Any) -> DictDefault:
    """Read and check a YAML file, or check a mapping; defaults are filled in.

    Args:
        config: the file, or a mapping with its keys.
        overrides: replace keys; `datasets__0__path` reaches inside. None leaves the key as it is.

    Raises:
        eft.core.errors.ConfigError: it is not a valid config; the message names every problem.
    """
    given = {key: value for key, value in overrides.items() if value is not None}
    if isinstance(config, Mapping):
        return _as_dict(config_from_mapping({**config, **given}))
    loaded: LoadedConfig = load_config(Path(config), [_override(key, value) for key, value in given.items()])
    return _as_dict(loaded.config)


def _override(key: str, value: Any) -> str:
    text = str(value) if isinstance(value, (str, Path)) else json.dumps(value)
    return f"{key.replace('__', '.')}={text}"


def _as_dict(config: TrainConfig) -> DictDefault:
    values = config.model_dump(exclude_none=True)
    if "lora_dropout" not in config.model_fields_set:
        del values["lora_dropout"]  # a continued adapter (`lora_model_dir`) keeps its own unless the key is written
    return DictDefault(values)


__all__ = ["load_cfg"]
