"""Whose turn every byte of a block's text is: the openings of the template, looked for in what the ids say."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from eft.core.records import Int32Array, Int64Array
from eft.data.conversation_text import read_conversation
from eft.data.formats.example import MARK
from eft.data.gates_openings import Openings
from eft.data.store import TokenBlock

BoolArray = npt.NDArray[np.bool_]

_SLACK = 256
"""Bytes that a template may write between a turn's opening and its text, beside reasoning."""


class TokenBytes:
    """The bytes of ids, gathered from one table."""

    def __init__(self, texts: list[bytes]):
        self._lengths = np.array([len(text) for text in texts], dtype=np.int64)
        self._starts = np.cumsum(self._lengths) - self._lengths
        self._table = np.frombuffer(b"".join(texts), dtype=np.uint8)

    def text(self, ids: Int32Array) -> tuple[bytes, Int64Array]:
        """The text of all ids, and where each one's bytes start, int64 [tokens + 1]."""
        known = ids < len(self._lengths)
        chosen = np.where(known, ids, 0)
        lengths = np.where(known, self._lengths[chosen], 0)
        starts = np.concatenate([[0], np.cumsum(lengths)])
        places = np.repeat(self._starts[chosen] - starts[:-1], lengths) + np.arange(starts[-1])
        return self._table[places].tobytes(), starts


@dataclass(frozen=True)
class Regions:
    """The turns that were found in a block, in order of their text; int64 [turns] each."""

    owner: Int64Array
    """The sample of each turn."""
    role: Int64Array
    """Index into `roles`."""
    opens: Int64Array
    """First byte of its opening."""
    texts: Int64Array
    """First byte behind its opening."""
    roles: list[str]
    contents: list[tuple[int, int]]
    """First and last + 1 byte of contents, in order."""
    unlocated: int

    @property
    def is_assistant(self) -> BoolArray:
        return np.equal(self.role, self.roles.index("assistant"))

    def is_in_content(self, start: int, stop: int) -> bool:
        """Whether the row itself wrote these bytes."""
        return any(first <= start and stop <= last for first, last in self.contents)


class Locator:
    def __init__(self, openings: Openings):
        self._openings = openings
        self._roles = sorted({*openings.of_role, "user", "assistant", "system", "tool"})
        self._codes = {role: code for code, role in enumerate(self._roles)}
        known = sorted(openings.of_role.items(), key=lambda item: -len(item[1]))
        self._role_of = {opening: role for role, opening in known[::-1]}
        self._any = re.compile(b"|".join(re.escape(opening) for _, opening in known))

    def regions(self, block: TokenBlock, text: bytes, bounds: Int64Array) -> Regions:
        """The turns of each sample; `bounds` int64 [samples + 1] has the samples' first bytes."""
        found: list[tuple[int, int, int, int]] = []
        contents: list[tuple[int, int]] = []
        unlocated = 0
        limits = bounds.tolist()
        for number, conversation in enumerate(block.conversations):
            low, high = limits[number], limits[number + 1]
            if conversation is None:
                if self._openings.is_marked:
                    found += self._turns_of_text(number, text, low, high)
                continue
            turns = self._turns(conversation, text, low, high)
            if turns is None:
                unlocated += 1
                continue
            found += [(number, code, start, stop) for code, start, stop, _ in turns]
            contents += [content for _, _, _, content in turns if content is not None]
        table = np.array(found, dtype=np.int64).reshape(-1, 4)
        return Regions(table[:, 0], table[:, 1], table[:, 2], table[:, 3], self._roles, contents, unlocated)

    def _turns_of_text(self, number: int, text: bytes, low: int, high: int) -> Iterator[tuple[int, int, int, int]]:
        for match in self._any.finditer(text, low, high):
            yield number, self._codes[self._role_of[match.group()]], match.start(), match.end()

    def _turns(
        self, conversation: str, text: bytes, low: int, high: int
    ) -> list[tuple[int, int, int, tuple[int, int] | None]] | None:
        """(role, opening's first byte, last + 1, content) of each turn that is there; None where one is missing."""
        found: list[tuple[int, int, int, tuple[int, int] | None]] = []
        at, previous = low, ""
        for message in read_conversation(conversation)["messages"]:
            role = message["role"]
            opening = self._openings.before(previous, role)
            if opening is None or role not in self._codes:
                return None
            start = text.find(opening, at, high)
            if start < 0:
                # What is cut off, or shown by another sample of the row, is missing at the end only.
                return found or None
            stop = start + len(opening)
            content = message["content"].rpartition(MARK)[2].strip().encode(errors="replace")
            slack = _SLACK + 2 * len(message.get("reasoning_content") or "") * 4
            place = text.find(content, stop, min(high, stop + slack + len(content))) if content else stop
            if place < 0:
                is_cut = high - stop < slack + len(content)
                return [*found, (self._codes[role], start, stop, None)] if is_cut else None
            found.append((self._codes[role], start, stop, (place, place + len(content)) if content else None))
            at, previous = place + len(content), role
        return found
