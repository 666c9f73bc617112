"""What the phases of one run share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eft.callbacks.context import RunOutcome
from eft.config.root import TrainConfig
from eft.data.dataset_meta import DatasetMeta
from eft.models.weight_start import starts_from_weights
from eft.runtime.run_folder import RunFolder
from eft.samples import SampleAnswers
from eft.trainer.trainer import EftTrainer


@dataclass(frozen=True)
class ExportSettings:
    """How the final weights are written; read when the run is set up, so that E8 sees the keys are in use."""

    dtype: torch.dtype | None
    verify: bool
    gguf_file: str | None

    @classmethod
    def of(cls, config: TrainConfig) -> ExportSettings:
        """The config's settings."""
        dtype = getattr(torch, config.save_dtype) if config.save_dtype is not None else None
        if dtype is None and config.adapter is not None and starts_from_weights(config.peft_init_lora_weights):
            dtype = torch.float32  # the change is the small difference of two large products
        return cls(dtype, config.verify_saves != "never", config.gguf_file)


@dataclass
class Run:
    """What the phases of one run share."""

    config: TrainConfig
    folder: RunFolder
    tokenizer: PreTrainedTokenizerBase
    meta: DatasetMeta
    model: PreTrainedModel
    trainer: EftTrainer
    console: Console | None
    outcome: RunOutcome
    export: ExportSettings
    samples: SampleAnswers | None
    """Held-out prompts answered before and after; None without `generate_samples`."""

    @property
    def path(self) -> Path:
        """The output folder."""
        return self.folder.path
