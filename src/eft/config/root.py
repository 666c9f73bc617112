"""The whole config, and the rules that span its sections."""

from __future__ import annotations

from collections.abc import Callable

from eft.config.checkpoint import CheckpointConfig
from eft.config.data import DataConfig
from eft.config.evaluation import EvaluationConfig
from eft.config.kernels import KernelConfig
from eft.config.logging import LoggingConfig
from eft.config.loss import LossConfig
from eft.config.memory import MemoryConfig
from eft.config.model import AdapterConfig, FreezingConfig, ModelConfig
from eft.config.multimodal import MultimodalConfig
from eft.config.optim import OptimConfig
from eft.config.packing import PackingConfig
from eft.config.parallel import ParallelConfig
from eft.config.streaming import StreamingConfig
from eft.config.training import TrainingConfig


class TrainConfig(
    ModelConfig,
    FreezingConfig,
    AdapterConfig,
    DataConfig,
    StreamingConfig,
    MultimodalConfig,
    PackingConfig,
    TrainingConfig,
    LossConfig,
    KernelConfig,
    OptimConfig,
    MemoryConfig,
    CheckpointConfig,
    EvaluationConfig,
    ParallelConfig,
    LoggingConfig,
):
    """One fine-tuning run. `config.load.load_config` builds it from YAML, `config_from_mapping` from a mapping."""


Rule = Callable[[TrainConfig], tuple[str, str] | None]
"""Looks at a whole config; returns (key, what is wrong and what to do), or None."""
