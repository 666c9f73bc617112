"""HFCausalTrainerBuilder: from config, model and tokenizer to a trainer. Assembly only."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from peft import PeftModel
from rich.console import Console
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from eft.callbacks import CallbackContext, RunOutcome, build_callbacks
from eft.config.identity import identity_hash
from eft.config.load import config_from_mapping
from eft.config.root import TrainConfig
from eft.config.usage import KEYS_OF_CALLER, effective_keys
from eft.core.errors import ConfigError, ModelError
from eft.core.records import PromiseResult
from eft.data.batches import BatchSource
from eft.data.collators import Collator, PackedCollator, PaddedCollator
from eft.loss.head import trainable_token_loss
from eft.loss.linear import head_loss
from eft.loss.objectives import Objective
from eft.loss.router import load_balance
from eft.models.adapters import set_dtypes
from eft.models.attention import BoundarySupport, install_attention, packing_support
from eft.models.checkpointing import checkpointing_of, set_checkpointing
from eft.models.compile import check_compiler, compile_layers, without_compilation
from eft.models.forward import TrainedLogits, TrainedLoss
from eft.models.kernels import InstalledLiger, check_liger, use_liger, wanted_kernels
from eft.models.load import describe_model
from eft.models.loss_head import find_loss_head
from eft.models.probes import boundary_probe, select_logits_kwargs
from eft.models.router_logits import find_router_loss
from eft.optim.averaging import evaluation_weights
from eft.optim.in_backward import UpdatesInBackward, check_updates_in_backward
from eft.optim.optimizers import build_optimizer
from eft.optim.schedulers import build_scheduler
from eft.parallel.plan import BatchPlan, batch_of
from eft.preflight import preflight_is_wanted, preflight_of
from eft.preflight.callback import Preflight
from eft.runtime.checkpoint import CheckpointStore
from eft.runtime.env import Environment, Precision, resolve_precision
from eft.runtime.memory import HostMemory
from eft.runtime.metrics import Throughput
from eft.runtime.offload import activation_offloading
from eft.runtime.rng import add_rng, load_rng
from eft.trainer.in_backward import AttachUpdates
from eft.trainer.parts import FlowRules, TrainerParts
from eft.trainer.trainer import EftTrainer
from eft.trainer.training_args import build_training_arguments, set_tracker_environment

logger = logging.getLogger(__name__)


class PlaceholderDataset:
    """Stands in for data that are assigned after `build`, so that evaluation settings validate (D7)."""

    def __len__(self) -> int:
        return 0


def as_config(cfg: TrainConfig | Mapping[str, Any]) -> TrainConfig:
    """The typed config: itself, or a mapping (a `DictDefault`, say) validated now."""
    return cfg if isinstance(cfg, TrainConfig) else config_from_mapping(cfg)


def require_trackers(config: TrainConfig) -> None:
    """Raise ConfigError for a tracker whose package is missing; its Trainer integration would only fail by then."""
    packages = {
        "use_tensorboard": "tensorboard",
        "use_wandb": "wandb",
        "use_mlflow": "mlflow",
        "use_trackio": "trackio",
    }
    for key, package in packages.items():
        if getattr(config, key) and find_spec(package) is None:
            raise ConfigError(f"{key}: needs the package {package}; pip install 'eft-trainer[{package}]'.")
    address = config.mlflow_tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    if config.use_mlflow and address is None and find_spec("sqlalchemy") is None:
        raise ConfigError(
            "use_mlflow: where to? Without an address MLflow wants a database, and the package sqlalchemy is missing. "
            f"Set `mlflow_tracking_uri`, such as file:{Path(config.output_dir).resolve() / 'mlruns'}"
        )


class HFCausalTrainerBuilder:
    """Builds the trainer of a causal language model.

    `train_dataset` and `eval_dataset` may be set before `build`, or on the trainer after it.
    """

    trainer_class: type[EftTrainer] = EftTrainer
    """What `build` makes; a subclass of EftTrainer may be set instead."""

    def __init__(
        self,
        cfg: TrainConfig | Mapping[str, Any],
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        processor: None = None,
    ) -> None:
        """
        Args:
            cfg: the config, or a mapping with its keys.
            model: a causal LM, also one made elsewhere, wrapped in peft or not.
            tokenizer: its tokenizer.
            processor: must be None: multimodal rows are not built yet.

        Raises:
            ConfigError: the mapping is not a valid config.
            ModelError: a processor was given, or the model is not what the config says.
        """
        if processor is not None:
            raise ModelError(
                f"processor: {type(processor).__name__} was given, but multimodal rows are not part of eft yet. "
                "Pass processor=None to train on text."
            )
        self.config = as_config(cfg)
        self.model = model
        self.tokenizer = tokenizer
        self.train_dataset: Any = None
        self.eval_dataset: Any = None
        self.environment = Environment.detect()
        self.outcome = RunOutcome()
        self.console: Console | None = None
        self.keys_read_before: frozenset[str] = frozenset()
        """Keys that were read from another copy of the config, such as those of data prepared earlier."""
        self.keys_of_others: frozenset[str] = KEYS_OF_CALLER
        """Keys that promise E8 leaves to whoever made the model and the data."""

    def build(self, total_num_steps: int | None = None) -> EftTrainer:
        """The trainer, ready for `train()`.

        Args:
            total_num_steps: optimizer steps to run and to schedule for, where `max_steps` is not set; None or 0: the
                plan's own number (D8).
        """
        config = self.config
        self._check_adapter()
        require_trackers(config)
        precision = resolve_precision(config, self.environment)
        batch = batch_of(config, self.environment.world_size)
        check_compiler(config, self.environment.device)
        check_liger(config, self.environment.device)
        set_dtypes(self.model, pure_bf16=precision.pure, fp32_gradients=batch.accumulation > 1)
        set_checkpointing(self.model, checkpointing_of(config))
        set_tracker_environment(config)
        with without_compilation():
            support = self._install_attention(precision)
            loss, evaluation_loss = self._losses(support, precision)
        self._install_kernels()
        parts = self._parts(support, batch, loss, evaluation_loss)
        first = self._first_callbacks(parts, batch)
        trainer = self.trainer_class(
            parts,
            total_num_steps=total_num_steps or None,
            model=self.model,
            args=build_training_arguments(
                config,
                accumulation=batch.accumulation,
                compute_dtype=precision.autocast_dtype,
                device_type=self.environment.device.type,
                max_steps=config.max_steps or total_num_steps,
                has_eval=self._may_evaluate(),
            ),
            train_dataset=self.train_dataset,
            eval_dataset=PlaceholderDataset() if self.eval_dataset is None else self.eval_dataset,
            processing_class=self.tokenizer,
            callbacks=[*first, *build_callbacks(config, self._context())],
        )
        trainer.outcome = self.outcome
        for callback in first:
            if isinstance(callback, Preflight):
                callback.trainer = trainer
        return trainer

    def _first_callbacks(self, parts: TrainerParts, batch: BatchPlan) -> list[TrainerCallback]:
        """What happens when a training begins, before all else: hooks of the optimizer, then the preflight."""
        callbacks: list[TrainerCallback] = []
        if isinstance(parts.optimizer, UpdatesInBackward):
            callbacks.append(AttachUpdates(parts.optimizer))
        if preflight_is_wanted(self.config, self.environment):
            callbacks.append(preflight_of(self.config, self.environment, batch, parts, self.console))
        return callbacks

    def _check_adapter(self) -> None:
        if self.config.adapter is not None and not isinstance(self.model, PeftModel):
            raise ModelError(
                f"adapter: {self.config.adapter} is set, but the model given to the builder is a plain "
                f"{type(self.model).__name__}. Wrap it first (eft.models.adapters.apply_adapter, or "
                "peft.get_peft_model), or remove `adapter`."
            )

    def _install_attention(self, precision: Precision) -> BoundarySupport:
        """Install the config's attention and find out by a probe how the model keeps documents apart (D6)."""
        config = self.config
        install_attention(self.model, config.attn_implementation)
        autocast = precision.compute_dtype if precision.autocast else None
        rows = max(config.micro_batch_size, config.eval_batch_size or 0)
        support = packing_support(
            self.model,
            autocast_dtype=autocast,
            longest_document=config.sequence_len,
            longest_row=config.sequence_len * rows,
        )
        if config.sample_packing:
            if support.mode == "refused":
                raise ModelError(
                    f"sample_packing: {type(self.model).__name__} cannot keep packed documents apart "
                    f"({support.reason}). Set `sample_packing: false`."
                )
            self.outcome.promises.append(boundary_probe(self.model, support, autocast_dtype=autocast))
        logger.info("document boundaries: %s (%s)", support.mode, support.reason)
        return support

    def _losses(self, support: BoundarySupport, precision: Precision) -> tuple[TrainedLoss, TrainedLoss]:
        """What is minimised, and what is evaluated; found out by a probe whether the logits can be left out."""
        config = self.config
        autocast = precision.compute_dtype if precision.autocast else None
        head, reason = find_loss_head(self.model, head_loss, autocast_dtype=autocast)
        logger.info("loss: %s (%s)", "from logits" if head is None else "without logits", reason)
        forward = TrainedLogits(support, select_logits_kwargs(self.model))
        objective = Objective(label_smoothing=config.label_smoothing_factor, z_loss=config.z_loss_weight)
        checkpointing = checkpointing_of(config)
        router = find_router_loss(
            self.model,
            load_balance,
            config.router_aux_loss_coef,
            support,
            reentrant=checkpointing is not None and checkpointing.use_reentrant,
            compiled=config.torch_compile,
            autocast_dtype=autocast,
        )
        minimised = TrainedLoss(
            forward,
            head,
            partial(head_loss, objective=objective),
            partial(trainable_token_loss, objective=objective),
            router,
        )
        return minimised, TrainedLoss(forward, head, head_loss, trainable_token_loss)

    def _install_kernels(self) -> None:
        """Liger's kernels where they are wanted, and compiled layers."""
        if wanted_kernels(self.config):
            self.model.to(self.environment.device)
            self.outcome.promises.extend(use_liger(self.model, self.config, InstalledLiger()))
        compile_layers(self.model, self.config, recomputed=self.config.gradient_checkpointing)

    def _may_evaluate(self) -> bool:
        config = self.config
        return self.eval_dataset is not None or config.val_set_size > 0 or config.test_datasets is not None

    def _parts(
        self, support: BoundarySupport, batch: BatchPlan, loss: TrainedLoss, evaluation_loss: TrainedLoss
    ) -> TrainerParts:
        config = self.config
        rank, world_size = self.environment.rank, self.environment.world_size
        return TrainerParts(
            packing=self._batches(support, batch),
            forward=loss.forward,
            loss=loss,
            evaluation_loss=evaluation_loss,
            scheduler=partial(build_scheduler, config),
            optimizer=self._optimizer(batch),
            evaluation_weights=evaluation_weights,
            add_rng=partial(add_rng, rank=rank, world_size=world_size),
            load_rng=partial(load_rng, rank=rank, world_size=world_size),
            checkpoint=CheckpointStore(
                Path(config.output_dir),
                save_total_limit=config.save_total_limit or None,
                asynchronous=config.save_asynchronously,
            ),
            offloading=partial(
                activation_offloading,
                config.activation_offloading,
                self.environment.device,
                host_limit=HostMemory().available() // 2,
            ),
            meter=Throughput(),
            flow=flow_rules(config),
            seed=config.seed,
            fingerprint=identity_hash(config),
            has_gradient_norm=not config.optimizer_in_backward,
        )

    def _optimizer(self, batch: BatchPlan) -> Callable[[nn.Module], Optimizer]:
        """What makes the optimizer, once the model is where it will be trained."""
        config = self.config
        bf16_update = config.bf16_update if config.bfloat16 else None
        build = partial(build_optimizer, config, bf16_update=bf16_update, seed=config.seed)
        if not config.optimizer_in_backward:
            return build
        check_updates_in_backward(batch.accumulation, self.environment.world_size)
        return UpdatesInBackward(build)

    def _batches(self, support: BoundarySupport, batch: BatchPlan) -> BatchSource:
        config = self.config
        eval_packing = config.sample_packing if config.eval_sample_packing is None else config.eval_sample_packing
        shape = describe_model(self.model)
        return BatchSource(
            collator=self._collator(support),
            capacity=config.sequence_len,
            packed=config.sample_packing,
            eval_packed=eval_packing and support.mode != "refused",
            sequential=config.sample_packing_sequentially,
            strategy=config.sample_packing_strategy,
            bin_samples=config.sample_packing_bin_size,
            balance_buffer=config.balance_buffer_steps,
            shuffle=not config.curriculum_sampling,
            seed=config.seed,
            num_epochs=config.num_epochs,
            max_steps=config.max_steps,
            global_batch_size=batch.global_batch_size,
            accumulation=batch.accumulation,
            micro_batch_size=config.micro_batch_size,
            eval_batch_size=config.eval_batch_size or config.micro_batch_size,
            rank=self.environment.rank,
            world_size=self.environment.world_size,
            num_workers=config.dataloader_num_workers,
            pin_memory=config.dataloader_pin_memory and self.environment.device.type == "cuda",
            attention_cost_ratio=shape["attention_cost_ratio"],
            vocabulary_rows=shape["vocabulary_rows"],
            position_rows=shape["position_rows"],
        )

    def _collator(self, support: BoundarySupport) -> Collator:
        """One row without padding where the model knows boundaries, else padded rows."""
        config, pad_id = self.config, self.tokenizer.pad_token_id or 0
        if support.mode == "refused":
            return PaddedCollator(
                pad_token_id=pad_id, pad_to=config.sequence_len if config.pad_to_sequence_len else None
            )
        pad_to = config.micro_batch_size * config.sequence_len if config.pad_to_sequence_len else None
        return PackedCollator(pad_to=pad_to, pad_token_id=pad_id)

    def _context(self) -> CallbackContext:
        return CallbackContext(
            output_dir=Path(self.config.output_dir),
            outcome=self.outcome,
            check_keys_read=self._check_keys_read,
            console=self.console if self.environment.rank == 0 else None,
        )

    def _check_keys_read(self) -> PromiseResult:
        return effective_keys(self.config, read_before=self.keys_read_before, exempt=self.keys_of_others)


def flow_rules(config: TrainConfig) -> FlowRules:
    """When to log, evaluate and save, with the defaults that users expect: each epoch, where nothing else is said."""
    save_strategy = config.save_strategy or ("steps" if config.save_steps is not None else "epoch")
    saves_per_epoch = config.saves_per_epoch
    if saves_per_epoch is None and save_strategy == "epoch":
        saves_per_epoch = 1
    eval_strategy = config.eval_strategy or ("steps" if config.eval_steps is not None else "epoch")
    evals_per_epoch = config.evals_per_epoch
    if evals_per_epoch is None and eval_strategy == "epoch":
        evals_per_epoch = 1
    saving, evaluating = save_strategy != "no", eval_strategy != "no"
    best = save_strategy == "best" or config.load_best_model_at_end
    return FlowRules(
        logging_steps=config.logging_steps,
        eval_every=config.eval_steps if evaluating else None,
        evals_per_epoch=evals_per_epoch if evaluating and config.eval_steps is None else None,
        save_every=config.save_steps if saving else None,
        saves_per_epoch=saves_per_epoch if saving and config.save_steps is None else None,
        save_first_step=config.save_first_step and saving,
        save_at_end=saving,
        save_best=best and saving,
    )
