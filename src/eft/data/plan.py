"""The plan: which samples are in which bin of which optimizer step, known before the run.

Its inputs are lengths, options and seed; ranks and micro-batches play no part, they share out a step's bins afterwards
(`balance.share_step`). So nothing is dropped or repeated, resuming is arithmetic, and every world size sees the same
steps.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import cached_property
from itertools import count
from typing import Any, Literal

import numpy as np

from eft.core.errors import DataError
from eft.core.hashing import hash_json
from eft.core.records import Float64Array, Int32Array, Int64Array, TokenDataset
from eft.data.like_steps import like_steps
from eft.data.packing import (
    PLANNER_VERSION,
    Choice,
    Packing,
    PackingRule,
    Strategy,
    choose,
    fewest_bins,
    likeness_in_bins,
    one_per_bin,
    pack,
    rule_of,
)

_CACHED_EPOCHS = 2
"""A loader that reads ahead is in one epoch while the trainer still asks about the one before."""


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step of the whole job.

    `bins`: sample ids per bin, int32 [documents] each. `weight`: Σ weight over the step's trainable tokens, the divisor
    of its loss (0 only where no sample of the step trains anything). `tokens`: real tokens, without padding.
    """

    step: int
    epoch: int
    bins: list[Int32Array]
    weight: float
    tokens: int


@dataclass(frozen=True)
class PlanOptions:
    """All that decides the bins of a step beside the data set."""

    strategy: Strategy | Literal["single"]
    """What was chosen, where `auto` was asked for; "single" is one sample per bin."""
    capacity: int
    shuffle: bool
    seed: int
    global_batch_size: int
    pool_samples: int | None = None
    bin_samples: int | None = None
    balance_buffer: int | None = None
    """Steps among which bins are sorted by cost; None: bins stay in random order."""
    cost_ratio: float | None = None
    """k of that cost, tokens + k·Σ len²; None without a buffer: the plan then knows nothing of the model."""
    planner_version: int = PLANNER_VERSION

    def effective(self) -> dict[str, Any]:
        """The options that matter: no seed without a shuffle, no capacity for bins of one sample."""
        options = asdict(self)
        if not self.shuffle and self.balance_buffer is None:
            options["seed"] = None
        if self.strategy == "single":
            options["capacity"] = None
        return options

    @property
    def rule(self) -> PackingRule | None:
        """How bins are packed; None: one sample per bin."""
        if self.strategy == "single":
            return None
        return PackingRule(self.strategy, self.pool_samples, self.bin_samples)


@dataclass(frozen=True)
class _Epoch:
    """What is kept of every epoch once it was packed: `tokens` int64 [steps], `weights` float64 [steps]."""

    num_bins: int
    tokens: Int64Array
    weights: Float64Array

    @property
    def num_steps(self) -> int:
        return len(self.tokens)


class Plan:
    """Steps, epochs and bins of a run; made by `build_plan`.

    `total_steps` are executed; `plan_steps` is what the epochs alone give, and differs where `max_steps` or
    `total_num_steps` decided (`decided_by`). `steps_per_epoch` and `epoch_ends` (global step after which each epoch is
    over; the last one is `total_steps`) describe what is executed, the last epoch perhaps in part.
    `fingerprint` changes when the samples of a step would; a longer or shorter run, ranks and micro-batches share it.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        options: PlanOptions,
        *,
        num_epochs: float,
        max_steps: int | None,
        total_num_steps: int | None,
        reason: str = "asked for",
        first_packing: Packing | None = None,
    ) -> None:
        """`first_packing`: that of epoch 0, where it is known already. Other arguments as for `build_plan`."""
        self.dataset = dataset
        self.options = options
        self.reason = reason
        self.capacity = options.capacity
        self.global_batch_size = options.global_batch_size
        self.num_epochs = num_epochs
        self._epochs: list[_Epoch] = []
        self._packings: dict[int, Packing] = {} if first_packing is None else {0: first_packing}
        self.fingerprint = hash_json({"dataset": dataset.fingerprint, **options.effective()})

        planned = self._steps_of_epochs(num_epochs)
        self.plan_steps = sum(planned)
        self.decided_by: Literal["max_steps", "total_num_steps", "num_epochs"] = "num_epochs"
        self.steps_per_epoch = planned
        if max_steps is not None:
            self.decided_by, self.steps_per_epoch = "max_steps", list(self._split(max_steps))
        elif total_num_steps is not None and total_num_steps > 0:
            self.decided_by, self.steps_per_epoch = "total_num_steps", list(self._split(total_num_steps))
        self.epoch_ends: list[int] = [int(end) for end in np.cumsum(self.steps_per_epoch)]
        self.total_steps = self.epoch_ends[-1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packings": {}}

    def step(self, step: int) -> StepPlan:
        """Step `step`, 0-based, below `total_steps`."""
        epoch, within = self._locate(step)
        packing = self._packing(epoch)
        first = within * self.global_batch_size
        stop = min(first + self.global_batch_size, packing.num_bins)
        record = self._epochs[epoch]
        return StepPlan(
            step=step,
            epoch=epoch,
            bins=[packing.bin(index) for index in range(first, stop)],
            weight=float(record.weights[within]),
            tokens=int(record.tokens[within]),
        )

    def epoch_at(self, step: int) -> float:
        """Epochs finished after `step` steps, with the share of the running one; `step` up to `total_steps`."""
        if step == 0:
            return 0.0
        epoch, within = self._locate(step - 1)
        return epoch + (within + 1) / self._epochs[epoch].num_steps

    def summary(self) -> dict[str, Any]:
        """What `plan.json` holds: numbers of the whole plan, of a step and of each executed epoch."""
        executed = [self._epochs[e].tokens[:steps] for e, steps in enumerate(self.steps_per_epoch)]
        step_tokens = np.concatenate(executed)
        tokens = int(np.sum(self.dataset.lengths, dtype=np.int64))
        bins = [self._epochs[e].num_bins for e in range(len(executed))]
        return {
            **asdict(self.options),
            "fingerprint": self.fingerprint,
            "num_epochs": self.num_epochs,
            "total_steps": self.total_steps,
            "plan_steps": self.plan_steps,
            "decided_by": self.decided_by,
            "samples_per_epoch": len(self.dataset.lengths),
            "tokens_per_epoch": tokens,
            "trainable_tokens_per_epoch": int(np.sum(self.dataset.trainable_counts, dtype=np.int64)),
            "weight_per_epoch": float(np.sum(self.dataset.weight_sums)),
            **self._packing_facts,
            "fill_percent": 100.0 * tokens * len(bins) / (sum(bins) * self.capacity),
            "fill_of_possible_percent": 100.0 * self._packing_facts["fewest_bins"] * len(bins) / sum(bins),
            "total_tokens": int(step_tokens.sum()),
            "tokens_per_step": {
                "min": int(step_tokens.min()),
                "median": float(np.median(step_tokens)),
                "max": int(step_tokens.max()),
            },
            "epochs": [
                {
                    "bins": bins[e],
                    "steps": self._epochs[e].num_steps,
                    "steps_executed": self.steps_per_epoch[e],
                    "tokens_executed": int(executed[e].sum()),
                    "free_tokens_in_bins": bins[e] * self.capacity - tokens,
                }
                for e in range(len(bins))
            ],
        }

    @cached_property
    def _packing_facts(self) -> dict[str, Any]:
        """What bins have in common over the epochs."""
        lengths, capacity, rule = self.dataset.lengths, self.capacity, self.options.rule
        fewest = len(lengths) if rule is None else fewest_bins(lengths, capacity, rule.bin_samples)
        return {
            "strategy_reason": self.reason,
            "fewest_bins": fewest,
            "likeness_in_bins": 0.0 if rule is None else likeness_in_bins(lengths, self._packing(0), capacity),
        }

    def _locate(self, step: int) -> tuple[int, int]:
        assert 0 <= step < self.total_steps, f"step {step} of {self.total_steps}"
        epoch = bisect.bisect_right(self.epoch_ends, step)
        return epoch, step - (self.epoch_ends[epoch] - self.steps_per_epoch[epoch])

    def _packing(self, epoch: int) -> Packing:
        if epoch not in self._packings:
            if len(self._packings) == _CACHED_EPOCHS:
                del self._packings[next(iter(self._packings))]
            self._packings[epoch] = _pack_epoch(self.dataset.lengths, self.options, epoch)
        return self._packings[epoch]

    def _epoch(self, epoch: int) -> _Epoch:
        while len(self._epochs) <= epoch:
            number = len(self._epochs)
            packing = self._packings.get(number) or _pack_epoch(self.dataset.lengths, self.options, number)
            if len(self._packings) < _CACHED_EPOCHS:
                self._packings[number] = packing
            starts = packing.offsets[: -1 : self.global_batch_size]
            tokens = np.add.reduceat(self.dataset.lengths[packing.order], starts, dtype=np.int64)
            weights = np.add.reduceat(self.dataset.weight_sums[packing.order], starts, dtype=np.float64)
            self._epochs.append(_Epoch(packing.num_bins, tokens, weights))
        return self._epochs[epoch]

    def _steps_of_epochs(self, num_epochs: float) -> list[int]:
        # Through the decimal text: 1.1 epochs of 10 steps are 11 steps, and 10 × (1.1 - 1) is above 1 in binary.
        whole, part = divmod(Fraction(str(num_epochs)), 1)
        steps = [self._epoch(epoch).num_steps for epoch in range(whole)]
        return [*steps, math.ceil(part * self._epoch(whole).num_steps)] if part else steps

    def _split(self, total_steps: int) -> Iterator[int]:
        left = total_steps
        for epoch in count():
            steps = min(left, self._epoch(epoch).num_steps)
            yield steps
            left -= steps
            if left == 0:
                return


def build_plan(
    dataset: TokenDataset,
    *,
    capacity: int,
    packed: bool,
    sequential: bool,
    shuffle: bool,
    global_batch_size: int,
    num_epochs: float,
    max_steps: int | None,
    seed: int,
    total_num_steps: int | None = None,
    strategy: Strategy | Literal["auto"] = "auto",
    bin_samples: int | None = None,
    balance_buffer: int | None = None,
    cost_ratio: float = 0.0,
) -> Plan:
    """The plan of a run. `capacity` in tokens per bin, `global_batch_size` in bins per step.

    A step is `global_batch_size` bins, the last of an epoch perhaps fewer. Steps: `max_steps`, else `total_num_steps`
    where above 0 (both run into further epochs, or stop short), else `num_epochs` > 0, whose fraction takes a prefix of
    the last epoch's steps. With `packed`, bins of at most `bin_samples` samples are packed by `strategy`, or in order
    if `sequential`. `balance_buffer` brings bins of like cost, by `cost_ratio`, into one step (`like_steps`).
    Raises DataError for an empty data set, one that trains nothing, samples that fit no bin.
    """
    assert global_batch_size >= 1
    assert num_epochs > 0
    assert max_steps is None or max_steps >= 1
    if len(dataset.lengths) == 0:
        raise DataError("the training data set is empty: no sample is left to plan a step with")
    if not np.any(dataset.weight_sums > 0):
        raise DataError(f"none of the {len(dataset.lengths)} training samples has a trainable token: check the masking")
    rule: PackingRule | None = None
    reason, first_packing = "one sample per bin", None
    if packed:
        wanted = "sequential" if sequential else strategy
        choice = _choice(dataset.lengths, capacity, seed, wanted, bin_samples, shuffle)
        rule, reason, first_packing = choice.rule, choice.reason, choice.packing
    options = PlanOptions(
        "single" if rule is None else rule.strategy,
        capacity,
        shuffle,
        seed,
        global_batch_size,
        pool_samples=None if rule is None else rule.pool_samples,
        bin_samples=None if rule is None else rule.bin_samples,
        balance_buffer=balance_buffer,
        # Two digits: a few parameters more (an adapter, a token) do not make another plan.
        cost_ratio=None if balance_buffer is None else float(f"{cost_ratio:.1e}"),
    )
    if first_packing is not None:
        first_packing = _steps_of_like_bins(first_packing, dataset.lengths, options, 0)
    return Plan(
        dataset,
        options,
        num_epochs=num_epochs,
        max_steps=max_steps,
        total_num_steps=total_num_steps,
        reason=reason,
        first_packing=first_packing,
    )


def _choice(
    lengths: Int32Array,
    capacity: int,
    seed: int,
    strategy: Strategy | Literal["auto"],
    bin_samples: int | None,
    shuffle: bool,
) -> Choice:
    """The rule for a strategy, with the first epoch's bins."""
    if strategy == "auto" and shuffle:
        return choose(lengths, capacity, seed, bin_samples=bin_samples)
    rule = rule_of("fit" if strategy == "auto" else strategy, len(lengths), bin_samples)
    reason = "follows the order of the samples where it can" if strategy == "auto" else "asked for"
    return Choice(rule, reason, pack(lengths, capacity, seed, 0, rule=rule, shuffle=shuffle))


def _pack_epoch(lengths: Int32Array, options: PlanOptions, epoch: int) -> Packing:
    rule = options.rule
    if rule is None:
        packing = one_per_bin(lengths, options.capacity, options.seed, epoch, shuffle=options.shuffle)
    else:
        packing = pack(lengths, options.capacity, options.seed, epoch, rule=rule, shuffle=options.shuffle)
    return _steps_of_like_bins(packing, lengths, options, epoch)


def _steps_of_like_bins(packing: Packing, lengths: Int32Array, options: PlanOptions, epoch: int) -> Packing:
    if options.balance_buffer is None:
        return packing
    assert options.cost_ratio is not None
    return like_steps(
        packing,
        lengths,
        step_bins=options.global_batch_size,
        buffer_steps=options.balance_buffer,
        cost_ratio=options.cost_ratio,
        seed=options.seed,
        epoch=epoch,
    )


@dataclass(frozen=True)
class EvalPlan:
    """A split in its own order, every sample once.

    `bins`: sample ids per bin, int32 [documents] each. `weight`: Σ weight over the split, the divisor of `eval_loss`.
    """

    bins: list[Int32Array]
    weight: float
    tokens: int


def build_eval_plan(dataset: TokenDataset, *, capacity: int, packed: bool) -> EvalPlan:
    """Bins of at most `capacity` tokens, in order (next-fit), or of one sample each.

    Next-fit costs nothing here: rows are not padded, so a gap in a bin is not computed. Raises DataError for an empty
    split and for samples that fit no bin.
    """
    if len(dataset.lengths) == 0:
        raise DataError("the evaluation data set is empty: no sample is left to evaluate")
    strategy: Literal["sequential", "single"] = "sequential" if packed else "single"
    packing = _pack_epoch(
        dataset.lengths, PlanOptions(strategy, capacity, shuffle=False, seed=0, global_batch_size=1), 0
    )
    return EvalPlan(
        bins=[packing.bin(index) for index in range(packing.num_bins)],
        weight=float(np.sum(dataset.weight_sums)),
        tokens=int(np.sum(dataset.lengths, dtype=np.int64)),
    )
