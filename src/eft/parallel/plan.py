"""Degrees of parallelism, and the arithmetic of the global batch (D2)."""

from __future__ import annotations

from dataclasses import dataclass

from eft.config.deepspeed import deepspeed_options, zero_stage
from eft.config.parallel import ParallelConfig, asks_for_parts
from eft.config.root import TrainConfig
from eft.core.errors import ConfigError


@dataclass(frozen=True)
class Degrees:
    """How the processes share the work. Ranks count with tensor parallelism fastest, then context, shards, copies."""

    world_size: int
    dp_replicate: int = 1
    """Copies of the weights."""
    dp_shard: int = 1
    """Data-parallel processes that share one copy."""
    tp: int = 1
    cp: int = 1
    sharded: bool = False
    """FSDP2; False: each data-parallel process has all weights (or its tensor-parallel part)."""
    in_parts: bool = False
    """Each process reads its part of the files alone: transformers shards the model before its weights are loaded.
    False: every process loads the whole model, and accelerate shards it afterwards, or nobody does."""
    zero: int = 0
    """Stage of DeepSpeed's ZeRO; 0: without DeepSpeed."""

    def __post_init__(self) -> None:
        assert self.dp * self.tp * self.cp == self.world_size

    @property
    def dp(self) -> int:
        """Data-parallel degree: the number of different micro-batches that are computed at the same time."""
        return self.dp_replicate * self.dp_shard

    @property
    def gradient_ranks(self) -> int:
        """Processes over which gradients are averaged."""
        return self.dp * self.cp

    @property
    def shares_weights(self) -> bool:
        """Whether no process has all weights by itself."""
        return self.sharded or self.tp > 1 or self.zero == 3

    def data_rank(self, rank: int) -> int:
        """Which of the `dp` micro-batches a process works on."""
        return rank // (self.tp * self.cp)

    def __str__(self) -> str:
        kind = "HSDP" if self.sharded and self.dp_replicate > 1 else "FSDP2" if self.sharded else "DDP"
        kind = f"ZeRO-{self.zero}" if self.zero else kind
        shape = f"{self.dp_replicate} × {self.dp_shard}" if kind == "HSDP" else str(self.dp)
        parts = [f"{kind} {shape}"] if self.dp > 1 or self.sharded else []
        parts += [f"{name} {size}" for name, size in (("TP", self.tp), ("CP", self.cp)) if size > 1]
        return " × ".join(parts) or "one process"

    @classmethod
    def resolve(cls, world_size: int, keys: ParallelConfig | None = None) -> Degrees:
        """Every degree, of which the config may give none, some or all; without keys pure data parallelism.

        Raises:
            ConfigError: the given ones do not divide the processes, or do not go together; the message names the keys.
        """
        assert world_size >= 1
        if keys is None:
            return cls(world_size, dp_replicate=world_size)
        tp, cp = keys.tensor_parallel_size, keys.context_parallel_size
        shard, replicate = keys.dp_shard_size, keys.dp_replicate_size
        # All of them are read, also where one says enough: with one process they ask for nothing, and are no mistake.
        asked = any([keys.fsdp_config is not None, keys.fsdp_version is not None, (shard or 1) > 1])
        for name, size in (("tensor_parallel_size", tp), ("context_parallel_size", cp)):
            if world_size % size:
                raise ConfigError(f"{name}: {size} does not divide {_count(world_size)}; {_nearest(size, world_size)}")
        if world_size % (tp * cp):
            raise ConfigError(
                f"context_parallel_size: {cp} × `tensor_parallel_size` {tp} does not divide {_count(world_size)}"
            )
        data = world_size // (tp * cp)
        inner = f"{_count(world_size)}" + (f" ÷ {tp * cp} that share each batch" if tp * cp > 1 else "")
        for name, given in (("dp_shard_size", shard), ("dp_replicate_size", replicate)):
            if given is not None and data % given:
                raise ConfigError(f"{name}: {given} does not divide {data} ({inner}); {_nearest(given, data)}")
        if not asked:
            shard = 1
        elif shard is None:
            shard = data // (replicate or 1)
        replicate = data // shard if replicate is None else replicate
        if shard * replicate != data:
            raise ConfigError(
                f"dp_replicate_size: {replicate} × `dp_shard_size` {shard} is {shard * replicate}, but there are "
                f"{data} data-parallel processes ({inner}); leave one of the two out"
            )
        sharded = asked and data * cp > 1
        in_parts = asks_for_parts(keys) and (sharded or tp > 1)
        stage = 0 if keys.deepspeed is None or world_size == 1 else zero_stage(deepspeed_options(keys.deepspeed))
        return cls(world_size, replicate, shard, tp, cp, sharded, in_parts, stage)


def _count(world_size: int) -> str:
    return f"{world_size} process{'es' * (world_size > 1)}"


def _nearest(size: int, total: int) -> str:
    divisors = [number for number in range(1, total + 1) if total % number == 0]
    return f"use {min(divisors, key=lambda number: (abs(number - size), number))}"


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
        fitting = ", ".join(str(number) for number in range(1, global_batch + 1) if global_batch % number == 0)
        raise ConfigError(
            f"micro_batch_size: the checkpoint's global batch of {global_batch} is no multiple of {product}. Change "
            f"`micro_batch_size` or the number of processes, so that their product is one of {fitting}."
        )
    below, above = global_batch // at_once * at_once, -(-global_batch // at_once) * at_once
    near = f"{below} or {above}" if below else f"{above}"
    raise ConfigError(f"global_batch_size: {global_batch} is no multiple of {product}; use {near}.")


def batch_of(cfg: TrainConfig, world_size: int, pinned: int | None = None) -> BatchPlan:
    """The batch arithmetic of a config on `world_size` processes.

    `pinned`: the global batch of the checkpoint that is resumed. Raises as `resolve_batch` and `Degrees.resolve`.
    """
    return resolve_batch(
        micro_batch_size=cfg.micro_batch_size,
        gradient_accumulation_steps=cfg.gradient_accumulation_steps,
        global_batch_size=cfg.global_batch_size,
        degrees=Degrees.resolve(world_size, cfg),
        pinned_global_batch_size=pinned,
    )
