"""The costliest work of a run done once, measured, and undone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from eft.core.records import Int32Array, TokenDataset, TokenSample
from eft.data.batches import BatchSource
from eft.data.collators import Batch
from eft.data.loader import MicroBatch
from eft.data.plan import Plan
from eft.data.store import as_token_dataset
from eft.models.checkpointing import set_checkpointing
from eft.parallel.group import wait_for_all
from eft.preflight.settings import Setting
from eft.runtime.memory import Gauge, Peak, is_out_of_memory
from eft.runtime.offload import activation_offloading
from eft.runtime.rng import capture_rng, restore_rng
from eft.trainer.trainer import EftTrainer


@dataclass(frozen=True)
class Measured:
    """What one phase took."""

    available: int
    """Bytes that could be had when it began."""
    needed: int | None
    """Bytes that it took at its peak, with what the optimizer will keep; None: more than there were."""
    seconds: float
    what: dict[str, Any]
    """The batch: `step` (1-based), `bins`, `tokens`, `trained`."""
    rank: int = 0
    """The process."""

    @property
    def fits(self) -> bool:
        """Whether there was enough."""
        return self.needed is not None and self.needed <= self.available


class OutOfMemoryHere(Exception):  # noqa: N818  # what happened
    """This process has run out of memory in work that all do together."""

    def __init__(self, measured: Measured) -> None:
        super().__init__(measured)
        self.measured = measured


@dataclass(frozen=True)
class Exercise:
    """Tries phases of a trainer that is about to train. Used inside `unchanged`, so that nothing of it is left.

    Of several processes each tries its own, by the same calls in the same order.
    """

    trainer: EftTrainer
    gauge: Gauge
    pending: int
    """Bytes that the optimizer will keep and does not hold yet."""
    paused: Callable[[], AbstractContextManager[None]]
    """Inside, backward passes update nothing."""
    jointly: bool = False
    """The processes share weights or rows, so that no pass is one's own: each makes as many as the others."""

    @property
    def source(self) -> BatchSource:
        """Where batches come from; collated here, without workers."""
        source = self.trainer.parts.packing
        assert isinstance(source, BatchSource)
        return replace(source, num_workers=0, pin_memory=False)

    def training_step(self, setting: Setting) -> Measured:
        """Forward and backward passes of the costliest micro-batches that are left of the plan.

        Twice each where gradients are accumulated: the second time all gradients are there already.
        """
        plan = self.trainer.plan
        assert isinstance(plan, Plan)
        source = self.source
        sizes = {"micro_batch_size": setting.micro_batch_size, "accumulation": setting.accumulation}
        source = replace(source, share=replace(source.share, **sizes))
        loader = source.train_loader(plan, cursor=lambda: int(self.trainer.state.global_step))
        picks = _costliest(loader.sampler, plan.dataset, source.share.cost_ratio, setting.longest)
        picks = (picks * 2)[:2] if self.jointly else picks
        batches = [_collated(source, plan.dataset, loader.dataset, pick, setting.longest) for pick in picks]
        # Inside DDP a backward pass would wait for the others', who may have run out of memory.
        model = self.trainer.model_wrapped if self.jointly else self.trainer.model
        device = self.trainer.args.device

        def work() -> None:
            for batch in batches:
                for _ in range(min(setting.accumulation, 2)):
                    weight = self.trainer._get_num_items_in_batch([batch], device)
                    self.trainer.training_step(model, dict(batch), num_items_in_batch=weight)
                model.zero_grad(set_to_none=True)

        with self._running(setting), self.paused():
            return self._measure(work, _facts(picks[0], batches[0]))

    def evaluation(self, datasets: list[Any], batch_size: int) -> Measured:
        """The largest batch of the held-out splits, with the weights that are evaluated."""
        source = replace(self.source, eval_batch_size=batch_size)
        found = []
        for dataset in datasets:
            loader = source.eval_loader(dataset)
            pick = _costliest(loader.sampler, as_token_dataset(dataset), source.share.cost_ratio, None)[0]
            found.append((pick, loader.dataset[pick]))
        pick, batch = max(found, key=lambda entry: entry[1]["num_tokens"])

        def work() -> None:
            model, parts = self.trainer._evaluation_model(), self.trainer.parts
            with parts.evaluation_weights(self.trainer.optimizer), torch.no_grad():
                parts.evaluation_loss(model, self.trainer._prepare_inputs(dict(batch)))

        return self._measure(work, {**_facts(pick, batch), "step": None})

    def saving(self, save: Callable[[], None], gauge: Gauge, copies: int) -> Measured:
        """One save, in the memory of the host; `copies` are the bytes that it will copy first."""
        return self._measure(save, {}, gauge, copies)

    def _measure(
        self, work: Callable[[], None], what: dict[str, Any], gauge: Gauge | None = None, pending: int | None = None
    ) -> Measured:
        gauge, pending = gauge or self.gauge, self.pending if pending is None else pending
        gauge.clean()
        wait_for_all()  # before anyone looks at what is left, and again before anyone takes of it
        available, start, peak = gauge.available(), time.perf_counter(), Peak()
        wait_for_all()
        rank = int(self.trainer.args.process_index)
        try:
            with gauge.holding(pending), gauge.measured(available - pending, self.trainer.model) as peak:
                work()
            needed: int | None = peak.num_bytes + pending
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if self.jointly:
                # The others wait for this one in the middle of a pass; its end is theirs.
                raise OutOfMemoryHere(Measured(available, None, 0.0, what, rank)) from error
            needed = None
        # Outside of the handler: by now nothing holds the frames that hold the tensors.
        self.trainer.model_wrapped.zero_grad(set_to_none=True)
        gauge.clean()
        return Measured(available, needed, time.perf_counter() - start, what, rank)

    @contextmanager
    def _running(self, setting: Setting) -> Iterator[None]:
        """The trainer as `setting` would have it. Recomputation stays on: it is tried only before a run ends."""
        parts = self.trainer.parts
        set_checkpointing(self.trainer.model, setting.checkpointing)
        before = parts.offloading
        if setting.keys:
            parts.offloading = partial(activation_offloading, setting.offloads, self.trainer.args.device)
        try:
            yield
        finally:
            parts.offloading = before


@contextmanager
def unchanged(trainer: EftTrainer) -> Iterator[None]:
    """What happens inside leaves no trace in generators, modes and buffers of the model, token counts."""
    generators, counts = capture_rng(), trainer.parts.meter.state()
    modules = [_ModuleState(module) for module in trainer.model.modules()]
    try:
        with trainer.parts.meter.paused():
            yield
    finally:
        for module in modules:
            module.restore()
        trainer.parts.meter.restore(counts)
        restore_rng(generators)


class _ModuleState:
    """What a forward pass may leave in a module beside its parameters: its mode, counters, grown RoPE tables."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._scalars = {name: value for name, value in vars(module).items() if isinstance(value, bool | int | float)}
        self._buffers = [(name, buffer, buffer.clone()) for name, buffer in module.named_buffers(recurse=False)]

    @torch.no_grad()
    def restore(self) -> None:
        """Put it back."""
        for name, value in self._scalars.items():
            if vars(self._module).get(name) != value:
                setattr(self._module, name, value)
        for name, buffer, content in self._buffers:
            buffer.copy_(content)
            if getattr(self._module, name) is not buffer:
                setattr(self._module, name, buffer)


def _costliest(micro_batches: Any, dataset: TokenDataset, cost_ratio: float, longest: int | None) -> list[MicroBatch]:
    """The micro-batch of highest cost, tokens + k · Σ length², and that of most trained tokens, if it is another.

    A process that always has less to do than others may find nothing but dummies.
    """
    best: dict[str, tuple[float, MicroBatch]] = {}
    for micro_batch in micro_batches:
        ids = np.concatenate([np.zeros(0, np.int32), *micro_batch.bins])
        lengths = dataset.lengths[ids].astype(np.float64)
        if longest is not None:
            lengths = np.minimum(lengths, longest)
        scores = {
            "cost": float(lengths.sum() + cost_ratio * (lengths @ lengths)),
            "trained": float(dataset.trainable_counts[ids].sum()),
        }
        for name, score in scores.items():
            if name not in best or score > best[name][0]:
                best[name] = (score, micro_batch)
    first, second = best["cost"][1], best["trained"][1]
    return [first] if first is second else [first, second]


def _collated(source: BatchSource, dataset: TokenDataset, batches: Any, pick: MicroBatch, longest: int | None) -> Batch:
    batch: Batch = batches[pick]
    if longest is None:
        return batch
    # What the loader says of the step stays.
    facts = {name: value for name, value in batch.items() if not isinstance(value, Tensor)}
    return facts | source.collator([_cut_bin(dataset, ids, longest) for ids in pick.bins])


def _cut_bin(dataset: TokenDataset, ids: Int32Array, longest: int) -> list[TokenSample]:
    """The bin's documents up to `longest` tokens, the last one cut."""
    samples, left = [], longest
    for index in ids.tolist():
        if left <= 0:
            break
        sample = dataset.sample(index)
        weights = None if sample.weights is None else sample.weights[:left]
        samples.append(TokenSample(sample.input_ids[:left], sample.labels[:left], weights))
        left -= len(samples[-1].input_ids)
    return samples


def _facts(pick: MicroBatch, batch: Batch) -> dict[str, Any]:
    return {
        "step": pick.step + 1,
        "bins": len(pick.bins),
        "tokens": int(batch["num_tokens"]),
        "trained": int(batch["num_trained"]),
    }
