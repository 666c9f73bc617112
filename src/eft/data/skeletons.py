"""Conversations of one shape rendered once: what the template writes between their texts, and where what is trained is.

The shape of a conversation is its roles, and per text whether it is empty and what blanks stand at its ends. When a
shape comes for the second time, it is rendered with probe texts in place of its own, every span proven as `masks` does;
from then on its conversations are put together from the pieces. That is the same text and the same spans as long as the
template treats all texts of a shape alike, which `template_reading` tells of the template: a conversation that contains
one of its triggers, a special token's text, tools or marks of its own is rendered by itself, and so is one of a shape
whose second conversation came out otherwise than its pieces said.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from eft.core.records import Message
from eft.data.formats import Example
from eft.data.masks import MaskRules, Rendering, renderings
from eft.data.template_reading import triggers_of
from eft.data.token_facts import TokenizerFacts
from eft.data.turns import Layout, Span, UnprovableError

_TEXTS: tuple[Literal["content", "reasoning_content"], ...] = ("content", "reasoning_content")
_KNOWN = frozenset({"role", *_TEXTS})
_MOST_SHAPES = 4096
_MOST_BLANKS = 8
_HARD = ('"', "\\", "\n", "\t", "<&>", "é", "  ", "aB", "'", "{{", "%}", ":", "1")
"""Characters that a template which changes texts in any way would not leave alone."""

Shape = tuple[str | tuple[str, ...], ...]


class Text(NamedTuple):
    """What is tokenised: one rendering's text, and the spans of it that are trained; None: all of it."""

    text: str
    spans: list[Span] | None
    is_part: bool = False
    """As `masks.Rendering` has it."""


@dataclass(frozen=True)
class _Hole:
    """Where a text of the row goes."""

    turn: int
    name: Literal["content", "reasoning_content"]


_Edge = tuple[int, int]
"""A place in a skeleton: index of a piece, characters from its start."""


@dataclass
class Skeleton:
    """One rendering of a shape."""

    pieces: tuple[str | _Hole, ...]
    spans: tuple[tuple[_Edge, _Edge, float], ...] | None
    is_part: bool
    _own: list[str] = field(init=False)
    """The pieces, nothing in the place of a hole."""
    _holes: list[tuple[int, int, Literal["content", "reasoning_content"]]] = field(init=False)
    """Index of each hole's piece, its turn, the name of its text."""

    def __post_init__(self) -> None:
        self._own = [piece if isinstance(piece, str) else "" for piece in self.pieces]
        holes = ((at, piece) for at, piece in enumerate(self.pieces) if isinstance(piece, _Hole))
        self._holes = [(at, hole.turn, hole.name) for at, hole in holes]

    def filled(self, messages: Sequence[Message]) -> Text:
        """The rendering of a conversation of this shape."""
        parts = self._own.copy()
        for at, turn, name in self._holes:
            parts[at] = messages[turn][name].strip()
        if self.spans is None:
            return Text("".join(parts), None, self.is_part)
        starts = list(accumulate(map(len, parts), initial=0))
        spans = [
            Span(starts[first] + into, starts[last] + beyond, weight)
            for (first, into), (last, beyond), weight in self.spans
        ]
        return Text("".join(parts), spans, self.is_part)


class Skeletons:
    """The shapes met so far, for one template and one set of rules."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template: str, rules: MaskRules, facts: TokenizerFacts
    ) -> None:
        self._tokenizer, self._template, self._rules, self._facts = tokenizer, template, rules, facts
        self._triggers = triggers_of(template)
        self._seen: set[Shape] = set()
        self._known: dict[Shape, list[Skeleton] | None] = {}

    def texts(self, example: Example) -> list[Text] | None:
        """The example's renderings; None where it has to be rendered by itself."""
        messages = example.messages
        assert messages is not None
        if self._triggers is None or example.tools or example.marks is not None:
            return None
        shape = _shape_of(messages)
        if shape is None or self._is_singular(messages):
            return None
        if shape not in self._known:
            if shape not in self._seen:  # a shape that never comes again is not worth its probes
                self._seen.add(shape)
                return None
            self._known[shape] = self._learnt(messages) if len(self._known) < _MOST_SHAPES else None
        skeletons = self._known[shape]
        return None if skeletons is None else [skeleton.filled(messages) for skeleton in skeletons]

    def _is_singular(self, messages: Sequence[Message]) -> bool:
        """Whether a text has something in it that the template, or the tokenizer, may take notice of."""
        texts = [message["content"] for message in messages]
        for message in messages:
            if len(message) > 2:
                texts += [message[name] for name in _TEXTS[1:] if name in message]
        joined = "\0".join(texts)
        assert self._triggers is not None
        return self._triggers.search(joined) is not None or self._facts.special.search(joined) is not None

    def _learnt(self, messages: list[Message]) -> list[Skeleton] | None:
        """The skeletons of this conversation's shape; None where they are not those of the conversation itself."""
        probes: dict[str, _Hole] = {}
        probed: list[Message] = []
        for turn, message in enumerate(messages):
            changed = message.copy()
            for name in _TEXTS:
                text = message.get(name)
                if isinstance(text, str) and text.strip():
                    probe = self._probe(len(probes))
                    probes[probe] = _Hole(turn, name)
                    lead = text[: len(text) - len(text.lstrip())]
                    changed[name] = lead + probe + text[len(text.rstrip()) :]
            probed.append(changed)
        try:
            skeletons = [_skeleton(rendering, probes) for rendering in self._rendered(probed)]
            own = [Text(each.layout.text, each.spans, each.is_part) for each in self._rendered(messages)]
        except UnprovableError:
            return None
        if any(skeleton is None for skeleton in skeletons):
            return None
        whole = [skeleton for skeleton in skeletons if skeleton is not None]
        return whole if [skeleton.filled(messages) for skeleton in whole] == own else None

    def _rendered(self, messages: list[Message]) -> list[Rendering]:
        layout = Layout(self._tokenizer, self._template, messages, None, self._facts)
        return renderings(layout, None, self._rules)

    def _probe(self, number: int) -> str:
        """A text that the template treats like any other, and that no other text contains."""
        assert self._triggers is not None
        parts = [part for part in _HARD if self._triggers.search(part) is None]
        probe = f"Qx{number}q{''.join(parts)}Zy{number}z"
        return probe if self._triggers.search(probe) is None else f"Qx{number}qZy{number}z"


def _shape_of(messages: Sequence[Message]) -> Shape | None:
    """None for a conversation with anything but roles and texts."""
    roles: list[str] = []
    for message in messages:
        content = message["content"]
        if len(message) > 2 or not content or len(content.strip()) != len(content):
            break
        roles.append(message["role"])
    else:
        return tuple(roles)  # nearly all: nothing but texts without blanks at their ends
    shape: list[tuple[str, ...]] = []
    for message in messages:
        if not message.keys() <= _KNOWN:
            return None
        parts = [message["role"]]
        for name in _TEXTS:
            text = message.get(name)
            if not isinstance(text, str):
                parts.append("-")
                continue
            core = text.strip()
            if len(text) - len(core) > _MOST_BLANKS:
                return None
            at = text.find(core) if core else len(text)
            parts += [text[:at], "x" if core else "", text[at + len(core) :]]
        shape.append(tuple(parts))
    return tuple(shape)


def _skeleton(rendering: Rendering, probes: dict[str, _Hole]) -> Skeleton | None:
    """The rendering of probe texts in pieces; None where a span starts or ends inside a text."""
    text = rendering.layout.text
    places = sorted((at, at + len(probe), hole) for probe, hole in probes.items() for at in _all_places(text, probe))
    pieces: list[str | _Hole] = []
    starts: list[int] = []
    position = 0
    for start, stop, hole in places:
        pieces += [text[position:start], hole]
        starts += [position, start]
        position = stop
    pieces.append(text[position:])
    starts.append(position)
    if rendering.spans is None:
        return Skeleton(tuple(pieces), None, rendering.is_part)
    spans = []
    for span in rendering.spans:
        edges = [_edge(at, pieces, starts) for at in (span.start, span.stop)]
        if edges[0] is None or edges[1] is None:
            return None
        spans.append((edges[0], edges[1], span.weight))
    return Skeleton(tuple(pieces), tuple(spans), rendering.is_part)


def _all_places(text: str, word: str) -> list[int]:
    places = []
    at = text.find(word)
    while at >= 0:
        places.append(at)
        at = text.find(word, at + len(word))
    return places


def _edge(position: int, pieces: list[str | _Hole], starts: list[int]) -> _Edge | None:
    """A place between the template's own characters, or at an end of a text; None inside a text."""
    for index in range(len(pieces) - 1, -1, -1):
        if starts[index] <= position:
            into = position - starts[index]
            return None if isinstance(pieces[index], _Hole) and into else (index, into)
    return None
