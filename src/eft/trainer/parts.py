"""The components that the trainer is assembled from. None of them knows Trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from eft.runtime.watchdog import Watchdog


class PlanLike(Protocol):
    """What the trainer asks of a plan (`data.plan.Plan`)."""

    total_steps: int
    plan_steps: int
    global_batch_size: int
    fingerprint: str
    epoch_ends: list[int]
    dataset: Any
    """The samples, by the numbers that the plan uses (`core.records.TokenDataset`)."""

    def epoch_at(self, step: int) -> float: ...

    def step(self, step: int) -> Any: ...

    def summary(self) -> dict[str, Any]: ...


class Batches(Protocol):
    """Plans and loaders (`data.batches.BatchSource`)."""

    def make_plan(self, dataset: Any, total_num_steps: int | None) -> PlanLike: ...

    def train_loader(self, plan: Any, cursor: Callable[[], int]) -> DataLoader[Any]: ...

    def eval_loader(self, dataset: Any) -> DataLoader[Any]: ...

    def state_at(self, plan: Any, step: int) -> dict[str, Any]: ...

    def restore(self, plan: Any, step: int, state: dict[str, Any]) -> None: ...


class Forward(Protocol):
    """Batch to logits of the trained positions (`models.forward.TrainedLogits`)."""

    def __call__(self, model: nn.Module, batch: dict[str, Any]) -> Tensor: ...


class BatchLoss(Protocol):
    """Batch to Σ weight · loss of its trained tokens, a scalar (`models.forward.TrainedLoss`)."""

    def __call__(self, model: nn.Module, batch: dict[str, Any]) -> Tensor: ...

    def with_logits(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Tensor]: ...


class Offloading(Protocol):
    """Context that keeps saved activations elsewhere (`runtime.offload.activation_offloading`)."""

    def __call__(self, *, parameters: Iterable[Tensor]) -> AbstractContextManager[Any]: ...


class FoundCheckpoint(Protocol):
    """What a search for a checkpoint found (`runtime.checkpoint.NewestCheckpoint`)."""

    @property
    def path(self) -> Path | None: ...


class Checkpoints(Protocol):
    """Atomic checkpoint folders with their weights and optimizer state."""

    allow_change: bool

    def save(
        self,
        step: int,
        best_step: int | None,
        extra: dict[str, Any],
        *,
        keep: bool,
        fill: Callable[[Any], None],
        check: Callable[[Path], None] | None = None,
    ) -> None: ...

    @property
    def times(self) -> Sequence[Any]: ...

    def wait(self) -> None: ...

    def fail(self) -> None: ...

    def raise_failure(self) -> None: ...

    def beside(self, job: Callable[[], None]) -> None: ...

    def add_weights(self, draft: Any, model: nn.Module) -> None: ...

    def load_weights(self, folder: Path, model: nn.Module) -> None: ...

    def add_optimizer(self, draft: Any, model: nn.Module, optimizer: Optimizer) -> None: ...

    def load_optimizer(self, folder: Path, model: nn.Module, optimizer: Optimizer) -> None: ...

    def place_scheduler(self, scheduler: Any, step: int) -> None: ...

    def path(self, step: int) -> Path: ...

    def newest_complete(self, *, before: int | None = None) -> FoundCheckpoint: ...

    def set_aside(self, first: int) -> None: ...


class Meter(Protocol):
    """Token counts and their rate (`runtime.metrics.Throughput`)."""

    def count(self, tokens: int, trained: int) -> None: ...

    @property
    def seconds(self) -> float: ...

    def group_totals(self, names: tuple[str, ...], weights: Sequence[float], device: Any) -> Tensor: ...

    def group_losses(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]: ...

    def rates(self) -> dict[str, float]: ...

    def paused(self) -> AbstractContextManager[None]: ...

    def state(self) -> dict[str, Any]: ...

    def restore(self, state: dict[str, Any]) -> None: ...


class SaveProbe(Protocol):
    """Before a save: (live model, tokenizer, token ids of a document) to what its manifest is to say, and what looks at
    the written folder and raises where it is not what was trained (`models.verify_export.probe_save`)."""

    def __call__(
        self, model: nn.Module, tokenizer: Any, ids: list[int]
    ) -> tuple[dict[str, Any], Callable[[Path], None]]: ...


@runtime_checkable
class Holder(Protocol):
    """A callback that holds something of the process while it trains: signal handlers, torch's profiler."""

    def release(self) -> None: ...


@dataclass(frozen=True)
class FlowRules:
    """When to log, evaluate and save. Counts below 1 are shares of all steps; those per epoch follow the plan."""

    logging_steps: int
    eval_every: float | None
    evals_per_epoch: int | None
    save_every: float | None
    saves_per_epoch: int | None
    save_first_step: bool
    save_at_end: bool
    save_best: bool
    """Also after every evaluation that is better than all before it."""


@dataclass(frozen=True)
class ParallelParts:
    """What several processes add to a training."""

    arguments: dict[str, Any] = field(default_factory=dict)
    """Of the Accelerator."""
    gradient_ranks: int = 1
    """Processes over which the engine averages gradients."""
    is_sharded: bool = False
    """Parameters are in parts: what the simple engines do step by step is left to upstream."""
    part_of_row: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    """This process's tokens of a batch, where several share its rows."""


@dataclass
class TrainerParts:
    """Everything the trainer is made of. Built by `builder.HFCausalTrainerBuilder`."""

    packing: Batches
    forward: Forward
    loss: BatchLoss
    """What is minimised."""
    evaluation_loss: BatchLoss
    """The plain NLL."""
    scheduler: Callable[[Optimizer, int], LRScheduler]
    """(optimizer, total optimizer steps) to the learning-rate schedule."""
    optimizer: Callable[[nn.Module], Optimizer]
    evaluation_weights: Callable[[Optimizer | None], AbstractContextManager[None]]
    """Inside it the model holds the weights that are evaluated and exported (D12)."""
    add_rng: Callable[[Any], None]
    """Adds this process's generators to a draft."""
    load_rng: Callable[[Path], Any]
    checkpoint: Checkpoints
    offloading: Offloading
    meter: Meter
    flow: FlowRules
    watchdog: Watchdog
    """Judges every step."""
    seed: int
    fingerprint: str
    """Of the part of the config that a resumed run must agree with."""
    probe_save: SaveProbe | None = None
    """Where every save is loaded by a fresh process before it counts."""
    has_gradient_norm: bool = True
    """Not where gradients are used up one by one in the backward pass: there is no norm of all to log then."""
    parallel: ParallelParts = field(default_factory=ParallelParts)
    state_dict: Callable[[nn.Module], dict[str, Tensor]] | None = None
    """Gathers the full weights where they are sharded; None where `save_pretrained` sees them all."""
