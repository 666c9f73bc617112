"""The loops of packing, compiled by numba: plain arithmetic on lengths, the same on every machine.

All work on `lengths` int32 [samples] and `stream` int32 [samples], a permutation of the sample ids, and fill `order`
int32 [samples]: bin after bin, the last sample of each bin marked by being stored as its complement (`~id`, below 0).
So 12 bytes a sample are enough beside the lengths: stream, order and the links of one list.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

from eft.core.records import Float64Array, Int32Array, Int64Array

UInt64Array = npt.NDArray[np.uint64]

_WORD_BITS = 6
_WORD_MASK = 63
_NONE = -1
_TAKEN = -2
_ONE, _ALL = np.uint64(1), np.uint64(0xFFFFFFFFFFFFFFFF)
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_SHIFT_1, _SHIFT_2, _SHIFT_3 = np.uint64(30), np.uint64(27), np.uint64(31)

_SHORTAGE = 2
"""Mean length of the pending samples, in those of the data, from which short ones are kept back."""


@njit(cache=True)
def shuffle_in_place(items: Int32Array, key: np.uint64) -> None:
    """Fisher-Yates in place, driven by splitmix64: numpy may change its own shuffle, a resumed run may not."""
    state = key
    for i in range(len(items) - 1, 0, -1):
        state += _GOLDEN
        z = (state ^ (state >> _SHIFT_1)) * _MIX_1
        z = (z ^ (z >> _SHIFT_2)) * _MIX_2
        z = z ^ (z >> _SHIFT_3)
        j = np.int64(z % np.uint64(i + 1))
        items[i], items[j] = items[j], items[i]


@njit(cache=True)
def histogram(lengths: Int32Array, capacity: int) -> Int64Array:
    """Samples of each length, int64 [capacity + 1]."""
    counts = np.zeros(capacity + 1, np.int64)
    for length in lengths:
        counts[length] += 1
    return counts


@njit(cache=True)
def _index_words(capacity: int) -> UInt64Array:
    """An empty set of the numbers 1 to `capacity`, a bit each: which of the lists by length hold anything."""
    return np.zeros((capacity >> _WORD_BITS) + 1, np.uint64)


@njit(cache=True)
def _insert(words: UInt64Array, index: int) -> None:
    words[index >> _WORD_BITS] |= _ONE << np.uint64(index & _WORD_MASK)


@njit(cache=True)
def _remove(words: UInt64Array, index: int) -> None:
    words[index >> _WORD_BITS] &= ~(_ONE << np.uint64(index & _WORD_MASK))


@njit(cache=True)
def _greatest(words: UInt64Array, most: int) -> np.int64:
    """The greatest number of the set that is at most `most` ≥ 0, 0 when there is none."""
    at = most >> _WORD_BITS
    word = words[at] & (_ALL >> np.uint64(_WORD_MASK - (most & _WORD_MASK)))
    while word == 0 and at > 0:
        at -= 1
        word = words[at]
    bit = np.int64(0)
    for step in (32, 16, 8, 4, 2, 1):
        if word >> np.uint64(step):
            word >>= np.uint64(step)
            bit += step
    return np.int64((at << _WORD_BITS) + bit if word else 0)


@njit(cache=True)
def fit_close(
    lengths: Int32Array, stream: Int32Array, capacity: int, bin_samples: int, pool_samples: int, order: Int32Array
) -> int:
    """Fills `order`, returns the number of bins. With a pool of one this is next-fit.

    A bin takes pending samples in stream order while they fit, then closes its gap with the largest that fits, until
    none does or it holds `bin_samples`. Pending samples wait in one first-in-first-out list per length (`first`,
    `last`, linked by `following`), so the oldest of all is also the first of its list, and taking either it or the
    best fit is a pop from the front. Where long samples are many, gaps would eat up the short ones and leave bins of
    long ones alone: while the pool is long against the data, gaps are not closed with a sample below the mean.
    """
    first = np.full(capacity + 1, _NONE, np.int32)
    last = np.empty(capacity + 1, np.int32)
    filled = _index_words(capacity)
    following = np.empty(len(stream), np.int32)
    total = np.int64(0)
    for each in lengths:
        total += each
    oldest = arrived = placed = bins = 0
    pending = np.int64(0)
    while placed < len(stream):
        room = np.int64(capacity)
        stop = min(len(stream), placed + bin_samples)
        while placed < stop:
            while arrived < len(stream) and arrived - placed < pool_samples:
                length = np.int64(lengths[stream[arrived]])
                following[arrived] = _NONE
                if first[length] == _NONE:
                    first[length] = arrived
                    _insert(filled, length)
                else:
                    following[last[length]] = arrived
                last[length] = arrived
                pending += length
                arrived += 1
            while following[oldest] == _TAKEN:
                oldest += 1
            length = np.int64(lengths[stream[oldest]])
            if length > room:  # and stays so until the bin ends: from here on the gap is closed
                length = _greatest(filled, room)
                if length == 0:
                    break
                is_short = arrived < len(stream) and length * len(stream) < total
                if is_short and pending * len(stream) > _SHORTAGE * total * (arrived - placed):
                    break
            taken = first[length]
            first[length] = following[taken]
            following[taken] = _TAKEN
            if first[length] == _NONE:
                _remove(filled, length)
            pending -= length
            order[placed] = stream[taken]
            placed += 1
            room -= length
        order[placed - 1] = ~order[placed - 1]
        bins += 1
    return bins


@njit(cache=True)
def _emit(order: Int32Array, placed: int, sample: int, stream: Int32Array, following: Int32Array) -> int:
    """Writes a bin, given its last sample (a place in the stream), at `order[placed:]`; returns the new `placed`."""
    end = placed
    order[end] = stream[sample]
    while following[sample] != _NONE:
        sample = following[sample]
        end += 1
        order[end] = stream[sample]
    order[end] = ~order[end]
    return end + 1


@njit(cache=True)
def stream_best_fit(
    lengths: Int32Array, stream: Int32Array, capacity: int, bin_samples: int, open_bins: int, order: Int32Array
) -> int:
    """Fills `order`, returns the number of bins: each sample into the fullest of at most `open_bins` that has room.

    Where none has, a new bin is opened; the fullest is closed where that would be one too many. Open bins are in one
    list per number of tokens (`first`, linked by `beside`), their samples linked by `following`, last one first.
    """
    first = np.full(capacity + 1, _NONE, np.int32)
    filled = _index_words(capacity)
    beside = np.empty(open_bins, np.int32)
    newest = np.full(open_bins, _NONE, np.int32)
    held = np.zeros(open_bins, np.int32)
    unused = np.arange(open_bins).astype(np.int32)
    num_unused = open_bins
    following = np.empty(len(stream), np.int32)
    placed = bins = 0
    for i in range(len(stream) + 1):
        ended = i == len(stream)
        tokens = 0 if ended else _greatest(filled, capacity - lengths[stream[i]])
        while tokens == 0 and (ended or num_unused == 0):  # close the fullest
            fullest = _greatest(filled, capacity)
            if fullest == 0:
                return bins
            slot = first[fullest]
            first[fullest] = beside[slot]
            if first[fullest] == _NONE:
                _remove(filled, fullest)
            placed = _emit(order, placed, newest[slot], stream, following)
            bins += 1
            unused[num_unused] = slot
            num_unused += 1
        if tokens > 0:
            slot = first[tokens]
            first[tokens] = beside[slot]
            if first[tokens] == _NONE:
                _remove(filled, tokens)
        else:
            num_unused -= 1
            slot = unused[num_unused]
            newest[slot], held[slot] = _NONE, 0
        following[i] = newest[slot]
        newest[slot] = i
        held[slot] += 1
        tokens += lengths[stream[i]]
        if tokens == capacity or held[slot] == bin_samples:
            placed = _emit(order, placed, i, stream, following)
            bins += 1
            unused[num_unused] = slot
            num_unused += 1
        else:
            beside[slot] = first[tokens]
            first[tokens] = slot
            _insert(filled, tokens)
    return bins


@njit(cache=True)
def _by_length(lengths: Int32Array, stream: Int32Array, counts: Int64Array) -> Int32Array:
    """The stream sorted by length, samples of one length in stream order: a counting sort."""
    places = np.cumsum(counts) - counts
    sorted_ids = np.empty_like(stream)
    for sample in stream:
        length = lengths[sample]
        sorted_ids[places[length]] = sample
        places[length] += 1
    return sorted_ids


@njit(cache=True)
def _plan_groups(counts: Int64Array, capacity: int, bin_samples: int) -> tuple[Int32Array, int]:
    """Best-fit-decreasing on a histogram: equal bins are one group, placed at once.

    Returns int32 [5, ≥ groups] and the number of groups. A group is (group it came from, length, samples of that length
    added to each of its bins, bins left in it, next group in the list). Lists are by tokens in a bin, so the tightest
    bin with room for `length` is in the last list up to capacity - length. A bin that took a sample is tighter than its
    equals, so it takes as many of that length as it can before the next one does.
    """
    first = np.full(capacity + 1, _NONE, np.int32)
    filled = _index_words(capacity)
    groups = np.empty((5, 1024), np.int32)
    held = np.empty(1024, np.int32)
    num_groups = 0
    for length in range(capacity, 0, -1):
        left = counts[length]
        while left > 0:
            if num_groups + 2 > groups.shape[1]:
                wider = np.empty((5, 2 * groups.shape[1]), np.int32)
                wider[:, :num_groups] = groups[:, :num_groups]
                more = np.empty(2 * len(held), np.int32)
                more[:num_groups] = held[:num_groups]
                groups, held = wider, more
            tokens = _greatest(filled, capacity - length)
            source = _NONE
            before = 0
            if tokens > 0:
                source = first[tokens]
                before = held[source]
            each = min((capacity - tokens) // length, bin_samples - before)
            bins = max(1, left // each)
            if source != _NONE:
                bins = min(bins, groups[3, source])
                groups[3, source] -= bins
                if groups[3, source] == 0:
                    first[tokens] = groups[4, source]
                    if first[tokens] == _NONE:
                        _remove(filled, tokens)
            each = min(each, left)
            left -= bins * each
            group = num_groups
            num_groups += 1
            groups[0, group], groups[1, group], groups[2, group], groups[3, group] = source, length, each, bins
            held[group] = before + each
            tokens += each * length
            if held[group] < bin_samples:
                groups[4, group] = first[tokens]
                first[tokens] = group
                _insert(filled, tokens)
    return groups, num_groups


@njit(cache=True)
def dense(lengths: Int32Array, stream: Int32Array, capacity: int, bin_samples: int, order: Int32Array) -> int:
    """Fills `order`, returns the number of bins: best-fit-decreasing. The stream decides between equal lengths only."""
    counts = histogram(lengths, capacity)
    groups, num_groups = _plan_groups(counts, capacity, bin_samples)
    sorted_ids = _by_length(lengths, stream, counts)
    ends = np.cumsum(counts)
    placed = bins = 0
    for group in range(num_groups):
        for _ in range(groups[3, group]):
            part = group
            while part != _NONE:
                length = groups[1, part]
                for _ in range(groups[2, part]):
                    ends[length] -= 1
                    order[placed] = sorted_ids[ends[length]]
                    placed += 1
                part = groups[0, part]
            order[placed - 1] = ~order[placed - 1]
            bins += 1
    return bins


@njit(cache=True)
def bin_starts(order: Int32Array, num_bins: int) -> Int32Array:
    """Where each bin of a marked `order` begins, int32 [bins]."""
    starts = np.empty(num_bins, np.int32)
    start = found = 0
    for i in range(len(order)):
        if order[i] < 0:
            starts[found] = start
            found += 1
            start = i + 1
    return starts


@njit(cache=True)
def lay_out(order: Int32Array, starts: Int32Array, out: Int32Array) -> None:
    """The bins of a marked `order` that begin at `starts`, one after another, marked, into `out`."""
    placed = 0
    for at in starts:
        while order[at] >= 0:
            out[placed] = order[at]
            placed += 1
            at += 1
        out[placed] = order[at]
        placed += 1


@njit(cache=True)
def take_marks(order: Int32Array, num_bins: int) -> Int64Array:
    """Removes the marks; returns where the bins begin and the last one ends, int64 [bins + 1]."""
    offsets = np.zeros(num_bins + 1, np.int64)
    found = 0
    for i in range(len(order)):
        if order[i] < 0:
            order[i] = ~order[i]
            found += 1
            offsets[found] = i + 1
    return offsets


@njit(cache=True)
def likeness(lengths: Int32Array, order: Int32Array, num_bins: int, logs: Float64Array) -> float:
    """1 - variance of log length inside the bins of a marked `order` ÷ variance over all: an intra-class correlation.

    0: samples of a bin are no more alike than strangers; 1: they are equal. `logs` float64 [capacity + 1].
    """
    total = squares = between = inside = 0.0
    held = 0
    for i in range(len(order)):
        ended = order[i] < 0
        value = logs[lengths[~order[i] if ended else order[i]]]
        total += value
        squares += value * value
        inside += value
        held += 1
        if ended:
            between += inside * inside / held
            inside = 0.0
            held = 0
    spread = squares - total * total / len(order)
    if num_bins == len(order) or spread <= 1e-9 * squares:
        return 0.0
    within = (squares - between) / (len(order) - num_bins)
    return float(1.0 - within * len(order) / spread)


@njit(cache=True)
def likeness_of_stream(
    lengths: Int32Array, stream: Int32Array, capacity: int, bin_samples: int, logs: Float64Array
) -> float:
    """`likeness` of next-fit bins of the stream: what a random order gives for these lengths."""
    order = np.empty_like(stream)
    room = held = bins = 0
    for i in range(len(stream)):
        length = lengths[stream[i]]
        if length > room or held == bin_samples:
            if i > 0:
                order[i - 1] = ~order[i - 1]
            bins += 1
            room, held = capacity, 0
        order[i] = stream[i]
        room -= length
        held += 1
    order[-1] = ~order[-1]
    return float(likeness(lengths, order, bins, logs))
