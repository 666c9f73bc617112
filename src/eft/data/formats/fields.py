"""Reading the fields of a row: one message for whatever is wrong with them."""

from __future__ import annotations

import json
from typing import Any

from eft.core.errors import DataError, nearest

_LONGEST_LIST = 12
_TELLING = {
    "messages": "chat_template",
    "conversations": "sharegpt",
    "instruction": "alpaca",
    "segments": "input_output",
    "input_ids": "pretokenized",
    "text": "completion",
}
"""Fields that tell the format of a row."""


def listed(names: Any) -> str:
    """The names of a row's fields, for a message."""
    shown = [_short(str(name)) for name in list(names)[:_LONGEST_LIST]]
    more = len(names) - len(shown)
    return (", ".join(shown) or "no fields") + (f" and {more} more" if more else "")


def _short(text: str, longest: int = 40) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"


def shown(value: Any) -> str:
    """A value for a message: short, and safe for whatever a row may hold."""
    if isinstance(value, str):
        return _short(repr(value[:60]))
    if value is None or isinstance(value, (bool, float)) or (isinstance(value, int) and value.bit_length() < 64):
        return repr(value)
    return f"a {type(value).__name__}"


_DEEPEST = 64


def require_json(where: str, value: Any, name: str) -> Any:
    """The value, which templates print as JSON. Raises DataError where it is none, or is nested without end."""
    problem = _not_json(value, 0)
    if problem is not None:
        raise DataError(f"{where}: {name} {problem}; expected what JSON can say")
    return value


def _not_json(value: Any, depth: int) -> str | None:
    if depth > _DEEPEST:
        return f"is nested more than {_DEEPEST} deep"
    if value is None or isinstance(value, (str, bool, float)):
        return None
    if isinstance(value, int):
        return None if value.bit_length() < 4096 else "has a number of more than a thousand digits"
    if isinstance(value, (list, tuple)):
        return next((problem for item in value if (problem := _not_json(item, depth + 1))), None)
    if isinstance(value, dict):
        if not all(isinstance(name, str) for name in value):
            return "has a name that is not text"
        return next((problem for item in value.values() if (problem := _not_json(item, depth + 1))), None)
    return f"has a {type(value).__name__}"


def field(where: str, data: dict[str, Any], name: str, key: str | None, expected: str) -> Any:
    """The value of a required field; a null counts as missing. `key` is the config key that names the field, if one
    does."""
    value = data.get(name)
    if value is not None:
        return value
    problem = f"field {name!r} is null" if name in data else f"no field {name!r}"
    close = None if name in data else nearest(name, [str(other) for other in data])
    hint = "" if key is None else f" (`{key}` names it)"
    told = next((column for column in _TELLING if column in data), None) if name in _TELLING else None
    if told is not None and close is None and name not in data:
        hint = f"; rows with {told!r} are those of `type: {_TELLING[told]}`"
    elif close is not None:
        hint = f"; did you mean `{key}: {close}`?" if key else f"; rename {close!r}"
    raise DataError(f"{where}: {problem}, expected {expected}; the row has {listed(data)}{hint}")


def text(where: str, data: dict[str, Any], name: str, key: str | None = None) -> str:
    """A required text."""
    value = field(where, data, name, key, "text")
    if not isinstance(value, str):
        raise DataError(f"{where}: field {name!r} is a {type(value).__name__}, expected text")
    return value


def optional_text(where: str, data: dict[str, Any], name: str) -> str:
    """A text, empty where the field is missing or null."""
    return text(where, data, name) if data.get(name) is not None else ""


def is_given(value: Any) -> bool:
    """Whether a value says anything: not null and not empty."""
    return value is not None and not (isinstance(value, (str, list, dict)) and not value)


def parsed(where: str, value: Any, name: str, expected: str = "a list") -> Any:
    """A value that some data sets store as JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:  # no JSON, nested too deeply, a number of thousands of digits
        problem = f"{where}: {name!r} is text but not JSON ({error})"
        raise DataError(f"{problem}; expected {expected} or JSON text") from error
