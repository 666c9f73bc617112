"""What a run could be told to do with less memory: config keys to write, cheapest first. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from eft.models.checkpointing import Checkpointing

SHORTEST_ROW = 128
"""Rows are not cut below this in the search for what fits."""


@dataclass(frozen=True)
class RunShape:
    """What decides the memory of a run, as its config says it."""

    micro_batch_size: int
    accumulation: int
    eval_batch_size: int
    sequence_len: int
    recomputes: bool
    """`gradient_checkpointing`."""
    offloads: bool
    """`activation_offloading`."""
    can_offload: bool
    """There is a device to take activations from."""
    gives_global_batch: bool
    """`global_batch_size` is set, and accumulation follows from it."""
    may_accumulate: bool = True
    """Not with `optimizer_in_backward`."""


@dataclass(frozen=True)
class Setting:
    """One way to run a training step."""

    micro_batch_size: int
    accumulation: int
    checkpointing: Checkpointing | None = None
    """None: as it is."""
    offloads: bool = False
    longest: int | None = None
    """Tokens to which rows are cut; None: none are."""
    keys: dict[str, Any] = field(default_factory=dict)
    """What to write into the config, where it differs from what is there."""

    def __str__(self) -> str:
        return written(self.keys)


def written(keys: dict[str, Any]) -> str:
    """Keys as one would write them: `` `a: 1`, `b: true` ``."""
    return ", ".join(f"`{name}: {str(value).lower()}`" for name, value in keys.items())


def present_setting(shape: RunShape) -> Setting:
    """What the config says."""
    return Setting(shape.micro_batch_size, shape.accumulation, offloads=shape.offloads)


def cheaper_settings(shape: RunShape) -> Iterator[Setting]:
    """Other settings of the same training, from the one that costs least time to the one that costs most.

    Smaller micro-batches at the same global batch cost almost nothing, recomputation up to a third of the step,
    offloading the traffic to the host. Shorter rows come last: they change what is trained.
    """
    present = present_setting(shape)
    sizes = _smaller_sizes(shape.micro_batch_size) if shape.may_accumulate else []
    yield from (_with_size(present, size, shape) for size in sizes)
    thrifty = present
    if not shape.recomputes:
        half = _with_keys(present, {"gradient_checkpointing": True, "gradient_checkpointing_every": 2})
        yield replace(half, checkpointing=Checkpointing(every=2))
        thrifty = replace(_with_keys(present, {"gradient_checkpointing": True}), checkpointing=Checkpointing())
        yield thrifty
        yield from (_with_size(thrifty, size, shape) for size in sizes)
    if shape.can_offload and not shape.offloads:
        thrifty = replace(_with_keys(thrifty, {"activation_offloading": True}), offloads=True)
        yield thrifty
        yield from (_with_size(thrifty, size, shape) for size in sizes)
    if sizes:
        thrifty = _with_size(thrifty, sizes[-1], shape)
    length = shape.sequence_len // 2
    while length >= SHORTEST_ROW:
        yield replace(_with_keys(thrifty, {"sequence_len": length}), longest=length)
        length //= 2


def cheaper_eval_sizes(shape: RunShape) -> list[int]:
    """Values of `eval_batch_size` below the present one, largest first."""
    return _smaller_sizes(shape.eval_batch_size)


def _smaller_sizes(size: int) -> list[int]:
    """Proper divisors, largest first: the global batch stays a multiple of them."""
    return [divisor for divisor in range(size // 2, 0, -1) if size % divisor == 0]


def _with_size(setting: Setting, size: int, shape: RunShape) -> Setting:
    accumulation = setting.accumulation * setting.micro_batch_size // size
    keys: dict[str, Any] = {"micro_batch_size": size}
    if not shape.gives_global_batch:
        keys["gradient_accumulation_steps"] = accumulation
    return replace(_with_keys(setting, keys), micro_batch_size=size, accumulation=accumulation)


def _with_keys(setting: Setting, keys: dict[str, Any]) -> Setting:
    return replace(setting, keys={**setting.keys, **keys})
