"""Prepared data sets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import eft

TrainDatasetMeta = eft.DatasetMeta


def load_datasets(*, cfg: Mapping[str, Any], cli_args: Any = None, debug: bool = False) -> eft.DatasetMeta:
    """Prepare the config's data. `cli_args` and `debug` steer a preview there; `eft preprocess` shows it here."""
    return eft.load_datasets(cfg)


__all__ = ["TrainDatasetMeta", "load_datasets"]
