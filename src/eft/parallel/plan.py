"""Degrees of parallelism, and the arithmetic of the global batch (D2)."""

from __future__ import annotations

from dataclasses import dataclass

from eft.config.training import TrainingConfig
from eft.core.errors import ConfigError


@dataclass(frozen=True)
class Degrees:
    """How many processes there are and how many of them see different data."""

    world_size: int
    dp: int
    """Data-parallel degree: the number of different micro-batches that are computed at the same time."""

    @classmethod
    def resolve(cls, world_size: int) -> Degrees:
        """Pure data parallelism: every process computes its own micro-batches."""
        assert world_size >= 1
        return cls(world_size=world_size, dp=world_size)


@dataclass(frozen=True)
class BatchPlan:
    """A global batch, in bins: `micro_batch_size` × `accumulation` × data-parallel processes."""

    micro_batch_size: int
    accumulation: int
    global_batch_size: int
    origin: str
    """Which keys decided, for the start print."""


def resolve_batch(
    *,
    micro_batch_size: int,
    gradient_accumulation_steps: int | None,
    global_batch_size: int | None,
    degrees: Degrees,
    pinned_global_batch_size: int | None = None,
) -> BatchPlan:
    """The accumulation and the global batch, of which the config gives one, both or neither.

    Args:
        pinned_global_batch_size: that of the checkpoint which is resumed; accumulation is then derived again.

    Raises:
        ConfigError: the numbers contradict each other, or the global batch is no multiple of what the processes
            compute at once.
    """
    at_once = micro_batch_size * degrees.dp
    product = f"`micro_batch_size` {micro_batch_size} × {degrees.dp} data-parallel process{'es' * (degrees.dp > 1)}"
    if pinned_global_batch_size is not None:
        if global_batch_size is not None and global_batch_size != pinned_global_batch_size:
            raise ConfigError(
                f"global_batch_size: {global_batch_size}, but the checkpoint was trained with "
                f"{pinned_global_batch_size}; set it back, or start a new run from the checkpoint's weights."
            )
        accumulation = _divide(pinned_global_batch_size, at_once, product, pinned=True)
        return BatchPlan(micro_batch_size, accumulation, pinned_global_batch_size, "the checkpoint's global batch")
    if global_batch_size is None:
        accumulation = gradient_accumulation_steps or 1
        origin = f"{product} × `gradient_accumulation_steps` {accumulation}"
        return BatchPlan(micro_batch_size, accumulation, at_once * accumulation, origin)
    accumulation = _divide(global_batch_size, at_once, product, pinned=False)
    if gradient_accumulation_steps not in (None, accumulation):
        raise ConfigError(
            f"gradient_accumulation_steps: {gradient_accumulation_steps} × {product} is "
            f"{at_once * gradient_accumulation_steps}, not `global_batch_size` {global_batch_size}; "
            f"leave one of the two out, or set it to {accumulation}."
        )
    return BatchPlan(micro_batch_size, accumulation, global_batch_size, "global_batch_size")


def _divide(global_batch: int, at_once: int, product: str, *, pinned: bool) -> int:
    if global_batch % at_once == 0:
        return global_batch // at_once
    if pinned:
        raise ConfigError(
            f"micro_batch_size: the checkpoint's global batch of {global_batch} is no multiple of {product}. "
            "Change `micro_batch_size` or the number of processes."
        )
    below, above = global_batch // at_once * at_once, -(-global_batch // at_once) * at_once
    near = f"{below} or {above}" if below else f"{above}"
    raise ConfigError(f"global_batch_size: {global_batch} is no multiple of {product}; use {near}.")


def batch_of(cfg: TrainingConfig, world_size: int) -> BatchPlan:
    """The batch arithmetic of a config on `world_size` data-parallel processes. Raises as `resolve_batch`."""
    return resolve_batch(
        micro_batch_size=cfg.micro_batch_size,
        gradient_accumulation_steps=cfg.gradient_accumulation_steps,
        global_batch_size=cfg.global_batch_size,
        degrees=Degrees.resolve(world_size),
    )
