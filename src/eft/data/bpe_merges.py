"""The merges of byte-level BPE as compiled loops."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from eft.core.records import Int32Array, Int64Array

Bytes = npt.NDArray[np.uint8]
Keys = npt.NDArray[np.uint64]

_SHORT = 48
"""Pre-tokens up to so many bytes are merged by plain search; longer ones by a heap."""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_HIGH = np.uint64(32)


# ---- merging ----


@njit(inline="always")
def merge_slot(keys: Keys, left: int, right: int) -> Any:
    """The slot of a pair in the open-addressed merge table; it is free (key 0) where there is no such merge."""
    key = (np.uint64(left) << _HIGH | np.uint64(right)) + np.uint64(1)
    mask = np.uint64(len(keys) - 1)
    slot = (key * _GOLDEN >> np.uint64(20)) & mask
    while keys[slot] != 0 and keys[slot] != key:
        slot = (slot + np.uint64(1)) & mask
    return slot


@njit(cache=True)
def fill_merges(
    lefts: Int32Array, rights: Int32Array, news: Int32Array, keys: Keys, ranks: Int32Array, merged: Int32Array
) -> None:
    """Put the merges, in order of rank, into the empty table `keys`, `ranks`, `merged`."""
    for rank in range(len(lefts)):
        slot = merge_slot(keys, lefts[rank], rights[rank])
        keys[slot] = (np.uint64(lefts[rank]) << _HIGH | np.uint64(rights[rank])) + np.uint64(1)
        ranks[slot] = rank
        merged[slot] = news[rank]


@njit(cache=True)
def _merge_short(ids: Int32Array, count: int, keys: Keys, ranks: Int32Array, merged: Int32Array) -> Any:
    """Merge ids[:count] in place: always the pair of lowest rank, the leftmost of equal ones. Returns the new count."""
    none = np.int32(2147483647)
    pair_ranks = np.empty(_SHORT, np.int32)
    pair_news = np.empty(_SHORT, np.int32)
    for i in range(count - 1):
        slot = merge_slot(keys, ids[i], ids[i + 1])
        pair_ranks[i] = ranks[slot] if keys[slot] != 0 else none
        pair_news[i] = merged[slot]
    while count > 1:
        best = 0
        for i in range(1, count - 1):
            if pair_ranks[i] < pair_ranks[best]:
                best = i
        if pair_ranks[best] == none:
            break
        ids[best] = pair_news[best]
        count -= 1
        for i in range(best + 1, count):
            ids[i] = ids[i + 1]
            pair_ranks[i - 1], pair_news[i - 1] = pair_ranks[i], pair_news[i]
        for i in (best - 1, best):
            if 0 <= i < count - 1:
                slot = merge_slot(keys, ids[i], ids[i + 1])
                pair_ranks[i] = ranks[slot] if keys[slot] != 0 else none
                pair_news[i] = merged[slot]
    return count


@njit(cache=True)
def _sift_down(heap: Int64Array, size: int, at: int) -> None:
    item = heap[at]
    while 2 * at + 1 < size:
        child = 2 * at + 1
        if child + 1 < size and heap[child + 1] < heap[child]:
            child += 1
        if item <= heap[child]:
            break
        heap[at] = heap[child]
        at = child
    heap[at] = item


@njit(cache=True)
def _push(heap: Int64Array, size: int, item: int) -> None:
    at = size
    while at > 0 and item < heap[(at - 1) // 2]:
        heap[at] = heap[(at - 1) // 2]
        at = (at - 1) // 2
    heap[at] = item


@njit(cache=True)
def _merge_long(ids: Int32Array, count: int, keys: Keys, ranks: Int32Array, merged: Int32Array) -> Any:
    """As `_merge_short` in O(n log n): a heap of (rank, position), entries checked when they come up."""
    before = np.arange(-1, count - 1)
    after = np.arange(1, count + 1)
    heap = np.empty(3 * count, np.int64)  # every merge takes one out and puts at most two in
    size = 0
    for i in range(count - 1):
        slot = merge_slot(keys, ids[i], ids[i + 1])
        if keys[slot] != 0:
            heap[size] = (np.int64(ranks[slot]) << 32) | i
            size += 1
    for at in range(size // 2 - 1, -1, -1):
        _sift_down(heap, size, at)
    while size > 0:
        rank, i = heap[0] >> 32, heap[0] & 0xFFFFFFFF
        size -= 1
        heap[0] = heap[size]
        _sift_down(heap, size, 0)
        if ids[i] < 0 or after[i] >= count:
            continue
        right = after[i]
        slot = merge_slot(keys, ids[i], ids[right])
        if keys[slot] == 0 or ranks[slot] != rank:
            continue
        ids[i] = merged[slot]
        ids[right] = -1
        after[i] = after[right]
        if after[i] < count:
            before[after[i]] = i
        for left in (before[i], i):
            if left >= 0 and after[left] < count:
                slot = merge_slot(keys, ids[left], ids[after[left]])
                if keys[slot] != 0:
                    _push(heap, size, (np.int64(ranks[slot]) << 32) | left)
                    size += 1
    kept = 0
    for i in range(count):
        if ids[i] >= 0:
            ids[kept] = ids[i]
            kept += 1
    return kept


@njit(cache=True)
def merge_word(
    buffer: Bytes,
    start: int,
    stop: int,
    byte_ids: Int32Array,
    keys: Keys,
    ranks: Int32Array,
    merged: Int32Array,
    ids: Int32Array,
    first: int,
) -> Any:
    """Put the ids of one pre-token at ids[first:]; returns how many."""
    length = stop - start
    for i in range(length):
        ids[first + i] = byte_ids[buffer[start + i]]
    own = ids[first : first + length]
    if length <= _SHORT:
        return _merge_short(own, length, keys, ranks, merged)
    return _merge_long(own, length, keys, ranks, merged)
