"""Byte-level BPE as compiled loops: split at added tokens, split by the pre-tokeniser's rule, merge.

Text comes as code points (one array for a whole batch) and as UTF-8 bytes; ids go out with nothing else, as the bytes
of a token are known from its id. `state` arrays hold pre-tokens that were merged before: words repeat.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from eft.core.records import Int32Array, Int64Array
from eft.data.bpe_merges import Bytes, Keys, copy_known, merge_word, remember, word_slot

Points = npt.NDArray[np.uint32]
Flags = npt.NDArray[np.bool_]

LETTER, NUMBER, SPACE, DIGIT, MARK, STARTS_RAW, STARTS_NORMAL, ODD = 1, 2, 4, 8, 16, 32, 64, 128
"""Bits of the class table, uint8 [0x110000]. `DIGIT` is what the Digits pre-tokeniser splits off; `STARTS_*`: the first
code point of an added token; `ODD`: left to the reference tokenizer."""

GPT2, CL100K = 0, 1
"""Rules: the regular expression of GPT-2, and the family of cl100k (Llama 3, Qwen 2 …)."""

_APOSTROPHE, _BLANK, _CR, _LF, _LONG_S = 0x27, 0x20, 0x0D, 0x0A, 0x17F


@njit(inline="always")
def _contraction(points: Points, start: int, end: int, any_case: bool) -> Any:
    """Code points of `'s 't 're 've 'm 'll 'd` at `start`, else 0."""
    if points[start] != _APOSTROPHE or start + 1 >= end:
        return 0
    first = points[start + 1]
    second = points[start + 2] if start + 2 < end else np.uint32(0)
    if any_case:
        if first == _LONG_S:
            first = np.uint32(0x73)
        if 0x41 <= first <= 0x5A:
            first = np.uint32(first + 32)
        if 0x41 <= second <= 0x5A:
            second = np.uint32(second + 32)
    if first == 0x73 or first == 0x74 or first == 0x6D or first == 0x64:
        return 2
    if (first == 0x72 or first == 0x76) and second == 0x65:
        return 3
    if first == 0x6C and second == 0x6C:
        return 3
    return 0


@njit(inline="always")
def _run(points: Points, classes: Bytes, start: int, end: int, mask: int) -> Any:
    """Where the run of code points in `mask` that starts at `start` ends."""
    while start < end and classes[points[start]] & mask:
        start += 1
    return start


@njit(inline="always")
def _blanks(points: Points, classes: Bytes, start: int, end: int) -> Any:
    r"""`\s+(?!\S)|\s+`: a run of white space gives up its last one where something follows."""
    stop = _run(points, classes, start, end, SPACE)
    return stop - 1 if stop < end and stop - start > 1 else stop


@njit(inline="always")
def _next_gpt2(points: Points, classes: Bytes, start: int, end: int) -> Any:
    contraction = _contraction(points, start, end, False)
    if contraction:
        return start + contraction
    first = start + 1 if points[start] == _BLANK and start + 1 < end else start
    kind = classes[points[first]]
    if kind & LETTER:
        return _run(points, classes, first, end, LETTER)
    if kind & NUMBER:
        return _run(points, classes, first, end, NUMBER)
    if not kind & SPACE:
        while first < end and not classes[points[first]] & (LETTER | NUMBER | SPACE):
            first += 1
        return first
    return _blanks(points, classes, start, end)


@njit(inline="always")
def _next_cl100k(points: Points, classes: Bytes, start: int, end: int, digits: int, word: int) -> Any:
    """`digits`: how many numbers one pre-token holds; `word`: LETTER, or LETTER | MARK."""
    contraction = _contraction(points, start, end, True)
    if contraction:
        return start + contraction
    point = points[start]
    kind = classes[point]
    if kind & word:
        return _run(points, classes, start, end, word)
    is_break = point == _CR or point == _LF  # a tuple would be built
    if not is_break and not kind & (LETTER | NUMBER) and start + 1 < end and classes[points[start + 1]] & word:
        return _run(points, classes, start + 1, end, word)
    if kind & NUMBER:
        return _run(points, classes, start, min(end, start + digits), NUMBER)
    first = start + 1 if point == _BLANK and start + 1 < end else start
    taken = word | LETTER | NUMBER | SPACE
    if not classes[points[first]] & taken:
        while first < end and not classes[points[first]] & taken:
            first += 1
        while first < end and (points[first] == _CR or points[first] == _LF):
            first += 1
        return first
    stop = _run(points, classes, start, end, SPACE)
    for last in range(stop - 1, start - 1, -1):
        if points[last] == _CR or points[last] == _LF:
            return last + 1
    return _blanks(points, classes, start, end)


# ---- added tokens ----


@njit(cache=True)
def _added_at(points: Points, at: int, end: int, added: Int32Array, added_points: Points) -> Any:
    """The longest added token at `at`: its row in `added` int32 [tokens, 3] (first code point's index, length, id),
    sorted by length, longest first; -1 for none."""
    for row in range(len(added)):
        length = added[row, 1]
        if length <= end - at:
            first = added[row, 0]
            i = 0
            while i < length and points[at + i] == added_points[first + i]:
                i += 1
            if i == length:
                return row
    return -1


@njit(cache=True)
def _split(
    points: Points, classes: Bytes, start: int, end: int, bit: int, added: Int32Array, added_points: Points
) -> tuple[int, int]:
    """The first added token from `start` on: (where, its row in `added`); (end, -1) where there is none."""
    for at in range(start, end):
        if classes[points[at]] & bit:
            row = _added_at(points, at, end, added, added_points)
            if row >= 0:
                return at, row
    return end, -1


@njit(cache=True)
def encode_batch(
    points: Points,
    buffer: Bytes,
    text_ends: Int64Array,
    classes: Bytes,
    rule: Int64Array,
    raw: Int32Array,
    raw_points: Points,
    normal: Int32Array,
    normal_points: Points,
    byte_ids: Int32Array,
    keys: Keys,
    ranks: Int32Array,
    merged: Int32Array,
    words: Keys,
    arena: Bytes,
    known: Int32Array,
    used: Int64Array,
    ids: Int32Array,
    ends: Int64Array,
) -> Any:
    """Ids of a batch.

    Args:
        points, buffer: all texts one after the other, uint32 code points and uint8 UTF-8 bytes.
        text_ends: int64 [texts], in code points.
        rule: int64 [4]: GPT2 or CL100K, numbers per pre-token, mask of a word, 1 where Digits goes first.
        raw, raw_points, normal, normal_points: added tokens looked for before and after normalisation.
        keys, ranks, merged: the merges, see `fill_merges`.
        words, arena, known, used: words seen before, see `remember`.
        ids: int32 [bytes], receives the ids; ends: int64 [texts], receives the number of ids up to each text's end.

    Returns the number of ids.
    """
    count, at_byte, start = 0, 0, 0
    any_case, digits, word, by_digit = rule[0] == CL100K, rule[1], rule[2], rule[3] == 1
    for text in range(len(text_ends)):
        text_end = text_ends[text]
        while start < text_end:
            raw_at, raw_row = _split(points, classes, start, text_end, STARTS_RAW, raw, raw_points)
            while start < raw_at:
                end, row = raw_at, -1
                if len(normal):
                    end, row = _split(points, classes, start, raw_at, STARTS_NORMAL, normal, normal_points)
                limit = start
                while start < end:
                    if start == limit:
                        limit = _before_digit(points, classes, start, end) if by_digit else end
                    if any_case:
                        stop = _next_cl100k(points, classes, start, limit, digits, word)
                    else:
                        stop = _next_gpt2(points, classes, start, limit)
                    stop_byte = at_byte + _utf8_length(points, start, stop)
                    slot = word_slot(buffer, at_byte, stop_byte, words, arena)
                    if words[slot] != 0:
                        number = copy_known(words[slot], known, ids, count)
                    else:
                        number = merge_word(buffer, at_byte, stop_byte, byte_ids, keys, ranks, merged, ids, count)
                        remember(buffer, at_byte, stop_byte, ids, count, number, words, arena, known, used)
                    count += number
                    start, at_byte = stop, stop_byte
                if row >= 0:
                    ids[count] = normal[row, 2]
                    count += 1
                    start += normal[row, 1]
                    at_byte += _utf8_length(points, start - normal[row, 1], start)
            if raw_row >= 0:
                ids[count] = raw[raw_row, 2]
                count += 1
                start += raw[raw_row, 1]
                at_byte += _utf8_length(points, start - raw[raw_row, 1], start)
        ends[text] = count
    return count


@njit(inline="always")
def _before_digit(points: Points, classes: Bytes, start: int, end: int) -> Any:
    """Where the piece that starts at `start` ends: a digit is a piece of its own, and ends the one before it."""
    if classes[points[start]] & DIGIT:
        return start + 1
    while start < end and not classes[points[start]] & DIGIT:
        start += 1
    return start


@njit(inline="always")
def _utf8_length(points: Points, start: int, end: int) -> Any:
    length = end - start
    for i in range(start, end):
        point = points[i]
        if point >= 0x80:
            length += 1 + (point >= 0x800) + (point >= 0x10000)
    return length


@njit(cache=True)
def first_in_class(points: Points, classes: Bytes, start: int, bit: int) -> Any:
    """The first code point from `start` on that has a bit of the class table; the number of code points for none."""
    for at in range(start, len(points)):
        if classes[points[at]] & bit:
            return at
    return len(points)


@njit(cache=True)
def to_bytes(points: Points, places: Int64Array) -> None:
    """Turn characters into bytes, in place; `places` ascend from one to the next."""
    at, byte = 0, 0
    for i in range(len(places)):
        byte += _utf8_length(points, at, places[i])
        at = places[i]
        places[i] = byte


@njit(cache=True)
def mark_spans(
    ids: Int32Array,
    ends: Int64Array,
    byte_lengths: Int32Array,
    starts_of: Int64Array,
    span_ends: Int64Array,
    spans: Int64Array,
    special: Flags,
    labels: Int32Array,
    ignore: int,
) -> None:
    """Labels of a batch: a token is trained where its bytes overlap a span of its text.

    Args:
        ids: int32 [tokens]; ends: int64 [texts]; byte_lengths: int32 [vocabulary].
        starts_of: int64 [texts], where each text's bytes start in the batch.
        span_ends: int64 [texts], the number of spans up to each text's end.
        spans: int64 [spans, 2], bytes in the batch, ascending and apart within a text.
        special: bool [vocabulary]: such a token that starts before a span does not belong to it.
        labels: int32 [tokens], receives the ids that are trained and `ignore` elsewhere.
    """
    token, first_span = 0, 0
    for text in range(len(ends)):
        i, at, stop = token, starts_of[text], ends[text]
        labels[token:stop] = ignore
        for span in range(first_span, span_ends[text]):
            while i < stop and at + byte_lengths[ids[i]] <= spans[span, 0]:
                at += byte_lengths[ids[i]]
                i += 1
            # The last token of this span may also be the first one of the next: `i` stays where the span starts.
            inside, reached = i, at
            while inside < stop and reached < spans[span, 1]:
                if reached >= spans[span, 0] or not special[ids[inside]]:
                    labels[inside] = ids[inside]
                reached += byte_lengths[ids[inside]]
                inside += 1
        token, first_span = stop, span_ends[text]
