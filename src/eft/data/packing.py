"""Which samples share a bin: pure arithmetic on lengths, the same on every machine for the same (seed, epoch).

- "fit" is fit-close. Samples come as a shuffled stream through a pool of pending ones; a bin takes them in stream order
  while they fit, then closes its gap with the largest pending sample that fits, until none does.
- "stream" puts each sample of the stream into the fullest of a few hundred open bins that has room (best fit).
- "dense" is best-fit-decreasing: the fewest bins, but samples of like length come together, so that steps are no longer
  random draws.
- "sequential" is next-fit: a bin ends where the next sample of the stream does not fit.

`choose` takes the fullest of those that keep bins random.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from eft.core.errors import DataError
from eft.core.records import Float64Array, Int32Array, Int64Array
from eft.data import packing_kernels as kernels

PLANNER_VERSION = 2
"""Part of the plan's fingerprint: raise it whenever the same inputs would give other bins."""

Strategy = Literal["fit", "stream", "dense", "sequential"]

GOOD_SHARE = 0.999
"""Fewest possible bins ÷ bins from which no other strategy is looked for."""
LIKENESS_TOLERANCE = 0.05
"""By how much the likeness of samples in a bin may differ from that in a random order (see `kernels.likeness`)."""

_POOL_MAX = 4096
_POOL_MIN = 128
_POOL_SHARE = 16
_OPEN_BINS = 256
_MANY = 500_000


@dataclass(frozen=True)
class Packing:
    """Bin `b` holds the samples `order[offsets[b]:offsets[b + 1]]`.

    `order` int32 [samples] is a permutation; `offsets` int64 [bins + 1], strictly increasing.
    """

    order: Int32Array
    offsets: Int64Array

    @property
    def num_bins(self) -> int:
        return len(self.offsets) - 1

    def bin(self, index: int) -> Int32Array:
        """Sample ids of one bin, int32 [documents], a view of `order`."""
        return self.order[self.offsets[index] : self.offsets[index + 1]]


@dataclass(frozen=True)
class PackingRule:
    """A strategy with its numbers."""

    strategy: Strategy
    pool_samples: int | None = None
    """Pending samples that "fit" chooses from; None for the others."""
    bin_samples: int | None = None
    """Most samples of a bin; None: as many as fit."""

    @property
    def name(self) -> str:
        """`fit (pool of 4,096)`."""
        return self.strategy if self.pool_samples is None else f"{self.strategy} (pool of {self.pool_samples:,})"


def rule_of(strategy: Strategy, num_samples: int, bin_samples: int | None = None) -> PackingRule:
    """The rule of a strategy that was asked for by name, over `num_samples` samples."""
    return PackingRule(strategy, _pool_samples(num_samples) if strategy == "fit" else None, bin_samples)


def pack(
    lengths: Int32Array, capacity: int, seed: int, epoch: int, *, rule: PackingRule, shuffle: bool = True
) -> Packing:
    """Every sample into exactly one bin of at most `capacity` tokens.

    `lengths` int32 [samples]. With `shuffle` the stream is a permutation drawn from (seed, epoch) and, but for
    "sequential", so is the order of the bins: the last ones made are atypical. "dense" sorts by length whatever the
    stream: `shuffle` only decides between samples of one length. Raises DataError naming the first sample that is empty
    or longer than a bin.
    """
    check_lengths(lengths, capacity)
    stream = _stream(len(lengths), seed, epoch, shuffle)
    order, num_bins = _arrange(lengths, stream, capacity, rule)
    if shuffle and rule.strategy != "sequential":
        return _in_random_order(order, stream, num_bins, seed, epoch)
    return Packing(order, kernels.take_marks(order, num_bins))


def _in_random_order(order: Int32Array, room: Int32Array, num_bins: int, seed: int, epoch: int) -> Packing:
    """The bins of a marked order, shuffled; written into `room` int32 [samples]."""
    starts = kernels.bin_starts(order, num_bins)
    kernels.shuffle_in_place(starts, random_key(seed, epoch, stage=1))
    kernels.lay_out(order, starts, room)
    del order, starts
    return Packing(room, kernels.take_marks(room, num_bins))


def one_per_bin(lengths: Int32Array, capacity: int, seed: int, epoch: int, *, shuffle: bool = True) -> Packing:
    """No packing: a bin is one sample. Arguments and errors as for `pack`."""
    check_lengths(lengths, capacity)
    return Packing(_stream(len(lengths), seed, epoch, shuffle), np.arange(len(lengths) + 1, dtype=np.int64))


def check_lengths(lengths: Int32Array, capacity: int) -> None:
    """Raises DataError naming the first sample that is empty or does not fit into a bin."""
    if len(lengths) == 0 or (lengths.min() >= 1 and lengths.max() <= capacity):
        return
    wrong = np.flatnonzero((lengths < 1) | (lengths > capacity))
    index = int(wrong[0])
    raise DataError(
        f"sample {index} has {int(lengths[index])} tokens; a bin takes 1 to {capacity} (`sequence_len`). "
        f"{len(wrong)} of {len(lengths)} samples are out of range: drop or truncate them when preparing the data, "
        f"or raise `sequence_len`"
    )


def fewest_bins(lengths: Int32Array, capacity: int, bin_samples: int | None = None) -> int:
    """A lower bound on the bins of any packing, in O(samples + capacity): L2 of Martello and Toth.

    S. Martello, P. Toth: Lower bounds and reduction procedures for the bin packing problem, Discrete Applied
    Mathematics 28 (1990) 59-70. For a threshold K ≤ capacity / 2: a sample above capacity - K shares its bin with none
    of at least K tokens; one above capacity / 2 has a bin of its own too, but with room; what the samples from K to
    capacity / 2 have beyond that room takes further bins. L2 is the largest of these numbers over all K. `bin_samples`
    adds samples ÷ limit.
    """
    counts = kernels.histogram(lengths, capacity)
    numbers = np.concatenate([[0], np.cumsum(counts)])  # [x]: samples shorter than x
    tokens = np.concatenate([[0], np.cumsum(counts * np.arange(capacity + 1))])
    half = capacity // 2
    threshold = np.arange(half + 1)
    alone = numbers[-1] - numbers[capacity - threshold + 1]
    roomy = numbers[capacity - threshold + 1] - numbers[half + 1]
    room = roomy * capacity - (tokens[capacity - threshold + 1] - tokens[half + 1])
    beyond = np.maximum(0, tokens[half + 1] - tokens[threshold] - room)
    bound = int((alone + roomy + -(-beyond // capacity)).max())
    return bound if bin_samples is None else max(bound, -(-len(lengths) // bin_samples))


def _log_lengths(capacity: int) -> Float64Array:
    """Log of every length, float64 [capacity + 1]; of 0 it is 0."""
    return np.log(np.maximum(np.arange(capacity + 1), 1).astype(np.float64))


def likeness_in_bins(lengths: Int32Array, packing: Packing, capacity: int) -> float:
    """How alike samples of a bin are in length, beyond strangers: 0 not at all, 1 equal (see `kernels.likeness`)."""
    marked = packing.order.copy()
    last = packing.offsets[1:] - 1
    marked[last] = ~marked[last]
    return float(kernels.likeness(lengths, marked, packing.num_bins, _log_lengths(capacity)))


@dataclass(frozen=True)
class Choice:
    """The rule that a plan follows, and why; `packing` is that of epoch 0, which was made to find out."""

    rule: PackingRule
    reason: str
    packing: Packing


@dataclass(frozen=True)
class _Trial:
    rule: PackingRule
    bins: int
    excess: float
    """Likeness of samples in a bin, less that in a random order."""
    is_random: bool

    @property
    def rank(self) -> tuple[bool, float]:
        """The smaller the better: the fullest of those that are random, else the least unlike."""
        return (False, self.bins) if self.is_random else (True, abs(self.excess))

    def text(self, fewest: int) -> str:
        left_out = "" if self.is_random else f" but likeness {self.excess:+.2f}"
        return f"{self.rule.name} {100 * fewest / self.bins:.2f} %{left_out}"


def choose(lengths: Int32Array, capacity: int, seed: int, *, bin_samples: int | None) -> Choice:
    """The strategy for these lengths: the fullest one that keeps bins random draws, tried on the bins of epoch 0.

    "fit" where it takes at most 0.1 % or one bin more than any packing must; else the best of "fit", "fit" with smaller
    pools (short samples last longer) and, up to half a million samples, "stream" (beyond, the end of the stream, which
    it fills better, hardly counts). Random: `kernels.likeness` is within 0.05 of next-fit's, or two standard errors
    where bins are few. Lengths, capacity, seed and limit decide, so a resumed run chooses the same. Errors as for
    `pack`.
    """
    check_lengths(lengths, capacity)
    rule = rule_of("fit", len(lengths), bin_samples)
    contest = _Contest(lengths, capacity, seed, bin_samples)
    trial = contest.enter(rule)
    fewest = fewest_bins(lengths, capacity, bin_samples)
    if trial.is_random and trial.bins <= max(fewest + 1, fewest / GOOD_SHARE):
        return contest.end("bins are random draws, and nearly none could be saved", seed)
    while rule.pool_samples is not None and rule.pool_samples >= 2 * _POOL_MIN:
        rule = replace(rule, pool_samples=rule.pool_samples // 2)
        smaller = contest.enter(rule)
        if smaller.bins >= trial.bins:
            break
        trial = smaller
    if len(lengths) < _MANY:
        contest.enter(rule_of("stream", len(lengths), bin_samples))
    tried = ", ".join(trial.text(fewest) for trial in contest.trials)
    return contest.end(f"the fullest whose bins are random draws ({tried} of what is possible)", seed)


class _Contest:
    """Rules tried on one stream. Only the bins of the last one are kept: 4 bytes a sample more would be the peak."""

    def __init__(self, lengths: Int32Array, capacity: int, seed: int, bin_samples: int | None) -> None:
        self.trials: list[_Trial] = []
        self._lengths, self._capacity = lengths, capacity
        self._logs = _log_lengths(capacity)
        self._stream = _stream(len(lengths), seed, 0, True)
        limit = bin_samples or len(lengths)
        self._random = kernels.likeness_of_stream(lengths, self._stream, capacity, limit, self._logs)
        self._order: Int32Array | None = None

    def enter(self, rule: PackingRule) -> _Trial:
        self._order = None
        order, bins = _arrange(self._lengths, self._stream, self._capacity, rule)
        excess = kernels.likeness(self._lengths, order, bins, self._logs) - self._random
        tolerance = max(LIKENESS_TOLERANCE, 2.0 / math.sqrt(bins))
        trial = _Trial(rule, bins, excess, abs(excess) <= tolerance)
        self.trials.append(trial)
        self._order = order
        return trial

    def end(self, reason: str, seed: int) -> Choice:
        best = min(self.trials, key=lambda trial: trial.rank)
        order, self._order = self._order, None
        if best is not self.trials[-1]:
            del order
            order, _ = _arrange(self._lengths, self._stream, self._capacity, best.rule)
        assert order is not None
        return Choice(best.rule, reason, _in_random_order(order, self._stream, best.bins, seed, 0))


def _arrange(lengths: Int32Array, stream: Int32Array, capacity: int, rule: PackingRule) -> tuple[Int32Array, int]:
    """A marked order (see `packing_kernels`) and its number of bins."""
    order = np.empty_like(stream)
    lengths = np.ascontiguousarray(lengths, np.int32)
    bin_samples = rule.bin_samples or max(1, len(stream))
    if rule.strategy == "dense":
        return order, kernels.dense(lengths, stream, capacity, bin_samples, order)
    if rule.strategy == "stream":
        return order, kernels.stream_best_fit(lengths, stream, capacity, bin_samples, _OPEN_BINS, order)
    # A pool of one is next-fit: when the only pending sample does not fit, nothing else can close the gap.
    return order, kernels.fit_close(lengths, stream, capacity, bin_samples, rule.pool_samples or 1, order)


def _pool_samples(num_samples: int) -> int:
    """How many pending samples "fit" chooses from.

    More fills better, up to the point where the short samples are used up early and the last bins stay half empty:
    2,000 samples, 70 % short and 30 % around half a bin, fill 97.0 % with a pool of 128 and 93.2 % with all of them.
    """
    return min(_POOL_MAX, max(_POOL_MIN, num_samples // _POOL_SHARE))


def random_key(seed: int, epoch: int, stage: int) -> np.uint64:
    """64 bits for one shuffle (`stage`) of an epoch.

    SeedSequence is one of the few parts of numpy.random whose output is frozen across versions.
    """
    return np.uint64(np.random.SeedSequence([seed, epoch, stage]).generate_state(1, np.uint64)[0])


def _stream(num_samples: int, seed: int, epoch: int, shuffle: bool) -> Int32Array:
    stream = np.arange(num_samples, dtype=np.int32)
    if shuffle:
        kernels.shuffle_in_place(stream, random_key(seed, epoch, stage=0))
    return stream
