"""What is verified: the user's own model, data and config, in a temporary folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eft.builder import HFCausalTrainerBuilder
from eft.config.root import TrainConfig
from eft.core.errors import ConfigError
from eft.core.records import TokenDataset
from eft.data.dataset_meta import DatasetMeta
from eft.data.plan import Plan
from eft.inputs import load_datasets, load_trainable_model, plan_of, prepare_tokenizer
from eft.runtime.env import Environment, resolve_precision
from eft.trainer.trainer import EftTrainer
from eft.verify.exact import PlainObjective

LEFT_OUT: Mapping[str, Any] = {
    # Talks to other machines.
    "use_tensorboard": False,
    "use_wandb": False,
    "use_mlflow": False,
    "use_trackio": False,
    # Would end three steps early, or record them.
    "early_stopping_patience": None,
    "loss_watchdog_threshold": None,
    "profiler_steps": None,
    # The learning rate of every step is compared.
    "logging_steps": 1,
    "resume_from_checkpoint": None,
    # What is fed is noted where it is collated.
    "dataloader_num_workers": 0,
    # Noise would hide what is compared; it has tests of its own.
    "neftune_noise_alpha": None,
}
"""What the trainers of a verification do otherwise than the run's; all else is the config's."""

FULL_PRECISION: Mapping[str, Any] = {"bf16": False, "bfloat16": False, "fp16": False, "tf32": False}
"""Keys of a trainer that computes in the weights' own dtype."""

NO_EXPERT_BALANCE: Mapping[str, Any] = {"router_aux_loss_coef": 0.0}
"""The plain programs that steps are compared with have no such term."""

NO_KERNELS: Mapping[str, Any] = {
    "torch_compile": False,
    "liger_rms_norm": False,
    "liger_rope": False,
    "liger_glu_activation": False,
}
"""Nothing compiled, and none of the kernels that know no fp64."""

NO_OPTIONS: Mapping[str, Any] = {**NO_KERNELS, "gradient_checkpointing": False, "activation_offloading": False}
"""Without everything that promise E4 is about."""


@dataclass
class Verification:
    """The parts that the checks take. Build it with `assemble`, or from parts of your own."""

    config: TrainConfig
    folder: Path
    """Temporary: everything that a check writes goes here, nothing into the config's `output_dir`."""
    tokenizer: PreTrainedTokenizerBase
    meta: DatasetMeta
    model: PreTrainedModel
    """With its adapter; its weights move in the rehearsal, so that check comes after those that measure."""
    plan: Plan
    """Of the whole run."""
    world_size: int = 1
    load_model: Callable[[], PreTrainedModel] | None = None
    """Makes the model once more, as it was before anything was trained; None where it was handed in."""
    trainer_class: type[EftTrainer] = EftTrainer
    """What the checks train with."""

    def config_with(self, changes: Mapping[str, Any]) -> TrainConfig:
        """The config with some keys changed, writing into the temporary folder."""
        return self.config.model_copy(update={**LEFT_OUT, **changes, "output_dir": str(self.folder)})

    def build_trainer(
        self, config: TrainConfig, train_dataset: TokenDataset | None = None, eval_dataset: Any = None
    ) -> EftTrainer:
        """A trainer for the model by `config`, one of `config_with`.

        Raises:
            ConfigError, ModelError: the config asks for what the model or the machine cannot do.
        """
        builder = HFCausalTrainerBuilder(config, self.model, self.tokenizer)
        builder.trainer_class = self.trainer_class
        builder.train_dataset = self.meta.train_dataset if train_dataset is None else train_dataset
        builder.eval_dataset = eval_dataset
        # Promise E8 is judged by `verify.keys`, over the user's own config.
        builder.keys_of_others = frozenset(type(config).model_fields)
        return builder.build()

    def build_exact_trainer(self, changes: Mapping[str, Any] = NO_KERNELS) -> EftTrainer:
        """A trainer without autocast, with `changes` to the config.

        Flash kernels know half precision only, so our attention takes their place.
        """
        attention = {"attn_implementation": "eft"} if "flash" in self.config.attn_implementation else {}
        return self.build_trainer(self.config_with({**FULL_PRECISION, **NO_EXPERT_BALANCE, **attention, **changes}))

    def objective(self) -> PlainObjective:
        """What the run minimises, in torch's own words."""
        config = self.config
        power = config.eaft_alpha if config.use_eaft else None
        return PlainObjective(config.label_smoothing_factor, config.z_loss_weight, power, config.eaft_k)

    def precision_note(self) -> str:
        """` (the run: bfloat16)` where the run computes in another dtype than the checks, else nothing."""
        name = str(resolve_precision(self.config, Environment.detect()).compute_dtype).removeprefix("torch.")
        return "" if name == "float32" else f" (the run: {name})"


def assemble(config: TrainConfig, folder: Path) -> Verification:
    """Prepare the data (or find them prepared) and load the model, as `eft train` does.

    Raises:
        EftError: the config, the data or the model is wrong.
    """
    if config.processor_type is not None:
        raise ConfigError("processor_type: `eft verify` knows rows of text only; a run over images proves E5 to E8")
    if config.streaming:
        raise ConfigError(
            "streaming: `eft verify` takes data that are known as a whole. Give it an excerpt: `streaming=false`, and "
            "a file of some hundred rows under `datasets`"
        )
    tokenizer = prepare_tokenizer(config)
    meta = load_datasets(config, tokenizer, stop_at_gates=False, compare_all=True)
    world_size = Environment.detect().world_size
    plan = plan_of(config, meta.train_dataset, world_size)
    model = load_trainable_model(config, tokenizer)
    again = partial(load_trainable_model, config, tokenizer)
    return Verification(config, folder, tokenizer, meta, model, plan, world_size, again)
