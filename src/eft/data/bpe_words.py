"""The memory of pre-tokens that were merged before, as compiled loops: words repeat.

Nearly all words are short. A short one is two numbers made of its bytes, which are loaded eight at a time; it is found
by comparing these, without a loop over its bytes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit

from eft.core.records import Int32Array, Int64Array
from eft.data.bpe_merges import Bytes, Keys

LONGEST_WORD = 255
"""Bytes; longer pre-tokens hardly come back: they are not remembered."""
ARENA_BYTES = 1 << 24
PADDING = 24
"""Bytes that must follow a text, so that whole eights can be loaded."""
SHORT_WORD = 15
"""Bytes of the longest one."""
_LONG_SHARE = 4
"""The table of long words has so many times fewer slots."""

_FNV_START, _FNV_PRIME = np.uint64(0xCBF29CE484222325), np.uint64(0x100000001B3)
_GOLDEN, _OTHER = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F)
_ONE, _HIGH, _ARENA, _LENGTH_AT = np.uint64(1), np.uint64(32), np.uint64(40), np.uint64(56)
_LENGTH, _VALUE, _ALL = np.uint64(0xFF), np.uint64(0xFFFFFFFF), np.uint64(0xFFFFFFFFFFFFFFFF)
SEVERAL = 1 << 31
_IDS_PER_WORD = 4


class Words(NamedTuple):
    """What is known. A value is an id, or `SEVERAL` + where in `known` the number of ids and the ids are."""

    shorts: Keys
    """uint64 [slots, 3]: a short word's bytes 0 to 7; its bytes 8 to 14 and above them its length; its value. Free
    where the second is 0."""
    longs: Keys
    """uint64 [slots]: from the top 24 bits, where the bytes start in `arena`; 8 bits, their number; 32 bits, the value.
    Free where 0."""
    arena: Bytes
    """Bytes of long words."""
    known: Int32Array
    used: Int64Array
    """[4]: short words, long words, bytes of `arena`, ids of `known`."""

    @classmethod
    def empty(cls, slots: int, arena: int) -> Words:
        """For `slots` / 2 words at most; `slots` is a power of two, `arena` bytes."""
        return cls(
            np.zeros((slots, 3), np.uint64),
            np.zeros(slots // _LONG_SHARE, np.uint64),
            np.zeros(arena, np.uint8),
            np.zeros(slots // 2 * _IDS_PER_WORD, np.int32),
            np.zeros(4, np.int64),
        )


def padded(content: bytes) -> tuple[Bytes, Keys]:
    """Bytes as uint8 [bytes], and with what must follow them as uint64."""
    whole = np.frombuffer(content + bytes(PADDING - len(content) % 8), dtype=np.uint8)
    return whole[: len(content)], whole.view(np.uint64)


@njit(inline="always")
def short_key(eights: Keys, at: int, length: int) -> Any:
    """The two numbers of the word of `length` bytes at byte `at`."""
    index, shift = at >> 3, np.uint64((at & 7) << 3)
    back = np.uint64(63) - shift
    first, second, third = eights[index], eights[index + 1], eights[index + 2]
    low = first >> shift | second << _ONE << back
    high = second >> shift | third << _ONE << back
    low &= _ALL >> np.uint64(64 - 8 * min(length, 8))
    high &= (_ONE << np.uint64(8 * max(length - 8, 0))) - _ONE
    return low, high | np.uint64(length) << _LENGTH_AT


@njit(inline="always")
def short_slot(low: Any, high: Any, shorts: Keys) -> Any:
    """The slot of these two numbers, or the free one where they belong."""
    mask = np.uint64(len(shorts) - 1)
    # Its upper half, of which every bit depends on every bit below.
    hashed = (low ^ high * _OTHER) * _GOLDEN >> _HIGH
    slot = hashed * np.uint64(len(shorts)) >> _HIGH
    while shorts[slot, 1] != 0 and (shorts[slot, 0] != low or shorts[slot, 1] != high):
        slot = (slot + _ONE) & mask
    return slot


@njit(inline="always")
def _long_slot(buffer: Bytes, start: int, stop: int, longs: Keys, arena: Bytes) -> Any:
    """The slot of these bytes, or the free one where they belong."""
    hashed = _FNV_START
    for i in range(start, stop):
        hashed = (hashed ^ np.uint64(buffer[i])) * _FNV_PRIME
    mask = np.uint64(len(longs) - 1)
    slot = (hashed ^ (hashed >> _HIGH)) & mask
    length = stop - start
    while longs[slot] != 0:
        if np.int64((longs[slot] >> _HIGH) & _LENGTH) == length:
            first = np.int64(longs[slot] >> _ARENA)
            i = 0
            while i < length and arena[first + i] == buffer[start + i]:
                i += 1
            if i == length:
                break
        slot = (slot + _ONE) & mask
    return slot


@njit(cache=True)
def long_value(buffer: Bytes, start: int, stop: int, longs: Keys, arena: Bytes) -> Any:
    """The value of a long word's bytes, -1 where they are not known."""
    word = longs[_long_slot(buffer, start, stop, longs, arena)]
    return np.int64(word & _VALUE) if word != 0 else np.int64(-1)


@njit(cache=True)
def copy_several(value: int, known: Int32Array, ids: Int32Array, count: int) -> Any:
    """Put the ids of a value that says where they are at ids[count:]; returns how many."""
    first = value - SEVERAL
    number = np.int64(known[first])
    for i in range(number):
        ids[count + i] = known[first + 1 + i]
    return number


@njit(cache=True)
def remember(
    buffer: Bytes,
    eights: Keys,
    start: int,
    stop: int,
    ids: Int32Array,
    first: int,
    count: int,
    words: Words,
) -> None:
    """Keep `count` ids from ids[first] on of bytes that are not known, unless there is no room."""
    shorts, longs, arena, known, used = words
    length = stop - start
    is_short = length <= SHORT_WORD
    table = len(shorts) if is_short else len(longs)
    number = used[0] if is_short else used[1]
    if length > LONGEST_WORD or 2 * number >= table or (not is_short and used[2] + length > len(arena)):
        return
    value = np.int64(ids[first])
    if count != 1:
        if used[3] + count >= len(known):
            return
        value = SEVERAL + used[3]
        known[used[3]] = count
        known[used[3] + 1 : used[3] + 1 + count] = ids[first : first + count]
        used[3] += count + 1
    if is_short:
        low, high = short_key(eights, start, length)
        slot = short_slot(low, high, shorts)
        shorts[slot, 0], shorts[slot, 1], shorts[slot, 2] = low, high, np.uint64(value)
        used[0] += 1
        return
    slot = _long_slot(buffer, start, stop, longs, arena)
    longs[slot] = np.uint64(used[2]) << _ARENA | np.uint64(length) << _HIGH | np.uint64(value)
    arena[used[2] : used[2] + length] = buffer[start:stop]
    used[1] += 1
    used[2] += length
