"""Formats of the user's own: a function, or a prompt described in the config."""

from __future__ import annotations

import importlib
import os
import string
import sys
from collections.abc import Callable
from typing import Any

from eft.config.data import DatasetConfig
from eft.config.formats import FIELD_MAPPING_KEYS
from eft.core.errors import DataError, nearest
from eft.core.records import Segment
from eft.data.formats.chat import PROPERTIES, conversation, role_names
from eft.data.formats.example import Example, Format
from eft.data.formats.fields import listed, optional_text, text
from eft.data.formats.instruct import Style, answered
from eft.data.formats.plain import segments_of
from eft.data.given_tokens import given_sample
from eft.data.readers import Row

_EXPECTED = "{'messages': […]}, {'segments': […]} or {'input_ids': […], 'labels': […]}"

# ---- a function ----


def function_format(path: str, name: str) -> Format:
    """The format that `package.module:function` names.

    The function takes the row (a dict) and returns `{"messages": […], "tools": […]}`,
    `{"segments": [{"text", "label"}, …], "add_eos": bool}` or `{"input_ids": […], "labels": […], "weights": […]}`.

    Raises:
        DataError: it cannot be imported, or is no function.
    """
    module_name, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # the `eft` command, unlike `python`, does not look in the current folder
    try:
        function = getattr(importlib.import_module(module_name), attribute)
    except Exception as error:  # the user's module may raise anything while it is imported
        problem = f"{type(error).__name__}: {error}"
        raise DataError(f"{path}: type {name!r} cannot be imported ({problem})") from error
    if not callable(function):
        raise DataError(f"{path}: type {name!r} is a {type(function).__name__}; expected a function of a row")
    return _applied(name, function)


def _applied(name: str, function: Callable[[dict[str, Any]], Any]) -> Format:
    def apply(row: Row, spec: DatasetConfig) -> Example:
        try:
            result = function(row.data)
        except Exception as error:  # the user's code may raise anything; the row is what they need to know
            raise DataError(f"{row.where}: {name} raised {type(error).__name__}: {error}") from error
        if not isinstance(result, dict):
            raise DataError(f"{row.where}: {name} returned a {type(result).__name__}; expected {_EXPECTED}")
        where = f"{row.where} ({name})"
        if "messages" in result:
            return conversation(where, result["messages"], result.get("tools"), PROPERTIES, role_names(spec.roles))
        if "segments" in result:
            segments = segments_of(where, result["segments"], "segments")
            if result.get("add_eos"):
                segments[-1] = Segment(segments[-1].text, segments[-1].train, num_eos=1)
            return Example(where, segments=segments)
        if "input_ids" in result:
            return Example(where, sample=given_sample(where, result))
        raise DataError(f"{where}: returned a dict with {listed(result)}; expected {_EXPECTED}")

    return apply


# ---- a prompt ----

_PLACES = {
    "format": {"instruction", "input"},
    "no_input_format": {"instruction"},
    "system_format": {"system"},
}
_DEFAULTS = {
    "system_prompt": "",
    "field_system": "system",
    "field_instruction": "instruction",
    "field_input": "input",
    "field_output": "output",
    "format": "{instruction} {input} ",
    "no_input_format": "{instruction} ",
    "system_format": "{system}",
}


def mapping_format(path: str, mapping: dict[str, str | None]) -> Format:
    """The format that a `type` with `field_*`, `format`, … describes: prompt (context) and answer (trained, with EOS).

    Raises:
        DataError: an unknown key, or a format text that is none.
    """
    for name in mapping:
        if name not in FIELD_MAPPING_KEYS:
            close = nearest(name, FIELD_MAPPING_KEYS)
            hint = f"; did you mean `{close}`?" if close else ""
            raise DataError(f"{path}: `type` has the unknown key `{name}`; it may have {_named()}{hint}")
    keys = _DEFAULTS | {name: value for name, value in mapping.items() if value is not None}
    for name, places in _PLACES.items():
        _check_places(path, name, keys[name], places)
    style = Style(keys["system_format"], keys["format"], keys["no_input_format"])

    def apply(row: Row, spec: DatasetConfig) -> Example:
        where, data = row.where, row.data
        instruction = text(where, data, keys["field_instruction"], "field_instruction")
        answer = text(where, data, keys["field_output"], "field_output")
        has_system = keys["field_system"] in data
        system = optional_text(where, data, keys["field_system"]) if has_system else keys["system_prompt"]
        prompt = style.prompt(system, instruction, optional_text(where, data, keys["field_input"]))
        return answered(where, prompt, answer)

    return apply


def _named() -> str:
    return ", ".join(f"`{name}`" for name in FIELD_MAPPING_KEYS)


def _check_places(path: str, key: str, value: str, places: set[str]) -> None:
    """Only `{name}` of `places`; braces that are meant are doubled."""
    expected = " and ".join(sorted("{" + place + "}" for place in places))
    try:
        found = list(string.Formatter().parse(value))
    except ValueError as error:
        raise DataError(
            f"{path}: `{key}` of `type` is no format text ({error}); write braces that are meant as {{{{ and }}}}"
        ) from error
    for _, name, specification, conversion in found:
        if name is not None and (name not in places or specification or conversion):
            raise DataError(
                f"{path}: `{key}` of `type` has {{{name}}}; expected {expected} (braces that are meant: {{{{ and }}}})"
            )
