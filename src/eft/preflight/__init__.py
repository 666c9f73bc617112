"""Peak first: the costliest of every phase is tried before the first step, so that nothing runs out hours later."""

from __future__ import annotations

import contextlib
from functools import partial
from pathlib import Path

from rich.console import Console

from eft.config.root import TrainConfig
from eft.optim.in_backward import UpdatesInBackward
from eft.optim.state_size import optimizer_state_bytes
from eft.parallel.plan import BatchPlan, Degrees
from eft.preflight.callback import Preflight
from eft.preflight.settings import RunShape
from eft.runtime.checkpoint import CheckpointStore
from eft.runtime.env import Environment
from eft.runtime.memory import HostMemory, gauge_of
from eft.trainer.parts import TrainerParts


def preflight_is_wanted(config: TrainConfig, environment: Environment) -> bool:
    """`preflight`, where `auto` is: on an accelerator, and over data that are known before the run."""
    if config.preflight == "auto":
        return environment.device.type != "cpu" and not config.streaming and config.deepspeed is None
    return config.preflight


def preflight_of(
    config: TrainConfig,
    environment: Environment,
    batch: BatchPlan,
    parts: TrainerParts,
    degrees: Degrees,
    console: Console | None,
) -> Preflight:
    """The preflight of a run. Its `trainer` is to be set."""
    assert isinstance(parts.checkpoint, CheckpointStore)
    updates = parts.optimizer if isinstance(parts.optimizer, UpdatesInBackward) else None
    on_accelerator = environment.device.type != "cpu"
    return Preflight(
        shape=RunShape(
            micro_batch_size=batch.micro_batch_size,
            accumulation=batch.accumulation,
            eval_batch_size=config.eval_batch_size or config.micro_batch_size,
            sequence_len=config.sequence_len,
            recomputes=config.gradient_checkpointing,
            offloads=config.activation_offloading,
            can_offload=on_accelerator,
            gives_global_batch=config.global_batch_size is not None,
            may_accumulate=updates is None,
        ),
        gauge=gauge_of(environment.device, environment.local_world_size),
        state_bytes=partial(optimizer_state_bytes, parts.optimizer if updates is None else updates.build),
        paused=contextlib.nullcontext if updates is None else updates.paused,
        output_dir=Path(config.output_dir),
        save_total_limit=config.save_total_limit or None,
        save_copies=config.save_asynchronously,
        sharding=parts.checkpoint.sharding,
        shards=(degrees.dp_shard * degrees.cp if degrees.sharded else 1) * degrees.tp,
        jointly=degrees.sharded or degrees.tp * degrees.cp > 1,
        console=console,
        host=HostMemory(environment.local_world_size),
    )
