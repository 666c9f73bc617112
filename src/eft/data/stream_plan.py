"""The plan of a run over a stream: how many steps, and the bins of each as it comes.

A step is `global_batch_size` bins, taken from window after window; ranks and micro-batches play no part, every rank
makes the same steps and takes its share. So the number of steps is known, every world size sees the same steps, and a
step is found again from a saved mark: the window that it starts in is made anew, and no earlier one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from eft.core.errors import ConfigError
from eft.core.hashing import hash_json
from eft.core.records import Float64Array, Int32Array, TokenSample
from eft.data.ledger import Ledger, Portion, SourceLedger
from eft.data.plan import StepPlan
from eft.data.stream import StreamDataset, StreamState, Window, WindowFacts, WindowRule, windows

STREAM_VERSION = 1
"""Part of the fingerprint: raise it whenever the same rows would come in other steps."""
_KEPT_MARKS = 64
"""A loader is a step or two ahead of the training."""


@dataclass(frozen=True)
class StreamStep:
    """One optimizer step of the whole job."""

    plan: StepPlan
    """Its bins hold numbers of `samples`."""
    samples: list[TokenSample]
    lengths: Int32Array
    """[samples], as the others."""
    trained: Int32Array
    weights: Float64Array
    owners: Int32Array


@dataclass(frozen=True)
class Used:
    """What was trained of a source."""

    samples: int = 0
    tokens: int = 0
    trained: int = 0


@dataclass(frozen=True)
class _Mark:
    """The stream before a step."""

    window: StreamState
    """Before the window that holds the step's first bin."""
    first_bin: int
    used: tuple[Used, ...]
    facts: WindowFacts | None = None
    """Of that window, once it was made."""
    rest: tuple[tuple[int, int], ...] = ()
    """(samples, tokens) per source of that window that the steps before did not use."""
    saved_ledger: Ledger | None = None
    """Of a mark that another process made."""

    def to_json(self) -> dict[str, Any]:
        return {
            "window": self.window.to_json(),
            "first_bin": self.first_bin,
            "used": [[each.samples, each.tokens, each.trained] for each in self.used],
            "ledger": self.ledger().to_json(),
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> _Mark:
        used = tuple(Used(*each) for each in value["used"])
        saved = Ledger.from_json(value["ledger"])
        return cls(StreamState.from_json(value["window"]), value["first_bin"], used, saved_ledger=saved)

    def ledger(self) -> Ledger:
        if self.saved_ledger is not None:
            return self.saved_ledger
        if self.facts is None:
            return Ledger([source.account for source in self.window.sources])
        return Ledger([_account(self, self.facts, number) for number in range(len(self.used))])


class StreamPlan:
    """Steps of a run over a stream; what `Plan` is to prepared data."""

    def __init__(
        self,
        dataset: StreamDataset,
        rule: WindowRule,
        global_batch_size: int,
        total_steps: int,
        decided_by: Literal["max_steps", "total_num_steps", "streaming_token_budget"],
    ) -> None:
        """`global_batch_size` in bins per step."""
        self.dataset = dataset
        self.rule = rule
        self.capacity = rule.capacity
        self.global_batch_size = global_batch_size
        self.total_steps = self.plan_steps = total_steps
        self.decided_by = decided_by
        self.epoch_ends = [total_steps]
        self.fingerprint = hash_json(
            {
                "stream": dataset.fingerprint,
                "version": STREAM_VERSION,
                "batch": global_batch_size,
                **{name: value for name, value in rule.__dict__.items() if not name.endswith("_rows")},
            }
        )
        self._tokens = np.zeros(total_steps, np.int64)
        used = tuple(Used() for _ in dataset.sources)
        self._marks = {0: _Mark(StreamState.before(dataset), 0, used)}

    def epoch_at(self, step: int) -> float:
        """The share of the budget that is done: a stream has no other epochs."""
        return step / self.total_steps

    def steps_from(self, number: int) -> Iterator[StreamStep]:
        """Step `number` (0-based) and those after it; its mark must be known, by reading up to it or by `restore`."""
        mark = self._marks[number]
        used, first = list(mark.used), mark.first_bin
        with closing(windows(self.dataset, self.rule, mark.window)) as made:
            window = next(made)
            for step in range(number, self.total_steps):
                chosen: list[tuple[Window, Int32Array]] = []
                while len(chosen) < self.global_batch_size:
                    if first == window.packing.num_bins:
                        window, first = next(made), 0
                    chosen.append((window, window.packing.bin(first)))
                    first += 1
                ready = _step(step, chosen)
                self._tokens[step] = ready.plan.tokens
                used = [_add(each, ready, source) for source, each in enumerate(used)]
                rest = tuple(window.rest(first, len(used)))
                self._mark(step + 1, _Mark(window.facts.start, first, tuple(used), window.facts, rest))
                yield ready

    def _mark(self, step: int, mark: _Mark) -> None:
        self._marks[step] = mark
        for old in [number for number in self._marks if number < step - _KEPT_MARKS]:
            del self._marks[old]

    def step(self, step: int) -> StepPlan:
        """What stays known of a step: its tokens; 0 for a step before a resume."""
        return StepPlan(step, 0, [], 0.0, int(self._tokens[step]))

    def state_at(self, step: int) -> dict[str, Any]:
        """What `restore` needs to go on after `step` steps; JSON-able."""
        return self._marks[step].to_json()

    def restore(self, step: int, state: dict[str, Any]) -> None:
        """Know where step `step` begins, from another process's `state_at(step)`."""
        self._marks[step] = _Mark.from_json(state)

    def ledger_at(self, step: int) -> Ledger:
        """Where the rows and tokens read so far went, after `step` steps: trained, dropped, or waiting.

        What is read and not trained is counted as dropped, `not_reached`. Rows are counted in every round anew.
        """
        return self._marks[step].ledger()

    def summary(self) -> dict[str, Any]:
        """What `plan.json` holds."""
        capacity = self.global_batch_size * self.capacity
        return {
            "streaming": True,
            "fingerprint": self.fingerprint,
            "total_steps": self.total_steps,
            "plan_steps": self.plan_steps,
            "decided_by": self.decided_by,
            "capacity": self.capacity,
            "global_batch_size": self.global_batch_size,
            "capacity_tokens_per_step": capacity,
            "capacity_tokens": capacity * self.total_steps,
            "buffer_samples": self.rule.buffer_samples,
            "strategy": "single" if self.rule.strategy is None else self.rule.strategy,
            "seed": self.rule.seed,
            "shares": {source.name: source.share for source in self.dataset.sources},
        }


def build_stream_plan(
    dataset: StreamDataset,
    rule: WindowRule,
    *,
    global_batch_size: int,
    max_steps: int | None,
    token_budget: int | None,
    total_num_steps: int | None = None,
) -> StreamPlan:
    """The plan of a run: `max_steps`, else `total_num_steps` where above 0, else what `token_budget` gives.

    Raises ConfigError where none of them is set.
    """
    if max_steps is not None:
        return StreamPlan(dataset, rule, global_batch_size, max_steps, "max_steps")
    if total_num_steps:
        return StreamPlan(dataset, rule, global_batch_size, total_num_steps, "total_num_steps")
    if token_budget is None:
        raise ConfigError("streaming: a stream has no end: set `streaming_token_budget` (such as 2e9) or `max_steps`")
    steps = stream_steps(token_budget, global_batch_size, rule.capacity)
    return StreamPlan(dataset, rule, global_batch_size, steps, "streaming_token_budget")


def stream_steps(token_budget: int, global_batch_size: int, capacity: int) -> int:
    """ceil(budget ÷ capacity of a step), in integers."""
    return -(-token_budget // (global_batch_size * capacity))


def _step(number: int, chosen: list[tuple[Window, Int32Array]]) -> StreamStep:
    sizes = [len(ids) for _, ids in chosen]
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
    bins = [np.arange(start, start + size, dtype=np.int32) for start, size in zip(starts, sizes, strict=False)]
    lengths, trained, weights, owners = (
        np.concatenate([getattr(window, name)[ids] for window, ids in chosen])
        for name in ("lengths", "trained", "weights", "owners")
    )
    samples = [window.samples[index] for window, ids in chosen for index in ids.tolist()]
    # Not numpy's sum, whose order of additions depends on the length: this one is exact.
    plan = StepPlan(number, 0, bins, math.fsum(weights.tolist()), int(lengths.sum(dtype=np.int64)))
    return StreamStep(plan, samples, lengths, trained, weights, owners)


def _add(used: Used, step: StreamStep, source: int) -> Used:
    mine = step.owners == source
    return Used(
        used.samples + int(mine.sum()),
        used.tokens + int(step.lengths[mine].sum(dtype=np.int64)),
        used.trained + int(step.trained[mine].sum(dtype=np.int64)),
    )


def _account(mark: _Mark, facts: WindowFacts, number: int) -> SourceLedger:
    account = SourceLedger.from_json(facts.accounts[number].to_json())
    used, waiting, rest = mark.used[number], facts.waiting[number], mark.rest[number]
    account.samples, account.trainable, account.context = used.samples, used.trained, used.tokens - used.trained
    account.rounds = facts.rounds[number]
    left = Portion(waiting[0] + rest[0], waiting[1] + rest[1])
    if left.rows:
        account.dropped["not_reached"] = left
    return account
