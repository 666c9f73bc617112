"""One pass over a token store: what the gates need to know of every sample, counted with NumPy block by block.

The ids are turned back into text by the bytes that each token writes, and the openings of the template's turns are
looked for in it, so that every token has a role that owes nothing to the code that made the masks.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from eft.config.data import GateName
from eft.core.constants import IGNORE_INDEX
from eft.core.records import Int32Array, Int64Array
from eft.data.block_set import BlockSet
from eft.data.gates_openings import Openings
from eft.data.gates_turns import Locator, Regions, TokenBytes
from eft.data.store import TokenBlock, TokenStore

BoolArray = npt.NDArray[np.bool_]
UInt64Array = npt.NDArray[np.uint64]

WORST_KEPT = 8
"""Samples named per gate."""
_EMPTY_REASONING = re.compile(rb"<think>\s*</think>")
_NO_LETTERS = bytes(code for code in range(128) if not chr(code).isalnum())
_LOWER = bytes(ord(chr(code).lower()) if code < 128 else code for code in range(256))
_NO_WORD = re.compile(r"[\W_]+")


@dataclass(frozen=True)
class SurveyRules:
    """What of a data set's config and tokenizer the survey goes by; JSON-able."""

    ends: tuple[int, ...]
    """Ids that end a turn or a text."""
    specials: tuple[int, ...]
    """A trained stretch that ends with one of these has an end."""
    bos: int | None
    text_has_bos: bool
    """A plain call of the tokenizer puts BOS first."""
    untrained_roles: tuple[str, ...] | None
    """Roles that must not be trained; None: any may."""
    judges_ends: bool
    ends_text: bool
    """A row that is no conversation ends with EOS."""
    has_prompts: bool
    """And begins with a prompt."""
    capacity: int
    """Tokens of the longest sample that is not cut."""


@dataclass
class Count:
    """Of how many things how many were faulty, and the samples with most faults."""

    faulty: int = 0
    judged: int = 0
    worst: list[tuple[int, int]] = field(default_factory=list)
    """(sample, faults), most first."""

    def add(self, first: int, faults: npt.NDArray[Any], judged: int) -> None:
        """Count a block's samples from number `first` on; `faults` [samples]."""
        self.judged += judged
        self.faulty += int(faults.sum())
        found = np.flatnonzero(faults)
        if len(found):
            found = found[np.argsort(-faults[found].astype(np.int64), kind="stable")[:WORST_KEPT]]
            pairs = [(first + int(index), int(faults[index])) for index in found]
            self.worst = sorted([*self.worst, *pairs], key=lambda pair: -pair[1])[:WORST_KEPT]


@dataclass
class Survey:
    """What one pass over a store found."""

    counts: dict[str, Count]
    roles: dict[str, tuple[int, int]]
    """Role → (tokens, trained tokens), where roles could be told."""
    conversations: int
    unlocated: int
    """Conversations whose turns could not be found in their ids."""
    text_keys: UInt64Array
    """Equal for samples whose texts differ by nothing but case, blanks and punctuation, uint64 [samples]."""

    def to_json(self) -> dict[str, Any]:
        return {
            "counts": {name: [count.faulty, count.judged, count.worst] for name, count in self.counts.items()},
            "roles": self.roles,
            "conversations": self.conversations,
            "unlocated": self.unlocated,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any], text_keys: UInt64Array) -> Survey:
        counts = {
            name: Count(faulty, judged, [(index, faults) for index, faults in worst])
            for name, (faulty, judged, worst) in value["counts"].items()
        }
        roles = {role: (tokens, trained) for role, (tokens, trained) in value["roles"].items()}
        return cls(counts, roles, value["conversations"], value["unlocated"], text_keys)


PER_STORE: tuple[GateName, ...] = (
    "bos",
    "end_tokens",
    "cut_answers",
    "fully_trained",
    "other_roles",
    "headers",
    "empty_reasoning",
)


def survey(
    store: TokenStore | BlockSet, rules: SurveyRules, openings: Openings | None, texts: list[bytes] | None
) -> Survey:
    """Look at every sample of a data set.

    Args:
        store: the samples.
        rules: what counts as a fault.
        openings: of the data set's template, or of the tokenizer's for ids of unknown origin.
        texts: what each token writes; None: it cannot be told, and roles are not looked for.
    """
    surveyor = _Surveyor(rules, openings, texts)
    keys = np.zeros(len(store), dtype=np.uint64)
    first = 0
    for block in store.blocks():
        keys[first : first + len(block)] = surveyor.look_at(first, block)
        first += len(block)
    return Survey(surveyor.counts, surveyor.roles, surveyor.conversations, surveyor.unlocated, keys)


@dataclass(frozen=True)
class _Tokens:
    """A block's tokens end to end, [tokens] each."""

    ids: Int32Array
    trained: BoolArray
    starts: Int64Array
    """First token of each sample, int64 [samples + 1]."""
    owner: Int64Array
    """The sample of each token."""

    @classmethod
    def of(cls, block: TokenBlock) -> _Tokens:
        starts = block.offsets.astype(np.int64)
        trained = block.labels != IGNORE_INDEX
        trained[starts[:-1]] = False  # nothing predicts the first token
        return cls(block.ids, trained, starts, np.repeat(np.arange(len(block)), np.diff(starts)))

    def per_sample(self, at: npt.NDArray[Any]) -> Int64Array:
        """How many of the tokens `at` each sample has, int64 [samples]."""
        return np.bincount(self.owner[at], minlength=len(self.starts) - 1)


class _Surveyor:
    def __init__(self, rules: SurveyRules, openings: Openings | None, texts: list[bytes] | None):
        self._rules, self._openings = rules, openings
        self._bytes = None if texts is None else TokenBytes(texts)
        self._locator = None if openings is None or texts is None else Locator(openings)
        self._ends, self._specials = np.array(rules.ends, np.int64), np.array(rules.specials, np.int64)
        self.counts: dict[str, Count] = {name: Count() for name in PER_STORE}
        self.roles: dict[str, tuple[int, int]] = {}
        self.conversations = self.unlocated = 0

    def look_at(self, first: int, block: TokenBlock) -> UInt64Array:
        """Count a block's samples; returns their text keys."""
        tokens = _Tokens.of(block)
        regions = text = None
        byte_starts = np.zeros(1, np.int64)
        if self._bytes is not None:
            text, byte_starts = self._bytes.text(tokens.ids)
        if self._locator is not None and text is not None:
            regions = self._locator.regions(block, text, byte_starts[tokens.starts])
            self.unlocated += regions.unlocated
        is_chat = np.array([conversation is not None for conversation in block.conversations], dtype=np.bool_)
        self.conversations += int(is_chat.sum())
        has_turns = is_chat.copy()
        if regions is not None and self._openings is not None and self._openings.is_marked:
            has_turns[regions.owner[regions.is_assistant]] = True
        self._count_bos(first, tokens, block, is_chat, has_turns)
        self._count_ends(first, tokens, block, has_turns, is_chat)
        if self._rules.untrained_roles is not None:
            judged = has_turns | self._rules.has_prompts
            full = judged & (tokens.per_sample(tokens.trained) == np.diff(tokens.starts) - 1)
            self.counts["fully_trained"].add(first, full, int(judged.sum()))
        if regions is not None and text is not None:
            self._count_regions(first, tokens, regions, byte_starts)
            self._count_empty_reasoning(first, tokens, regions, text, byte_starts)
        return _text_keys(block, text, byte_starts[tokens.starts] if text is not None else None, tokens)

    # ---- ids and labels alone ----

    def _count_bos(
        self, first: int, tokens: _Tokens, block: TokenBlock, is_chat: BoolArray, has_turns: BoolArray
    ) -> None:
        if self._rules.bos is None:
            return
        is_bos = tokens.ids == self._rules.bos
        number = tokens.per_sample(is_bos)
        starts_so = is_bos[tokens.starts[:-1]]
        twice = np.zeros(len(is_bos), dtype=np.bool_)
        twice[1:] = is_bos[1:] & is_bos[:-1] & (tokens.owner[1:] == tokens.owner[:-1])
        faults = tokens.per_sample(twice) > 0
        if self._openings is not None and self._openings.num_bos == 1:
            faults |= has_turns & ((number != 1) | ~starts_so)
        if self._rules.text_has_bos and self._rules.ends_text:
            faults |= ~has_turns & block.starts_row & ~starts_so
        self.counts["bos"].add(first, faults, len(faults))

    def _count_ends(
        self, first: int, tokens: _Tokens, block: TokenBlock, has_turns: BoolArray, is_chat: BoolArray
    ) -> None:
        """Every trained stretch must end with an end token, and an end token behind one must belong to it."""
        if not self._rules.judges_ends or not len(self._ends):
            return
        trained = tokens.trained
        is_last = np.zeros(len(trained), dtype=np.bool_)
        is_last[tokens.starts[1:] - 1] = True
        stops = np.flatnonzero(trained & (is_last | ~np.append(trained[1:], False)))
        owner, at_end = tokens.owner[stops], is_last[stops]
        ended = np.isin(tokens.ids[stops], self._specials)
        following = tokens.ids[np.minimum(stops + 1, len(trained) - 1)]
        cut_off = ~ended & ~at_end & np.isin(following, self._ends)
        needs_end = has_turns | (self._rules.ends_text & block.ends_row)
        if self._openings is not None and not self._openings.end_ids:
            needs_end &= ~has_turns
        is_cut = at_end & ~ended & (np.diff(tokens.starts)[owner] >= self._rules.capacity)
        missing = ~ended & needs_end[owner] & ~is_cut
        wrong = stops[cut_off | missing]
        self.counts["end_tokens"].add(first, tokens.per_sample(wrong), len(stops))
        cut = tokens.per_sample(stops[is_cut & needs_end[owner]])
        self.counts["cut_answers"].add(first, cut, int(needs_end.sum()))

    # ---- roles ----

    def _count_regions(self, first: int, tokens: _Tokens, regions: Regions, byte_starts: Int64Array) -> None:
        if not len(regions.owner):
            return
        cumulated = np.concatenate([[0], np.cumsum(tokens.trained & ~np.isin(tokens.ids, self._ends))])
        whole = np.concatenate([[0], np.cumsum(tokens.trained)])
        opens = np.searchsorted(byte_starts, regions.opens, side="left")
        texts = (
            np.searchsorted(byte_starts, regions.texts, side="right") - 1
        )  # a token that reaches into the text is text
        texts = np.maximum(texts, opens)
        closes = np.append(opens[1:], 0)
        is_last = np.append(regions.owner[1:] != regions.owner[:-1], True)
        closes[is_last] = tokens.starts[regions.owner[is_last] + 1]
        header = cumulated[texts] - cumulated[opens]
        inside = cumulated[closes] - cumulated[texts]
        num_samples = len(tokens.starts) - 1
        for number, role in enumerate(regions.roles):
            mine = regions.role == number
            size = int((closes - opens)[mine].sum())
            trained = int((whole[closes] - whole[opens])[mine].sum())
            before = self.roles.get(role, (0, 0))
            self.roles[role] = before[0] + size, before[1] + trained
        untrained = self._rules.untrained_roles
        if untrained is None:
            return
        judged = len(np.unique(regions.owner))
        headers = np.bincount(regions.owner, weights=header, minlength=num_samples).astype(np.int64)
        self.counts["headers"].add(first, headers > 0, judged)
        is_wrong = np.isin(regions.role, [index for index, role in enumerate(regions.roles) if role in untrained])
        inside = np.bincount(regions.owner[is_wrong], weights=inside[is_wrong], minlength=num_samples).astype(np.int64)
        self.counts["other_roles"].add(first, inside > 0, judged)

    def _count_empty_reasoning(
        self, first: int, tokens: _Tokens, regions: Regions, text: bytes, byte_starts: Int64Array
    ) -> None:
        if self._rules.untrained_roles is None:
            return
        faults = np.zeros(len(tokens.starts) - 1, dtype=np.bool_)
        for match in _EMPTY_REASONING.finditer(text):
            start, stop = np.searchsorted(byte_starts, [match.start() + 1, match.end()], side="left")
            owner = int(tokens.owner[start - 1])
            is_own = regions.is_in_content(match.start(), match.end())
            faults[owner] |= bool(tokens.trained[start - 1 : stop].any()) and not is_own
        self.counts["empty_reasoning"].add(first, faults, len(faults))


def _text_keys(block: TokenBlock, text: bytes | None, bounds: Int64Array | None, tokens: _Tokens) -> UInt64Array:
    """A hash of each sample's text without case, blanks and punctuation: of its row's turns, or of its own tokens."""
    keys = []
    limits: Sequence[int] = [] if bounds is None else bounds.tolist()
    starts = tokens.starts.tolist()
    for number, conversation in enumerate(block.conversations):
        if conversation is not None:
            content = conversation.encode(errors="replace")
        elif text is not None:
            content = text[limits[number] : limits[number + 1]]
        else:
            content = tokens.ids[starts[number] : starts[number + 1]].tobytes()
            keys.append(_hash(content))
            continue
        keys.append(_hash(_normalised(content)))
    return np.array(keys, dtype=np.uint64)


def _normalised(content: bytes) -> bytes:
    plain = content.translate(_LOWER, _NO_LETTERS)
    return plain if plain.isascii() else _NO_WORD.sub("", plain.decode(errors="replace").casefold()).encode()


def _hash(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
