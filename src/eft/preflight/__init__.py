"""Peak first: the costliest of every phase is tried before the first step, so that nothing runs out hours later."""

from __future__ import annotations

import contextlib
import logging
from functools import partial
from pathlib import Path

from rich.console import Console

from eft.config.root import TrainConfig
from eft.optim.in_backward import UpdatesInBackward
from eft.optim.state_size import optimizer_state_bytes
from eft.parallel.plan import BatchPlan
from eft.preflight.callback import Preflight
from eft.preflight.settings import RunShape
from eft.runtime.env import Environment
from eft.runtime.memory import gauge_of
from eft.trainer.parts import TrainerParts

logger = logging.getLogger(__name__)


def preflight_is_wanted(config: TrainConfig, environment: Environment) -> bool:
    """`preflight`, where `auto` is: on an accelerator, and over data that are known before the run."""
    if config.preflight == "auto":
        return environment.device.type != "cpu" and not config.streaming
    return config.preflight


def say_untried(world_size: int) -> None:
    """Warn that a run of several processes has no preflight: each would try micro-batches in a number of its own."""
    logger.warning(
        "preflight: not tried with %d processes, so too little memory shows only when it is reached; "
        "`eft plan --world-size %d` estimates what each of them needs",
        world_size,
        world_size,
    )


def preflight_of(
    config: TrainConfig, environment: Environment, batch: BatchPlan, parts: TrainerParts, console: Console | None
) -> Preflight:
    """The preflight of a run. Its `trainer` is to be set."""
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
        gauge=gauge_of(environment.device),
        state_bytes=partial(optimizer_state_bytes, parts.optimizer if updates is None else updates.build),
        paused=contextlib.nullcontext if updates is None else updates.paused,
        output_dir=Path(config.output_dir),
        save_total_limit=config.save_total_limit or None,
        save_copies=config.save_asynchronously,
        console=console,
    )
