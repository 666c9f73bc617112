"""Byte-level BPE as compiled loops: split at added tokens, split by the pre-tokeniser's rule, merge.

Text comes as code points (one array for a whole batch) and as UTF-8 bytes; ids go out with nothing else, as the bytes
of a token are known from its id. Pre-tokens that were merged before are in `bpe_words`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from eft.core.records import Int32Array, Int64Array
from eft.data.bpe_merges import Bytes, Keys, merge_word
from eft.data.bpe_words import SEVERAL, SHORT_WORD, Words, copy_several, long_value, remember, short_key, short_slot

Points = npt.NDArray[np.uint32]
Flags = npt.NDArray[np.bool_]

LETTER, NUMBER, SPACE, DIGIT, MARK, STARTS_RAW, STARTS_NORMAL, ODD = 1, 2, 4, 8, 16, 32, 64, 128
"""Bits of the class table, uint8 [0x110000]. `DIGIT` is what the Digits pre-tokeniser splits off; `STARTS_*`: the first
code point of an added token; `ODD`: left to the reference tokenizer."""

GPT2, CL100K = 0, 1
"""Rules: the regular expression of GPT-2, and the family of cl100k (Llama 3, Qwen 2 …)."""

_APOSTROPHE, _BLANK, _CR, _LF, _LONG_S = 0x27, 0x20, 0x0D, 0x0A, 0x17F


# No function that is inlined here takes an array: each call would count references to it, which takes longer than the
# rest. Loops over arrays stand where they are needed.


@njit(inline="always")
def _contraction(first: Any, second: Any) -> Any:
    """Code points of `'s 't 're 've 'm 'll 'd`, of which these two follow the apostrophe; else 0."""
    if first == 0x73 or first == 0x74 or first == 0x6D or first == 0x64:
        return 2
    if (first == 0x72 or first == 0x76) and second == 0x65:
        return 3
    if first == 0x6C and second == 0x6C:
        return 3
    return 0


@njit(inline="always")
def _lower(point: Any) -> Any:
    """ASCII letters in lower case, and the long s, which the regular expression takes for an s."""
    if point == _LONG_S:
        return np.uint32(0x73)
    return np.uint32(point + 32) if 0x41 <= point <= 0x5A else np.uint32(point)


@njit(cache=True)
def _stops_gpt2(points: Points, classes: Bytes, start: int, end: int, by_digit: bool, stops: Int64Array) -> Any:
    """Where the pre-tokens of points[start:end] end, by GPT-2's rule, into `stops`; returns how many there are.

    `by_digit`: a digit is a piece of its own, and ends the one before it; the rule sees one piece at a time.
    """
    count, limit = 0, start
    while start < end:
        if start == limit:
            limit = start + 1 if by_digit else end
            if by_digit and not classes[points[start]] & DIGIT:
                while limit < end and not classes[points[limit]] & DIGIT:
                    limit += 1
        stop, point = start, points[start]
        if point == _APOSTROPHE and start + 1 < limit:
            second = points[start + 2] if start + 2 < limit else np.uint32(0)
            stop += _contraction(points[start + 1], second)
        if stop == start:
            stop += point == _BLANK and start + 1 < limit
            kind = classes[points[stop]]
            if kind & (LETTER | NUMBER):
                mask = LETTER if kind & LETTER else NUMBER
                while stop < limit and classes[points[stop]] & mask:
                    stop += 1
            elif not kind & SPACE:
                while stop < limit and not classes[points[stop]] & (LETTER | NUMBER | SPACE):
                    stop += 1
            else:  # `\s+(?!\S)|\s+`: a run of white space gives up its last one where something follows
                while stop < limit and classes[points[stop]] & SPACE:
                    stop += 1
                stop -= stop < limit and stop - start > 1
        stops[count] = stop
        count += 1
        start = stop
    return count


@njit(cache=True)
def _stops_cl100k(
    points: Points, classes: Bytes, start: int, end: int, digits: int, word: int, stops: Int64Array
) -> Any:
    """As `_stops_gpt2`. `digits`: how many numbers one pre-token holds; `word`: LETTER, or LETTER | MARK."""
    count, taken = 0, word | LETTER | NUMBER | SPACE
    while start < end:
        stop, point = start, points[start]
        if point == _APOSTROPHE and start + 1 < end:
            second = _lower(points[start + 2]) if start + 2 < end else np.uint32(0)
            stop += _contraction(_lower(points[start + 1]), second)
        if stop == start:
            kind = classes[point]
            is_break = (point == _CR) | (point == _LF)
            after = classes[points[start + 1]] if start + 1 < end else np.uint8(0)
            first = start + 1 if point == _BLANK and start + 1 < end else start
            if kind & word or (not is_break and not kind & (LETTER | NUMBER) and after & word):
                stop += 1
                while stop < end and classes[points[stop]] & word:
                    stop += 1
            elif kind & NUMBER:
                while stop < min(end, start + digits) and classes[points[stop]] & NUMBER:
                    stop += 1
            elif not classes[points[first]] & taken:
                stop = first
                while stop < end and not classes[points[stop]] & taken:
                    stop += 1
                while stop < end and (points[stop] == _CR or points[stop] == _LF):
                    stop += 1
            else:
                while stop < end and classes[points[stop]] & SPACE:
                    stop += 1
                last = stop - 1  # `\s*[\r\n]+`: up to the last line break of the run
                while last >= start and points[last] != _CR and points[last] != _LF:
                    last -= 1
                if last >= start:
                    stop = last + 1
                else:
                    stop -= stop < end and stop - start > 1
        stops[count] = stop
        count += 1
        start = stop
    return count


@njit(cache=True)
def _stops(points: Points, classes: Bytes, start: int, end: int, rule: Int64Array, stops: Int64Array) -> Any:
    """By any rule, see `encode_batch`."""
    if rule[0] == CL100K:
        return _stops_cl100k(points, classes, start, end, rule[1], rule[2], stops)
    return _stops_gpt2(points, classes, start, end, rule[3] == 1, stops)


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
    eights: Keys,
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
    words: Words,
    ids: Int32Array,
    ends: Int64Array,
    byte_ends: Int64Array,
) -> Any:
    """Ids of a batch; returns how many.

    Args:
        points, buffer: all texts one after the other, uint32 code points and uint8 UTF-8 bytes.
        eights: the bytes as `bpe_words.padded` has them.
        text_ends: int64 [texts], in code points.
        rule: int64 [4]: GPT2 or CL100K, numbers per pre-token, mask of a word, 1 where Digits goes first.
        raw, raw_points, normal, normal_points: added tokens looked for before and after normalisation.
        keys, ranks, merged: the merges, see `fill_merges`.
        words: those seen before.
        ids: int32 [bytes], receives the ids; ends: int64 [texts], receives the number of ids up to each text's end.
        byte_ends: int64 [texts], receives the number of bytes up to each text's end.
    """
    count, at_byte, start = 0, 0, 0
    shorts, longs, arena, known, _ = words  # once: each look into a tuple counts references
    stops = np.empty(len(points), np.int64)
    for text in range(len(text_ends)):
        text_end = text_ends[text]
        ahead = at_byte - start if _is_ascii(points, start, text_end) else -1  # bytes and characters go together
        while start < text_end:
            raw_at, raw_row = _split(points, classes, start, text_end, STARTS_RAW, raw, raw_points)
            while start < raw_at:
                end, row = raw_at, -1
                if len(normal):
                    end, row = _split(points, classes, start, raw_at, STARTS_NORMAL, normal, normal_points)
                number_of_words = _stops(points, classes, start, end, rule, stops)
                if ahead < 0:
                    _stops_in_bytes(points, start, at_byte, stops[:number_of_words])
                start = end
                for i in range(number_of_words):
                    stop_byte = stops[i] + max(ahead, 0)
                    if stop_byte - at_byte <= SHORT_WORD:
                        low, high = short_key(eights, at_byte, stop_byte - at_byte)
                        slot = short_slot(low, high, shorts)
                        value = np.int64(shorts[slot, 2]) if shorts[slot, 1] != 0 else np.int64(-1)
                    else:
                        value = long_value(buffer, at_byte, stop_byte, longs, arena)
                    if value < 0:
                        number = merge_word(buffer, at_byte, stop_byte, byte_ids, keys, ranks, merged, ids, count)
                        remember(buffer, eights, at_byte, stop_byte, ids, count, number, words)
                    elif value < SEVERAL:
                        ids[count] = value
                        number = 1
                    else:
                        number = copy_several(value, known, ids, count)
                    count += number
                    at_byte = stop_byte
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
        ends[text], byte_ends[text] = count, at_byte
    return count


@njit(cache=True)
def _stops_in_bytes(points: Points, at: int, byte: int, stops: Int64Array) -> None:
    """Turn ascending ends of words from characters into bytes, in place; character `at` is byte `byte`."""
    for i in range(len(stops)):
        for j in range(at, stops[i]):
            point = points[j]
            byte += 1 + (point >= 0x80) + (point >= 0x800) + (point >= 0x10000)
        at = stops[i]
        stops[i] = byte


@njit(cache=True)
def _is_ascii(points: Points, start: int, end: int) -> Any:
    every = np.uint32(0)
    for point in points[start:end]:  # without a way out, so that many go at once
        every |= point
    return every < 0x80


@njit(cache=True)
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
def to_bytes(
    points: Points, text_ends: Int64Array, byte_ends: Int64Array, span_ends: Int64Array, spans: Int64Array
) -> None:
    """Turn the characters of spans into bytes, in place; the other arrays are those of `encode_batch`, `mark_spans`."""
    at, byte, span = 0, 0, 0
    for text in range(len(text_ends)):
        if byte_ends[text] - byte == text_ends[text] - at:  # ASCII
            for i in range(span, span_ends[text]):
                spans[i, 0] += byte - at
                spans[i, 1] += byte - at
        else:
            for i in range(span, span_ends[text]):
                for side in range(2):
                    place = spans[i, side]
                    byte += _utf8_length(points, at, place)
                    at = place
                    spans[i, side] = byte
        at, byte, span = text_ends[text], byte_ends[text], span_ends[text]


@njit(cache=True)
def mark_spans(
    ids: Int32Array,
    ends: Int64Array,
    byte_lengths: Int32Array,
    byte_ends: Int64Array,
    span_ends: Int64Array,
    spans: Int64Array,
    special: Flags,
    labels: Int32Array,
    ignore: int,
) -> None:
    """Labels of a batch: a token is trained where its bytes overlap a span of its text.

    Args:
        ids: int32 [tokens]; ends: int64 [texts]; byte_lengths: int32 [vocabulary].
        byte_ends: int64 [texts], the number of bytes up to each text's end.
        span_ends: int64 [texts], the number of spans up to each text's end.
        spans: int64 [spans, 2], bytes in the batch, ascending and apart within a text.
        special: bool [vocabulary]: such a token that starts before a span does not belong to it.
        labels: int32 [tokens], receives the ids that are trained and `ignore` elsewhere.
    """
    token, first_span, byte = 0, 0, 0
    for text in range(len(ends)):
        i, at, stop = token, byte, ends[text]
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
        token, first_span, byte = stop, span_ends[text], byte_ends[text]
