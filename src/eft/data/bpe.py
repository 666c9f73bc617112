"""A faster encoder for byte-level BPE tokenizers, used only where it has been shown to give the same ids.

It is built from the tokenizer's own JSON: vocabulary, merges, added tokens, and a pre-tokeniser whose regular
expression is one of those known here. Which code points are letters, numbers or blanks is asked of the tokenizers
library itself, so both go by the same Unicode tables. `fast_encoder` compares its ids with the tokenizer's on strings
made to break it and on rows of the data set; whatever is not supported, or differs, keeps the tokenizer's own encoder.

The bytes of a token are those of its vocabulary entry, so masks need no offsets from the tokenizer.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import add
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from eft.core.constants import IGNORE_INDEX
from eft.core.records import Int32Array, Int64Array
from eft.data import bpe_kernels as kernels
from eft.data.bpe_classes import CODE_POINTS, PointClasses
from eft.data.bpe_merges import fill_merges
from eft.data.bpe_words import ARENA_BYTES, LONGEST_WORD, SHORT_WORD, Words, padded, remember
from eft.data.token_facts import byte_of_sign

UInt8Array = npt.NDArray[np.uint8]

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_CL100K = (
    _CONTRACTIONS + r"|[^\r\n\p{{L}}\p{{N}}]?{word}+|\p{{N}}{digits}| ?[^\s{letters}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_WORDS = {(r"\p{L}", r"\p{L}"): kernels.LETTER, (r"[\p{L}\p{M}]", r"\p{L}\p{M}"): kernels.LETTER | kernels.MARK}
KNOWN_RULES: dict[str, tuple[int, int, int]] = {
    _CL100K.format(word=word, letters=letters, digits=digits): (kernels.CL100K, count, mask)
    for (word, letters), mask in _WORDS.items()
    for digits, count in (("", 1), ("{1,3}", 3))
}
"""Regular expression of a Split pre-tokeniser → rule, numbers per pre-token, mask of a word."""

_WORD_SLOTS = 1 << 16


class UnsupportedError(Exception):
    """The tokenizer has something that the fast encoder does not do."""


class Batch:
    """Texts end to end: code points uint32 [characters], UTF-8 uint8 [bytes], each text's end in characters."""

    def __init__(self, texts: Sequence[str]):
        joined = "".join(texts)
        self.texts = texts
        self.is_ascii = joined.isascii()
        self.points = _points(joined)
        self.buffer, self.eights = padded(joined.encode())
        self.ends: Int64Array = np.cumsum([len(text) for text in texts], dtype=np.int64)


@dataclass(frozen=True)
class Encoded:
    """Ids of a batch of texts, int32 [tokens]; the ids of text t are ids[ends[t - 1] : ends[t]], ends int64 [texts]."""

    ids: Int32Array
    ends: Int64Array
    byte_ends: Int64Array
    """Of the texts, [texts]."""


# ---- the tokenizer's JSON ----


def _rule_of(facts: Any) -> tuple[int, int, int, int]:
    """`rule` of `encode_batch` for a pre-tokeniser's JSON."""
    parts = facts["pretokenizers"] if facts and facts["type"] == "Sequence" else [facts]
    kinds = [part and part["type"] for part in parts]
    last = parts[-1]
    if kinds[-1] != "ByteLevel" or last["add_prefix_space"]:
        raise UnsupportedError(f"its pre-tokeniser {' + '.join(map(str, kinds))}")
    if kinds == ["ByteLevel"] and last["use_regex"]:
        return kernels.GPT2, 0, kernels.LETTER, 0
    if kinds == ["Digits", "ByteLevel"] and last["use_regex"] and parts[0]["individual_digits"]:
        return kernels.GPT2, 0, kernels.LETTER, 1
    if kinds == ["Split", "ByteLevel"] and not last["use_regex"]:
        pattern = parts[0]["pattern"].get("Regex")
        if pattern in KNOWN_RULES and parts[0]["behavior"] == "Isolated" and not parts[0]["invert"]:
            return *KNOWN_RULES[pattern], 0
        raise UnsupportedError("the regular expression of its pre-tokeniser")
    raise UnsupportedError(f"its pre-tokeniser {' + '.join(map(str, kinds))}")


def _normalizes(facts: Any) -> bool:
    """Whether text is brought to NFC first; raises for any other normaliser."""
    parts = [facts] if facts and facts["type"] != "Sequence" else facts["normalizers"] if facts else []
    if any(part["type"] != "NFC" for part in parts):
        raise UnsupportedError(f"its normaliser {' + '.join(part['type'] for part in parts)}")
    return bool(parts)


def _check_model(model: dict[str, Any]) -> None:
    if model["type"] != "BPE":
        raise UnsupportedError(f"its model {model['type']}")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(name):
            raise UnsupportedError(f"{name} of its model")


def _pairs(merges: list[Any]) -> list[tuple[str, str]]:
    """Both ways in which JSON has them: `"a b"` and `["a", "b"]`."""
    split = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in merges]
    return [(left, right) for left, right in split]


def _code_points_with(missing: list[int]) -> list[tuple[int, int]]:
    """Ranges of the code points that are written with one of these bytes."""
    ranges = []
    for byte in missing:
        if byte < 0x80:
            ranges.append((byte, byte + 1))
        elif byte < 0xC0:
            raise UnsupportedError(f"its vocabulary without the byte {byte:#x}")
        elif 0xC2 <= byte < 0xE0:
            ranges.append(((byte - 0xC0) << 6, (byte - 0xC0 + 1) << 6))
        elif 0xE0 <= byte < 0xF0:
            ranges.append(((byte - 0xE0) << 12, (byte - 0xE0 + 1) << 12))
        elif 0xF0 <= byte < 0xF5:
            ranges.append(((byte - 0xF0) << 18, min((byte - 0xF0 + 1) << 18, CODE_POINTS)))
    return ranges


# ---- the encoder ----


class FastEncoder:
    """Byte-level BPE of one tokenizer. Pickles with its tables, without the words it has seen."""

    def __init__(self, tokenizer_json: str):
        """`tokenizer_json`: the text of tokenizer.json. Raises UnsupportedError."""
        facts = orjson.loads(tokenizer_json)
        model = facts["model"]
        _check_model(model)
        self._rule = np.array(_rule_of(facts["pre_tokenizer"]), dtype=np.int64)
        self._normalizes = _normalizes(facts["normalizer"])
        self._ignores_merges = bool(model.get("ignore_merges"))
        vocabulary: dict[str, int] = model["vocab"]
        digits, marks = self._rule[3] == 1, self._rule[2] & kernels.MARK > 0
        self._classes = PointClasses(digits=bool(digits), marks=bool(marks), normalizes=self._normalizes)
        self._set_vocabulary(vocabulary, model["merges"])
        self._set_added(facts["added_tokens"])
        self._words: Words | None = self._new_words()

    def _set_vocabulary(self, vocabulary: dict[str, int], merges: list[Any]) -> None:
        byte_of = byte_of_sign()
        self._byte_ids = np.zeros(256, dtype=np.int32)
        missing = []
        for sign, byte in byte_of.items():
            if sign in vocabulary:
                self._byte_ids[byte] = vocabulary[sign]
            else:
                missing.append(byte)
        for first, last in _code_points_with(missing):
            self._classes.add(first, last, kernels.ODD)
        lefts, rights = (list(side) for side in zip(*_pairs(merges), strict=True)) if merges else ([], [])
        slots = 1 << max(4, (2 * len(lefts)).bit_length())
        self._merges = (np.zeros(slots, np.uint64), np.zeros(slots, np.int32), np.zeros(slots, np.int32))
        sides = [
            np.fromiter(map(vocabulary.__getitem__, side), np.int32, len(lefts))
            for side in (lefts, rights, map(add, lefts, rights))
        ]
        fill_merges(*sides, *self._merges)
        if not byte_of.keys() >= set("".join(vocabulary)):
            vocabulary = {text: number for text, number in vocabulary.items() if byte_of.keys() >= set(text)}
        numbers = np.fromiter(vocabulary.values(), np.int64, len(vocabulary))
        self.byte_lengths = np.zeros(int(numbers.max(initial=-1)) + 1, dtype=np.int32)
        self.byte_lengths[numbers] = np.fromiter(map(len, vocabulary), np.int32, len(vocabulary))  # a sign is a byte
        self._whole_words = {}
        """Tokens that come before any merge, by their bytes."""
        if self._ignores_merges:
            self._whole_words = {bytes(map(byte_of.__getitem__, text)): number for text, number in vocabulary.items()}

    def _set_added(self, added: list[dict[str, Any]]) -> None:
        groups: dict[bool, list[tuple[str, int]]] = {False: [], True: []}
        for token in added:
            if token["lstrip"] or token["rstrip"] or token["single_word"]:
                raise UnsupportedError(f"the added token {token['content']!r}, which takes blanks around it")
            if token["content"]:
                groups[token["normalized"]].append((token["content"], token["id"]))
                if self._ignores_merges:
                    self._whole_words[token["content"].encode()] = token["id"]
        self._raw = self._added_table(groups[False], kernels.STARTS_RAW)
        self._normal = self._added_table(groups[True], kernels.STARTS_NORMAL)
        contents = {number: len(text.encode()) for group in groups.values() for text, number in group}
        lengths = np.zeros(max(len(self.byte_lengths), *(number + 1 for number in contents), 1), dtype=np.int32)
        lengths[: len(self.byte_lengths)] = self.byte_lengths
        lengths[list(contents)] = list(contents.values())
        self.byte_lengths = lengths

    def _added_table(self, tokens: list[tuple[str, int]], bit: int) -> tuple[Int32Array, npt.NDArray[np.uint32]]:
        rows, points = [], ""
        for text, number in sorted(tokens, key=lambda token: -len(token[0])):
            rows.append((len(points), len(text), number))
            points += text
            self._classes.add(ord(text[0]), ord(text[0]) + 1, bit)
        return np.array(rows, dtype=np.int32).reshape(-1, 3), _points(points)

    def _new_words(self) -> Words:
        """Memory of words: empty, or filled with the vocabulary where a token of its own comes before any merge."""
        prefilled = self._whole_words
        too_long = next((text for text in prefilled if len(text) > LONGEST_WORD), None)
        if too_long is not None:
            raise UnsupportedError(f"a token of {len(too_long)} bytes")
        slots = max(_WORD_SLOTS, 1 << (4 * len(prefilled)).bit_length())
        arena = 2 * sum(map(len, prefilled))
        words = Words.empty(slots, max(arena, 1 << 20))
        if arena > ARENA_BYTES or 2 * sum(len(text) > SHORT_WORD for text in prefilled) > len(words.longs):
            raise UnsupportedError("a vocabulary of very long tokens")
        for text, number in prefilled.items():
            remember(*padded(text), 0, len(text), np.array([number], np.int32), 0, 1, words)
        return words

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_words": None}

    def load(self) -> None:
        """Load the compiled loops, as the first texts would."""
        batch = self.batch(["é"])
        span, one = np.array([[0, 1]], dtype=np.int64), np.ones(1, dtype=np.int64)
        if all(self.can_encode(batch)):
            self.labels(batch, self.encode(batch), span, one, np.zeros(0, dtype=np.int64))

    def batch(self, texts: Sequence[str]) -> Batch:
        """Texts as `can_encode` and `encode` take them."""
        return Batch(texts)

    def can_encode(self, batch: Batch) -> list[bool]:
        """Per text, whether each of its bytes has a token and the tokenizer's normaliser surely leaves it as it is."""
        classes = self._classes.table
        odd = kernels.first_in_class(batch.points, classes, 0, kernels.ODD) < len(batch.points)
        if odd and self._classes.learn(batch.points):
            odd = kernels.first_in_class(batch.points, classes, 0, kernels.ODD) < len(batch.points)
        if not odd and (not self._normalizes or batch.is_ascii):
            return [True] * len(batch.texts)
        starts = [0, *batch.ends.tolist()]
        return [
            kernels.first_in_class(batch.points[:stop], classes, start, kernels.ODD) == stop
            and (not self._normalizes or unicodedata.is_normalized("NFC", text))
            for text, (start, stop) in zip(batch.texts, pairwise(starts), strict=True)
        ]

    def encode(self, batch: Batch) -> Encoded:
        """Ids of texts for which `can_encode` holds, without special tokens around them."""
        if self._words is None:  # after pickling
            self._words = self._new_words()
        ids = np.empty(len(batch.buffer), dtype=np.int32)
        ends, byte_ends = (np.empty(len(batch.texts), dtype=np.int64) for _ in range(2))
        count = kernels.encode_batch(
            batch.points,
            batch.buffer,
            batch.eights,
            batch.ends,
            self._classes.table,
            self._rule,
            *self._raw,
            *self._normal,
            self._byte_ids,
            *self._merges,
            self._words,
            ids,
            ends,
            byte_ends,
        )
        return Encoded(ids[:count], ends, byte_ends)

    def labels(
        self, batch: Batch, encoded: Encoded, spans: Int64Array, span_ends: Int64Array, special: Int64Array
    ) -> Int32Array:
        """Labels of encoded texts: the ids of the tokens that overlap a span, IGNORE_INDEX elsewhere, int32 [tokens].

        Args:
            spans: int64 [spans, 2], characters in all texts together, ascending and apart within a text.
            span_ends: int64 [texts], the number of spans up to each text's end.
            special: ids of tokens that do not belong to a span that starts after their first byte.
        """
        if not batch.is_ascii:
            spans = spans.copy()
            kernels.to_bytes(batch.points, batch.ends, encoded.byte_ends, span_ends, spans)
        labels = np.empty(len(encoded.ids), dtype=np.int32)
        is_special = np.zeros(len(self.byte_lengths), dtype=np.bool_)
        is_special[special] = True
        places = (encoded.byte_ends, span_ends, spans)
        kernels.mark_spans(encoded.ids, encoded.ends, self.byte_lengths, *places, is_special, labels, IGNORE_INDEX)
        return labels


def load_loops() -> None:
    """Load the compiled loops, whatever the tokenizer will be."""
    model = {"type": "BPE", "vocab": byte_of_sign(), "merges": []}
    plain = {"type": "ByteLevel", "use_regex": True, "add_prefix_space": False}
    facts = {"model": model, "pre_tokenizer": plain, "normalizer": None, "added_tokens": []}
    FastEncoder(orjson.dumps(facts).decode()).load()


def _points(text: str) -> npt.NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)


# ---- the proof ----

# fmt: off
_PIECES = [
    "a", "b", "Z", "é", "e\u0301", "ß", "İ", "ſ", "K", "中", "の", "한", "ᄒ", "א", "ع", "ा", "\u0300", "😀",
    "👩\u200d🚀", "🇫🇷", "0", "1", "42", "1234567", "٣", "Ⅷ", "½", "²", "①", "𝟘", " ", "  ", "\t", "\n", "\r", "\r\n",
    "\n\n ", "\u00a0", "\u2003", "\u3000", "\u2028", "\x0b", "\x1c", "\x85", "\u200b", "\ufeff", "'", "'s", "'S", "'ſ",
    "'re", "'LL", "'Ve", "'d", "'m", "'t", "''", "’s", ".", ",", "!", "?!", "(", ")", "/", "\\", "<", ">", "|", "<|",
    "|>", "_", "-", "—", "$", "€", "+", "=", "\x00", "\x7f", "\ufffd", "the", " the", "Hello", "WORLD", "camelCase",
    "don't", "I'll", "x" * 60, " " * 50, "ab" * 40, "\U0010ffff", "\ue000",
]
# fmt: on
_MIXED_STRINGS = 2000
_SAMPLE = 512


def adversarial_texts(added: Sequence[str]) -> list[str]:
    """Strings where splitting rules disagree first: every ordered pair of awkward pieces and added tokens, and random
    chains of them (a fixed draw)."""
    pieces = [*_PIECES, *added[:8], *(token[:-1] for token in added[:4] if len(token) > 1)]
    texts = [first + second for first in pieces for second in pieces]
    draw = np.random.PCG64(20_24).random_raw(_MIXED_STRINGS * 12)
    chains = (draw % np.uint64(len(pieces))).reshape(_MIXED_STRINGS, 12).tolist()
    return [*texts, *("".join(pieces[number] for number in chain) for chain in chains)]


def fast_encoder(tokenizer: Any, texts: Sequence[str]) -> FastEncoder | str:
    """The fast encoder of a tokenizer, or why there is none: unsupported, or other ids on one of `texts` or of the
    adversarial strings."""
    if not tokenizer.is_fast:
        return "it is not a fast tokenizer"
    if tokenizer.split_special_tokens:
        return "split_special_tokens is set"
    try:
        encoder = FastEncoder(tokenizer.backend_tokenizer.to_str())
    except UnsupportedError as error:
        return str(error)
    added = sorted(
        {token.content for token in tokenizer.added_tokens_decoder.values()}, key=lambda text: (-len(text), text)
    )
    different = first_difference(encoder, tokenizer, [*texts[:_SAMPLE], *adversarial_texts(added)])
    return encoder if different is None else f"other ids for {different[:60]!r}"


def first_difference(encoder: FastEncoder, tokenizer: Any, texts: Sequence[str]) -> str | None:
    """The first text that the two encode differently."""
    able = encoder.can_encode(encoder.batch(texts))
    wanted = [text for text, is_able in zip(texts, able, strict=True) if is_able]
    # A call turns truncation and padding off, and spends as long on Python's objects as its backend on the ids.
    tokenizer(wanted[:1] or "", add_special_tokens=False, return_attention_mask=False, verbose=False)
    expected = tokenizer.backend_tokenizer.encode_batch_fast(wanted, add_special_tokens=False)
    found = encoder.encode(encoder.batch(wanted))
    start = 0
    for text, theirs, end in zip(wanted, expected, found.ends.tolist(), strict=True):
        if found.ids[start:end].tolist() != theirs.ids:
            return text
        start = end
    return None
