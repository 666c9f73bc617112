"""What a format makes of a row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from eft.config.data import DatasetConfig
from eft.core.records import Message, Segment, TokenSample
from eft.data.readers import Row

MARK = "\ufdd0"
"""Stands for an image in the text of a turn. A noncharacter: Unicode keeps it for uses like this, no text holds it."""


@dataclass(frozen=True)
class Part:
    """Characters [start, stop) of a turn's content that have a mask or weight of their own."""

    start: int
    stop: int
    train: bool | None
    """None: as the turn."""
    weight: float = 1.0


@dataclass(frozen=True)
class TurnMark:
    """What the row itself says about the training of one turn."""

    train: bool | None = None
    """None: `roles_to_train` decides."""
    weight: float = 1.0
    """Weight of the turn's trained tokens in the loss, ≥ 0."""
    parts: tuple[Part, ...] = ()
    """Where there are any: content outside of them is not trained."""
    parts_only: bool = False
    """Reasoning and tool calls of the turn are not trained either."""


UNMARKED = TurnMark()


@dataclass(slots=True)
class Example:
    """One row after its format: exactly one of `messages`, `segments` and `sample` is set."""

    where: str
    """File and row, the start of every later message about it."""
    messages: list[Message] | None = None
    tools: list[dict[str, Any]] | None = None
    """Tool definitions in the OpenAI form, only beside `messages`."""
    marks: tuple[TurnMark, ...] | None = None
    """One per message; None where the row says nothing about any."""
    segments: list[Segment] | None = None
    is_cut_to_fit: bool = False
    """Whether segments that give more than `sequence_len` tokens become several samples."""
    sample: TokenSample | None = None

    def __post_init__(self) -> None:
        assert sum(part is not None for part in (self.messages, self.segments, self.sample)) == 1, self
        assert self.marks is None or (self.messages is not None and len(self.marks) == len(self.messages)), self


Format = Callable[[Row, DatasetConfig], Example]
