"""What a key accepts, in words, and pydantic's errors as messages that say what to write instead."""

from __future__ import annotations

import json
import re
from typing import Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from eft.config.axolotl_values import value_advice
from eft.config.section import Section, type_members
from eft.config.source import Document, KeyPath, dotted, literal_values
from eft.core.errors import nearest

_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", Any: "any value"}
_PLURALS = {str: "texts", int: "whole numbers", float: "numbers", bool: "true or false", Any: "values"}
_SIGNS = {Ge: ("ge", "≥"), Gt: ("gt", ">"), Le: ("le", "≤"), Lt: ("lt", "<")}
_SECRET = re.compile(r"(api_?key|secret|password|passwd|auth_token|hf_token|access_token)", re.IGNORECASE)
_LONGEST_VALUE = 60


def describe_field(info: FieldInfo) -> str:
    """What a key accepts: `a whole number ≥ 1`."""
    words = describe_type(info.annotation)
    bounds = [f"{sign} {getattr(bound, name):g}" for bound in info.metadata for kind, (name, sign) in _SIGNS.items()
              if isinstance(bound, kind)]  # fmt: skip
    not_empty = any(isinstance(bound, MinLen) for bound in info.metadata)
    return f"{words} {' and '.join(bounds)}".strip() + (" (not empty)" if not_empty else "")


def describe_type(annotation: Any) -> str:
    """The alternatives of a type in words; null is left out, since it always means the default."""
    literals = [f"`{value}`" for value in literal_values(annotation)]
    others = [_describe_member(member) for member in type_members(annotation)
              if member is not type(None) and get_origin(member) is not Literal]  # fmt: skip
    choices = [*others, *literals]
    if len(choices) == 1:
        return choices[0]
    return ", ".join(choices[:-1]) + " or " + choices[-1]


def _describe_member(member: Any) -> str:
    if get_origin(member) is list:
        (item,) = get_args(member)
        return f"a list of {_plural(item)}"
    if get_origin(member) is dict:
        name, value = get_args(member)
        known = ", ".join(f"`{option}`" for option in literal_values(name))
        return f"a mapping of {known or 'names'} to {_plural(value)}"
    if isinstance(member, type) and issubclass(member, Section):
        return "a mapping with " + ", ".join(
            f"`{name}`" for name, info in member.model_fields.items() if info.is_required()
        )
    return _WORDS[member]


def _plural(item: Any) -> str:
    if isinstance(item, type) and issubclass(item, Section):
        required = ", ".join(f"`{name}`" for name, info in item.model_fields.items() if info.is_required())
        return f"entries with {required}"
    return _PLURALS[item] if item in _PLURALS else describe_type(item).removeprefix("a ").replace("list of", "lists of")


def show_value(key: str, value: Any) -> str:
    """A value as YAML would have it on one line, shortened; credentials are never shown."""
    if _SECRET.search(key):
        return "***"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    text = hide_credentials(" ".join(text.split()))
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 1] + "…"


def hide_credentials(text: str) -> str:
    """Replace `user:password@` in addresses."""
    return re.sub(r"(://)[^/\s:@]*:[^/\s@]+@", r"\1***@", text)


def add_validation_problems(document: Document, error: ValidationError, root: type[Section]) -> set[KeyPath]:
    """Note one problem per wrong or missing key; returns the paths of those keys."""
    broken: set[KeyPath] = set()
    for item in error.errors():
        path, info = _field_path(item["loc"], root)
        if path in broken or info is None:
            continue
        broken.add(path)
        name = dotted(path)
        if item["type"] == "missing":
            document.add_problem(path, f"`{name}` is missing: {info.description}")
            continue
        value = _value_at(document.values, path)
        text = f"`{name}: {show_value(name, value)}`: expected {describe_field(info)}"
        options = [str(option) for option in literal_values(info.annotation)]
        close = nearest(value, options) if isinstance(value, str) else None
        if advice := value_advice(str(path[-1]), value):
            text += f"; {advice}"
        elif close is not None:
            text += f"; did you mean `{close}`?"
        elif isinstance(value, bool) and str in type_members(info.annotation):
            text += "; put it in quotes if the word is meant"
        elif info.is_required() is False and value == [] and literal_values(info.annotation) == []:
            text += "; leave the key out for the default"
        document.add_problem(path, text)
    return broken


def _field_path(loc: tuple[int | str, ...], root: type[Section]) -> tuple[KeyPath, FieldInfo | None]:
    """The config key an error belongs to; pydantic's `loc` also names union members and positions inside a value."""
    path: KeyPath = ()
    section: type[Section] | None = root
    info: FieldInfo | None = None
    entry: tuple[int, ...] = ()
    for part in loc:
        if isinstance(part, int):
            entry = (part,)
        elif section is not None and part in section.model_fields:
            info = section.model_fields[part]
            path, entry = (*path, *entry, part), ()
            section = _section_inside(info.annotation)
    return path, info


def _section_inside(annotation: Any) -> type[Section] | None:
    for member in type_members(annotation):
        for candidate in (member, *get_args(member)):
            if isinstance(candidate, type) and issubclass(candidate, Section):
                return candidate
    return None


def _value_at(values: Any, path: KeyPath) -> Any:
    for part in path:
        values = values[part]
    return values
