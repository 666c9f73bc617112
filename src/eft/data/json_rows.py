"""JSON as rows stand in it, and what may be wrong with a row that is valid JSON."""

from __future__ import annotations

import json
import re
from typing import Any

import orjson

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_HALF_CHARACTER = "has an escape \\uD800 to \\uDFFF that is half of a character, so its text is not valid Unicode"


class KeyTwiceError(Exception):
    """An object has a key twice: of its values a plain decoder keeps the last one in silence."""

    def __init__(self, key: str):
        super().__init__(f"has the key {key!r} twice in one object, so which value is meant cannot be told")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise KeyTwiceError(next(name for name in names if names.count(name) > 1))
    return found


DECODER = json.JSONDecoder(object_pairs_hook=_object)
"""Decodes JSON; raises KeyTwiceError beside what any decoder raises."""


def quick_row(line: bytes) -> dict[str, Any] | None:
    """The object in a line, in half of `DECODER`'s time; None where only that one can tell what it is, or why not."""
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    # It keeps the last of a key that comes twice. A key ends in `":`, unless blanks come between.
    if type(value) is not dict or line.count(b'":') != _count_keys(value) or _BLANK_COLON.search(line):
        return None
    return value


_BLANK_COLON = re.compile(rb'"[ \t\r\n]+:')
_LEAST_ROUNDED = 2.0**63


def _count_keys(row: dict[str, Any]) -> int:
    """The keys of all objects in a row; -1 where a number may have been a whole one that orjson rounds."""
    count = 0
    inner: list[Any] = [row]
    for value in inner:
        kind = type(value)
        if kind is dict:
            count += len(value)
            inner += value.values()
        elif kind is list:
            inner += value
        elif kind is float and abs(value) >= _LEAST_ROUNDED:
            return -1
    return count


def json_problem(value: Any, raw: str) -> str | None:
    """What keeps a decoded JSON value from being a row, to follow `line 3:` or `item 3`; None where nothing does.

    `raw` is the JSON that gave it.
    """
    if not isinstance(value, dict):
        return f"is a JSON {type(value).__name__}"
    if "\\u" in raw and _SURROGATE.search(raw) and _has_half_character(value):
        return _HALF_CHARACTER
    return None


def _has_half_character(value: Any) -> bool:
    """Whether some text cannot be written as UTF-8: no tokenizer takes it."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False
