"""HFCausalTrainerBuilder: from config, model and tokenizer to a trainer. Assembly only."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback

from eft.callbacks import build_callbacks
from eft.callbacks.context import CallbackContext, RunOutcome
from eft.config.identity import identity_hash
from eft.config.load import config_from_mapping
from eft.config.root import TrainConfig
from eft.config.usage import KEYS_OF_CALLER, effective_keys
from eft.core.errors import ModelError
from eft.core.records import PromiseResult
from eft.data.balance import RankShare
from eft.data.batches import BatchSource
from eft.data.collators import Collator, PackedCollator, PaddedCollator
from eft.data.image_prepare import image_size_of
from eft.data.image_set import ImageCollator
from eft.loss.head import trainable_token_loss
from eft.loss.linear import head_loss
from eft.loss.objectives import Objective
from eft.loss.router import load_balance
from eft.models.adapters import set_dtypes
from eft.models.attention import BoundarySupport, base_of, install_attention, packing_support
from eft.models.checkpointing import checkpointing_of, set_checkpointing
from eft.models.compile import check_compiler, compile_layers, without_compilation
from eft.models.experts import install_experts
from eft.models.forward import TrainedLogits, TrainedLoss
from eft.models.kernels import InstalledLiger, check_liger, use_liger, wanted_kernels
from eft.models.load import describe_model
from eft.models.loss_head import find_loss_head
from eft.models.neftune import noisy_loss
from eft.models.probes import boundary_probe, select_logits_kwargs
from eft.models.processor import check_processor
from eft.models.router_logits import find_router_loss
from eft.models.ulysses import SharedRows, install_ulysses
from eft.models.verify_export import digest_save, probe_save
from eft.optim.averaging import evaluation_weights
from eft.optim.in_backward import UpdatesInBackward, check_updates_in_backward
from eft.optim.optimizers import OPTIMIZERS, build_optimizer
from eft.optim.schedulers import build_scheduler
from eft.parallel.deepspeed import check_deepspeed, check_zero, deepspeed_arguments, deepspeed_environment
from eft.parallel.deepspeed_state import ZeroShards
from eft.parallel.engine import accelerator_arguments, check_engine, complete_split, one_tensor_at_a_time
from eft.parallel.group import Agreement, subgroup_of
from eft.parallel.plan import BatchPlan, Degrees, batch_of
from eft.parallel.sharding import TensorShards
from eft.parallel.state_dict import forget_gathered
from eft.preflight import preflight_is_wanted, preflight_of
from eft.preflight.callback import Preflight
from eft.runtime.checkpoint import CheckpointStore
from eft.runtime.dtype_ledger import Announced
from eft.runtime.env import Environment, Precision, resolve_precision
from eft.runtime.memory import HostMemory
from eft.runtime.metrics import Throughput
from eft.runtime.offload import activation_offloading
from eft.runtime.rng import add_rng, load_rng
from eft.runtime.watchdog import Watchdog
from eft.runtime.weights import live_weights
from eft.trainer.dtypes import DtypeLedger
from eft.trainer.flow import flow_rules
from eft.trainer.guard import watch_rules
from eft.trainer.in_backward import AttachUpdates
from eft.trainer.parts import ParallelParts, SaveProbe, TrainerParts
from eft.trainer.trainer import EftTrainer
from eft.trainer.training_args import build_training_arguments, require_trackers, set_tracker_environment

logger = logging.getLogger(__name__)


class PlaceholderDataset:
    """Stands in for data that are assigned after `build`, so that evaluation settings validate (D7)."""

    def __len__(self) -> int:
        return 0


def as_config(cfg: TrainConfig | Mapping[str, Any]) -> TrainConfig:
    """The typed config: itself, or a mapping (a `DictDefault`, say) validated now."""
    return cfg if isinstance(cfg, TrainConfig) else config_from_mapping(cfg)


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
        processor: ProcessorMixin | None = None,
    ) -> None:
        """
        Args:
            cfg: the config, or a mapping with its keys.
            model: a causal LM, also one made elsewhere, wrapped in peft or not.
            tokenizer: its tokenizer.
            processor: of a model that takes images; rows are then an `ImageSet` (`data.image_prepare`).

        Raises:
            ConfigError: the mapping is not a valid config.
            ModelError: the processor has no images or the rows are packed, or the model is not what the config says.
        """
        self.config = as_config(cfg)
        self.processor = processor
        if processor is not None:
            check_processor(processor)
            self._check_not_packed(processor)
        self.model = model
        self.tokenizer = tokenizer
        self.train_dataset: Any = None
        self.eval_dataset: Any = None
        self.environment = Environment.detect()
        self.degrees = Degrees(self.environment.world_size, dp_replicate=self.environment.world_size)
        self.outcome = RunOutcome()
        self.pinned_global_batch_size: int | None = None
        """That of the checkpoint which is going to be resumed: accumulation follows from it (D2)."""
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
        if self.environment.device.type == "cpu":
            HostMemory.map_large_blocks()
        self._check_adapter()
        require_trackers(config)
        precision = resolve_precision(config, self.environment)
        self.degrees = Degrees.resolve(self.environment.world_size, config)
        check_deepspeed(self.degrees)
        shards = ZeroShards if self.degrees.zero else TensorShards
        self.shards = shards(self.environment.rank, self.environment.world_size)
        complete_split(self.model, base_of(self.model), config, self.degrees)
        batch = batch_of(config, self.environment.world_size, self.pinned_global_batch_size)
        check_compiler(config, self.environment.device)
        check_liger(config, self.environment.device)
        dtypes = {"pure_bf16": precision.pure, "autocast": precision.autocast}
        set_dtypes(self.model, **dtypes, fp32_gradients=batch.accumulation > 1)
        set_checkpointing(self.model, checkpointing_of(config))
        set_tracker_environment(config)
        install_experts(base_of(self.model))
        with without_compilation():
            support = self._install_attention(precision)
            loss, evaluation_loss = self._losses(support, precision)
        forget_gathered(self.model)
        self._install_kernels()
        part_of_row = self._share_rows(support)
        parts = self._parts(part_of_row, support, batch, loss, evaluation_loss)
        first = self._first_callbacks(parts, batch, precision)
        deepspeed = deepspeed_arguments(config, self.degrees, batch, precision.autocast_dtype)
        with deepspeed_environment(self.degrees, self.environment.device):
            trainer = self.trainer_class(
                parts,
                total_num_steps=total_num_steps or None,
                model=self.model,
                args=build_training_arguments(
                    config,
                    accumulation=batch.accumulation,
                    compute_dtype=precision.autocast_dtype,
                    device_type=self.environment.device.type,
                    # A stream has no length to take steps from; the plan sets their number.
                    max_steps=config.max_steps or total_num_steps or (1 if config.streaming else None),
                    has_eval=self._may_evaluate(),
                    deepspeed=deepspeed,
                ),
                train_dataset=self.train_dataset,
                eval_dataset=PlaceholderDataset() if self.eval_dataset is None else self.eval_dataset,
                processing_class=self.tokenizer if self.processor is None else self.processor,
                callbacks=[*first, *build_callbacks(config, self._context())],
            )
        check_engine(self.degrees, trainer.accelerator.distributed_type, self.environment.device.type)
        check_zero(self.degrees, trainer.accelerator.distributed_type)
        trainer.outcome = self.outcome
        for callback in first:
            if isinstance(callback, Preflight | DtypeLedger):
                callback.trainer = trainer
        return trainer

    def _first_callbacks(self, parts: TrainerParts, batch: BatchPlan, precision: Precision) -> list[TrainerCallback]:
        """What happens before all else: hooks of the optimizer, the preflight; after a step a look at all dtypes."""
        weights = {torch.float32, precision.compute_dtype} if precision.pure else {torch.float32}
        announced = Announced(frozenset(weights), OPTIMIZERS[self.config.optimizer].state, precision.compute_dtype)
        callbacks: list[TrainerCallback] = [DtypeLedger(announced, self.outcome.promises)]
        if isinstance(parts.optimizer, UpdatesInBackward):
            callbacks.append(AttachUpdates(parts.optimizer))
        if not preflight_is_wanted(self.config, self.environment) or self.processor is not None:
            return callbacks
        console = self.console if self.environment.rank == 0 else None
        callbacks.append(preflight_of(self.config, self.environment, batch, parts, self.degrees, console))
        return callbacks

    def _check_not_packed(self, processor: ProcessorMixin) -> None:
        if self.config.sample_packing:
            raise ModelError(
                f"sample_packing: rows that go through a {type(processor).__name__} cannot be packed: image tokens "
                "take their positions from the image sizes of a whole row. Set `sample_packing: false`."
            )

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
        if self.processor is not None:
            if config.attn_implementation != "eft":
                install_attention(self.model, config.attn_implementation)
            return BoundarySupport("refused", "rows with images are not packed", leak=0.0, difference=0.0)
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
        objective = Objective(
            label_smoothing=config.label_smoothing_factor,
            z_loss=config.z_loss_weight,
            entropy_power=config.eaft_alpha if config.use_eaft else None,
            entropy_tokens=config.eaft_k,
        )
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

    def _share_rows(self, support: BoundarySupport) -> Callable[[dict[str, Any]], dict[str, Any]] | None:
        """Context parallelism: what takes this process's part of a batch; None where rows are not shared."""
        size, rank = self.degrees.cp, self.environment.rank
        if size == 1:
            return None
        rows = SharedRows(subgroup_of(rank, size, self.degrees.world_size), rank % size, size)
        install_ulysses(self.model, support, rows)
        return rows.part

    def _may_evaluate(self) -> bool:
        config = self.config
        return self.eval_dataset is not None or config.val_set_size > 0 or config.test_datasets is not None

    def _parts(
        self,
        part_of_row: Callable[[dict[str, Any]], dict[str, Any]] | None,
        support: BoundarySupport,
        batch: BatchPlan,
        loss: TrainedLoss,
        evaluation_loss: TrainedLoss,
    ) -> TrainerParts:
        config = self.config
        rank, world_size = self.environment.rank, self.environment.world_size
        return TrainerParts(
            packing=self._batches(support, batch),
            forward=loss.forward,
            loss=noisy_loss(self.model, loss, config.neftune_noise_alpha),
            evaluation_loss=evaluation_loss,
            scheduler=partial(build_scheduler, config),
            optimizer=self._optimizer(batch),
            evaluation_weights=evaluation_weights,
            add_rng=partial(add_rng, rank=rank, world_size=world_size),
            load_rng=partial(load_rng, rank=rank, world_size=world_size),
            checkpoint=CheckpointStore(
                Path(config.output_dir),
                save_total_limit=config.save_total_limit or None,
                keep_every=config.save_keep_every,
                asynchronous=config.save_asynchronously,
                sharding=self.shards,
            ),
            offloading=partial(
                activation_offloading,
                config.activation_offloading,
                self.environment.device,
                host_limit=HostMemory().available() // 2,
            ),
            meter=Throughput(),
            flow=flow_rules(config),
            watchdog=Watchdog(watch_rules(config), self.outcome.fail),
            # Dropout differs between batches, not between processes that share one.
            seed=config.seed + rank // self.degrees.tp,
            fingerprint=identity_hash(config),
            probe_save=self._probe_save(),
            has_gradient_norm=not config.optimizer_in_backward,
            parallel=ParallelParts(
                accelerator_arguments(config, self.degrees),
                self.degrees.gradient_ranks,
                is_sharded=self.degrees.shares_weights,
                part_of_row=part_of_row,
            ),
        )

    def _probe_save(self) -> SaveProbe | None:
        """What has every save loaded by a fresh process: to compute, where this one can do so too, else to compare."""
        if self.config.verify_saves != "always":
            return None
        if self.degrees.shares_weights:
            whole = self.shards.whole
            return partial(digest_save, live=live_weights, whole=whole, gguf_file=self.config.gguf_file)
        return partial(probe_save, gguf_file=self.config.gguf_file)

    def _optimizer(self, batch: BatchPlan) -> Callable[[nn.Module], Optimizer]:
        """What makes the optimizer, once the model is where it will be trained."""
        config = self.config
        bf16_update = config.bf16_update if config.bfloat16 else None
        build = partial(build_optimizer, config, bf16_update=bf16_update, seed=config.seed)
        if isinstance(self.shards, ZeroShards):
            return partial(self.shards.build, build)
        if self.degrees.tp > 1:
            return partial(one_tensor_at_a_time, build)
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
            share=RankShare(
                rank=self.degrees.data_rank(self.environment.rank),
                world_size=self.degrees.dp,
                accumulation=batch.accumulation,
                micro_batch_size=config.micro_batch_size,
                cost_ratio=shape["attention_cost_ratio"],
            ),
            eval_batch_size=config.eval_batch_size or config.micro_batch_size,
            num_workers=config.dataloader_num_workers,
            pin_memory=config.dataloader_pin_memory and self.environment.device.type == "cuda",
            vocabulary_rows=shape["vocabulary_rows"],
            position_rows=shape["position_rows"],
            buffer_samples=config.streaming_multipack_buffer_size,
            token_budget=config.streaming_token_budget,
        )

    def _collator(self, support: BoundarySupport) -> Collator:
        """One row without padding where the model knows boundaries, else padded rows."""
        config, pad_id = self.config, self.tokenizer.pad_token_id or 0
        if self.processor is not None:
            pad_to = config.sequence_len if config.pad_to_sequence_len else None
            return ImageCollator(self.processor, image_size_of(config), pad_id, pad_to)
        if support.mode == "refused":
            return PaddedCollator(
                pad_token_id=pad_id, pad_to=config.sequence_len if config.pad_to_sequence_len else None
            )
        pad_to = config.micro_batch_size * config.sequence_len if config.pad_to_sequence_len else None
        if self.degrees.cp > 1:
            pad_to = math.lcm(pad_to or 1, self.degrees.cp)
        return PackedCollator(pad_to=pad_to, pad_token_id=pad_id)

    def _context(self) -> CallbackContext:
        return CallbackContext(
            output_dir=Path(self.config.output_dir),
            outcome=self.outcome,
            check_keys_read=self._check_keys_read,
            console=self.console if self.environment.rank == 0 else None,
            agree=Agreement(),
        )

    def _check_keys_read(self) -> PromiseResult:
        return effective_keys(self.config, read_before=self.keys_read_before, exempt=self.keys_of_others)
