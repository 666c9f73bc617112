"""This rank's micro-batches, in plan order, for the whole run.

The plan stays in the main process: what travels to a worker is the list of sample ids of one micro-batch, so workers
start cheaply and never pack. Iterating consumes no random numbers but the loader's own: torch's `iter` would otherwise
draw a seed from the global generator, after it was restored, and shift every dropout mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from eft.core.records import Int32Array, TokenDataset
from eft.data.balance import RankShare
from eft.data.collators import Batch, Collator, add_groups
from eft.data.plan import EvalPlan, Plan
from eft.data.sample_set import SampleSet
from eft.data.stream_plan import StreamPlan, StreamStep


@dataclass(frozen=True)
class MicroBatch:
    """The sample ids of one forward pass; no bins stand for the dummy document."""

    step: int
    step_weight: float
    bins: list[Int32Array]
    step_tokens: int = 0
    """Real tokens of the whole step; not known in an evaluation."""


class TrainSampler(Sampler[MicroBatch]):
    """This rank's micro-batches from optimizer step `cursor()` on, read when the iteration starts.

    `len` is that of the whole run all the same: the trainer derives its total from it, and skips nothing itself.
    """

    def __init__(self, plan: Plan, share: RankShare, cursor: Callable[[], int]) -> None:
        assert plan.global_batch_size <= share.step_bins
        self._plan, self._share, self._cursor = plan, share, cursor

    def __len__(self) -> int:
        return self._plan.total_steps * self._share.accumulation

    def __iter__(self) -> Iterator[MicroBatch]:
        for number in range(self._cursor(), self._plan.total_steps):
            step = self._plan.step(number)
            for bins in self._share.of(step, self._plan.dataset.lengths):
                yield MicroBatch(number, step.weight, bins, step.tokens)


@dataclass(frozen=True)
class StreamMicroBatch:
    """The samples themselves of one forward pass, as numbers of `step.samples`."""

    step: StreamStep
    bins: list[Int32Array]


class StreamSampler(Sampler[StreamMicroBatch]):
    """As `TrainSampler`, over a stream. Every rank makes the same steps and takes its share of each."""

    def __init__(self, plan: StreamPlan, share: RankShare, cursor: Callable[[], int]) -> None:
        assert plan.global_batch_size <= share.step_bins
        self._plan, self._share, self._cursor = plan, share, cursor

    def __len__(self) -> int:
        return self._plan.total_steps * self._share.accumulation

    def __iter__(self) -> Iterator[StreamMicroBatch]:
        for step in self._plan.steps_from(self._cursor()):
            for bins in self._share.of(step.plan, step.lengths):
                yield StreamMicroBatch(step, bins)


class EvalSampler(Sampler[MicroBatch]):
    """This rank's share of an evaluation: batches of `batch_size` bins go to the ranks in turn.

    Every rank gets the same number; the last ones are dummies where the batches do not come out even.
    """

    def __init__(self, plan: EvalPlan, *, rank: int, world_size: int, batch_size: int) -> None:
        assert 0 <= rank < world_size
        self._plan = plan
        self._rank = rank
        self._world_size = world_size
        self._batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self._plan.bins) // (self._batch_size * self._world_size))

    def __iter__(self) -> Iterator[MicroBatch]:
        for turn in range(len(self)):
            first = (turn * self._world_size + self._rank) * self._batch_size
            yield MicroBatch(turn, self._plan.weight, self._plan.bins[first : first + self._batch_size])


class _MicroBatches(Dataset[Batch]):
    """Fetches and collates; the index is the micro-batch itself. Pickles to a worker as the data set does."""

    def __init__(self, dataset: TokenDataset, collator: Collator) -> None:
        self._dataset = dataset
        self._collator = collator
        self._names: tuple[str, ...] = ()
        if isinstance(dataset, SampleSet) and len(dataset.group_names) > 1:
            self._names, self._owners = dataset.group_names, dataset.groups()

    def __getitem__(self, micro_batch: MicroBatch) -> Batch:
        batch = self._collator([[self._dataset.sample(i) for i in ids.tolist()] for ids in micro_batch.bins])
        batch["step"] = micro_batch.step
        batch["step_weight"] = micro_batch.step_weight
        batch["step_tokens"] = micro_batch.step_tokens
        if self._names:
            ids = np.concatenate([np.zeros(0, np.int32), *micro_batch.bins])
            counts, weights = self._dataset.trainable_counts[ids], self._dataset.weight_sums[ids]
            add_groups(batch, self._names, self._owners[ids], counts, weights)
        return batch


class _StreamBatches(Dataset[Batch]):
    """Collates what a `StreamSampler` gives."""

    def __init__(self, plan: StreamPlan, collator: Collator) -> None:
        self._names = tuple(source.name for source in plan.dataset.sources)
        self._collator = collator

    def __getitem__(self, micro_batch: StreamMicroBatch) -> Batch:
        step = micro_batch.step
        batch = self._collator([[step.samples[i] for i in ids.tolist()] for ids in micro_batch.bins])
        batch["step"] = step.plan.step
        batch["step_weight"] = step.plan.weight
        batch["step_tokens"] = step.plan.tokens
        if len(self._names) > 1:
            ids = np.concatenate([np.zeros(0, np.int32), *micro_batch.bins])
            add_groups(batch, self._names, step.owners[ids], step.trained[ids], step.weights[ids])
        return batch


class _Loader(DataLoader[Batch]):
    """torch's loader; without workers the batches come straight from the data set, or from a thread that pins them."""

    def __iter__(self) -> Any:
        if self.num_workers:
            return super().__iter__()
        batches = (self.dataset[micro_batch] for micro_batch in self.sampler)
        return _one_ahead(map(_pinned, batches)) if self.pin_memory else batches


def _one_ahead(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same batches, each fetched by a thread while the one before is in use."""
    with ThreadPoolExecutor(1, thread_name_prefix="eft-batches") as thread:
        following = thread.submit(next, batches, None)
        while (batch := following.result()) is not None:
            following = thread.submit(next, batches, None)
            yield batch


def _pinned(batch: Batch) -> Batch:
    """The batch in page-locked memory, from where a copy to the device runs beside the computation."""
    return {name: value.pin_memory() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def build_train_loader(
    dataset: TokenDataset,
    plan: Plan,
    collator: Collator,
    *,
    share: RankShare,
    cursor: Callable[[], int],
    num_workers: int = 0,
    pin_memory: bool = False,
    prefetch_factor: int = 2,
) -> DataLoader[Batch]:
    """One loader for the whole run.

    Each item is a collator's batch plus `step` int, `step_weight` float (Σ weight of the optimizer step over all ranks)
    and `step_tokens` int (its real tokens). `len` is always `plan.total_steps` × accumulation; an iteration starts at
    optimizer step `cursor()` and yields what remains. `prefetch_factor`: batches a worker holds ready. Without workers,
    and with `pin_memory`, a thread has the next batch ready.
    """
    sampler = TrainSampler(plan, share, cursor)
    return _loader(_MicroBatches(dataset, collator), sampler, num_workers, pin_memory, prefetch_factor)


def build_stream_loader(
    plan: StreamPlan,
    collator: Collator,
    *,
    share: RankShare,
    cursor: Callable[[], int],
    pin_memory: bool = False,
) -> DataLoader[Batch]:
    """As `build_train_loader`, over a stream, whose rows are tokenised by threads or processes of its own."""
    return _loader(_StreamBatches(plan, collator), StreamSampler(plan, share, cursor), 0, pin_memory, 2)


def build_eval_loader(
    dataset: TokenDataset,
    eval_plan: EvalPlan,
    collator: Collator,
    *,
    rank: int,
    world_size: int,
    batch_size: int,
    num_workers: int = 0,
    pin_memory: bool = False,
    prefetch_factor: int = 2,
) -> DataLoader[Batch]:
    """As the training loader, over an evaluation split; `step_weight` is Σ weight of the whole split on every batch."""
    sampler = EvalSampler(eval_plan, rank=rank, world_size=world_size, batch_size=batch_size)
    return _loader(_MicroBatches(dataset, collator), sampler, num_workers, pin_memory, prefetch_factor)


def _loader(
    batches: Dataset[Batch], sampler: Sampler[Any], num_workers: int, pin_memory: bool, prefetch_factor: int
) -> DataLoader[Batch]:
    return _Loader(
        batches,
        batch_size=None,
        sampler=sampler,
        collate_fn=_as_is,
        num_workers=num_workers,
        pin_memory=pin_memory,
        prefetch_factor=prefetch_factor if num_workers else None,
        generator=torch.Generator().manual_seed(0),
    )


def _as_is(batch: Any) -> Any:
    """The collator has done it; torch's default would walk through every batch."""
    return batch
