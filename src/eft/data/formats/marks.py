"""What a row says about the training of its own turns: `train`, `weight`, and parts of a turn's content."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from eft.core.errors import DataError
from eft.core.records import Message
from eft.data.formats.example import UNMARKED, Part, TurnMark
from eft.data.formats.fields import is_given, listed, parsed, shown


@dataclass(frozen=True)
class MarkFields:
    """Names of the properties of a turn that speak of its training; None: such a property is not looked at."""

    training: str | None = None
    detail: str | None = None
    weight: str = "weight"


NO_MARKS = MarkFields()


def mark_of(where: str, turn: dict[str, Any], content_name: str, message: Message, fields: MarkFields) -> TurnMark:
    """What the row says of this turn. Raises DataError for a value that says nothing."""
    train = turn.get(fields.training) if fields.training is not None else None
    if train is not None and not isinstance(train, bool):
        raise DataError(f"{where}: {fields.training!r} is {shown(train)}, expected true or false")
    given = turn.get(fields.weight)
    weight = 1.0 if given is None else _weight(where, given, fields.weight)
    detail = turn.get(fields.detail) if fields.detail is not None else None
    content = turn.get(content_name)
    if is_given(detail):
        parts = _details(where, detail, str(fields.detail), content, message)
        return TurnMark(train, weight, parts, parts_only=True)
    if isinstance(content, list) and any(
        isinstance(part, dict) and (part.get("train") is not None or part.get("weight") is not None) for part in content
    ):
        return TurnMark(train, weight, _content_parts(where, content, message))
    return UNMARKED if train is None and weight == 1.0 else TurnMark(train, weight)


def _weight(where: str, value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1e6 or math.isnan(value):
        raise DataError(f"{where}: {name!r} is {shown(value)}, expected a number from 0 to 1e6")
    return float(value)


def _train(where: str, value: Any, name: str) -> bool:
    if not isinstance(value, bool):
        raise DataError(f"{where}: 'train' of {name} is {shown(value)}, expected true or false")
    return value


def _details(where: str, detail: Any, name: str, content: Any, message: Message) -> tuple[Part, ...]:
    """Parts given by the characters where they begin and end, both included."""
    detail = parsed(where, detail, name)
    if not isinstance(content, str) or content != message["content"]:
        raise DataError(f"{where}: {name!r} needs a content that is one text, and that nothing is split from")
    if not isinstance(detail, list):
        raise DataError(f"{where}: {name!r} is a {type(detail).__name__}, expected a list")
    parts = []
    for number, item in enumerate(detail, 1):
        at = f"item {number} of {name!r}"
        if not isinstance(item, dict):
            raise DataError(f"{where}: {at} is a {type(item).__name__}, expected {{begin_offset, end_offset, train}}")
        begin, end = item.get("begin_offset"), item.get("end_offset")
        if type(begin) is not int or type(end) is not int or not 0 <= begin <= end < len(content):
            raise DataError(
                f"{where}: {at} has begin_offset {shown(begin)} and end_offset {shown(end)}; expected characters of "
                f"the content, from 0 to {len(content) - 1} (it has {listed(item)})"
            )
        given = item.get("weight")
        weight = 1.0 if given is None else _weight(where, given, f"weight of {at}")
        parts.append(Part(begin, end + 1, _train(where, item.get("train"), at), weight))
    return tuple(parts)


def _content_parts(where: str, content: list[Any], message: Message) -> tuple[Part, ...]:
    """Parts that are content parts with `train` or `weight` of their own."""
    parts = []
    start = 0
    for number, part in enumerate(content, 1):
        text = part if isinstance(part, str) else part["text"]
        if isinstance(part, dict) and text:
            train, given = part.get("train"), part.get("weight")
            at = f"content part {number}"
            weight = 1.0 if given is None else _weight(where, given, f"weight of {at}")
            parts.append(Part(start, start + len(text), None if train is None else _train(where, train, at), weight))
        elif text:
            parts.append(Part(start, start + len(text), None))
        start += len(text)
    if start != len(message["content"]):
        raise DataError(f"{where}: content parts with 'train' or 'weight' cannot be split into reasoning and answer")
    return tuple(parts)
