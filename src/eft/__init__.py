"""eft: Exact Fine-Tuning. Supervised fine-tuning of causal language models from one YAML file, with proof.

The names below are the public API. They are imported when they are first used (PEP 562), so that `import eft` and
`eft --help` stay fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eft.builder import HFCausalTrainerBuilder
    from eft.config.load import load_config
    from eft.config.root import TrainConfig
    from eft.data.dataset_meta import DatasetMeta
    from eft.inputs import load_datasets
    from eft.run import setup_trainer, train
    from eft.trainer.trainer import EftTrainer

__version__ = "0.1.0"

_HOMES = {
    "DatasetMeta": "eft.data.dataset_meta",
    "EftTrainer": "eft.trainer.trainer",
    "HFCausalTrainerBuilder": "eft.builder",
    "TrainConfig": "eft.config.root",
    "load_config": "eft.config.load",
    "load_datasets": "eft.inputs",
    "setup_trainer": "eft.run",
    "train": "eft.run",
}

__all__ = [
    "DatasetMeta",
    "EftTrainer",
    "HFCausalTrainerBuilder",
    "TrainConfig",
    "load_config",
    "load_datasets",
    "setup_trainer",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
