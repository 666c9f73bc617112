"""Formats: each turns one row into one `Example`. A new format is one function and one line in `FORMATS`."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from eft.config.data import DatasetConfig
from eft.core.errors import DataError, nearest
from eft.core.records import Message, Segment, TokenSample
from eft.data.given_tokens import given_sample
from eft.data.readers import Row

ROLES: dict[str, tuple[str, ...]] = {
    "system": ("system",),
    "developer": ("developer",),
    "user": ("user", "human"),
    "assistant": ("assistant", "gpt", "model"),
    "tool": ("tool",),
}
"""Standard roles, each with the names that rows may use for it without a `roles` mapping."""
_TEXT_PROPERTIES = ("name", "reasoning_content", "tool_call_id")


@dataclass(frozen=True)
class Example:
    """One row after its format: exactly one of `messages`, `segments` and `sample` is set."""

    where: str
    """File and row, the start of every later message about it."""
    messages: list[Message] | None = None
    tools: list[dict[str, Any]] | None = None
    """Tool definitions in the OpenAI form, only beside `messages`."""
    segments: list[Segment] | None = None
    add_eos: bool = False
    """Whether the tokenizer's EOS follows the last segment; it is trained where that segment is."""
    sample: TokenSample | None = None

    def __post_init__(self) -> None:
        assert sum(part is not None for part in (self.messages, self.segments, self.sample)) == 1, self


Format = Callable[[Row, DatasetConfig], Example]


def resolve_format(spec: DatasetConfig) -> Format:
    """The format that `type` names: one of `FORMATS`, the pre-tokenised one for null, or the user's own function.

    A user's function `package.module:function` takes the row (a dict) and returns `{"messages": […], "tools": […]}`,
    `{"segments": [{"text", "label"}, …], "add_eos": bool}` or `{"input_ids": […], "labels": […], "weights": […]}`.

    Raises:
        DataError: no such format, or the function cannot be imported.
    """
    if spec.type is None:
        return pretokenized
    if spec.type in FORMATS:
        return FORMATS[spec.type]
    module_name, colon, attribute = spec.type.partition(":")
    if not (colon and module_name and attribute):
        close = nearest(spec.type, FORMATS)
        hint = f" Did you mean {close!r}?" if close else ""
        raise DataError(
            f"{spec.path}: type {spec.type!r} is no format; expected one of {', '.join(FORMATS)}, or your own as "
            f"`package.module:function`.{hint}"
        )
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # the `eft` command, unlike `python`, does not look in the current folder
    try:
        function = getattr(importlib.import_module(module_name), attribute)
    except Exception as error:  # the user's module may raise anything while it is imported
        problem = f"{type(error).__name__}: {error}"
        raise DataError(f"{spec.path}: type {spec.type!r} cannot be imported ({problem})") from error
    if not callable(function):
        raise DataError(f"{spec.path}: type {spec.type!r} is a {type(function).__name__}; expected a function of a row")
    return _user_format(spec.type, function)


def check_roles_to_train(spec: DatasetConfig) -> None:
    """Raise DataError when `roles_to_train` names a role that no turn can have."""
    known = list(dict.fromkeys([*ROLES, *spec.roles]))
    for role in spec.roles_to_train:
        if role not in known:
            close = next((name for name, aliases in ROLES.items() if role in aliases), None) or nearest(role, known)
            hint = f" Did you mean {close!r}?" if close else ""
            raise DataError(f"{spec.path}: `roles_to_train` has {role!r}; expected roles of {', '.join(known)}.{hint}")


# ---- the formats ----


def chat_template(row: Row, spec: DatasetConfig) -> Example:
    """A conversation: `field_messages` holds the turns, `field_tools` (where present) the tool definitions."""
    turns = _field(row.where, row.data, spec.field_messages, "field_messages", "a list of turns")
    properties, roles = spec.message_property_mappings, _role_names(spec.roles)
    return _conversation(row.where, turns, row.data.get(spec.field_tools), properties, roles, spec.field_messages)


def alpaca(row: Row, spec: DatasetConfig) -> Example:
    """Instruction, optional input and system prompt, answer, in Alpaca's public wording; only the answer is trained."""
    instruction = _text(row.where, row.data, spec.field_instruction, "field_instruction")
    answer = _text(row.where, row.data, spec.field_output, "field_output")
    extra = _optional_text(row.where, row.data, spec.field_input, "field_input")
    system = _optional_text(row.where, row.data, spec.field_system, "field_system")
    if extra:
        opening = (
            "Below is an instruction that describes a task, paired with an input that provides further context. "
            "Write a response that appropriately completes the request."
        )
        prompt = f"### Instruction:\n{instruction}\n\n### Input:\n{extra}\n\n### Response:\n"
    else:
        opening = (
            "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        )
        prompt = f"### Instruction:\n{instruction}\n\n### Response:\n"
    segments = [Segment(f"{system or opening}\n\n{prompt}", train=False), Segment(answer, train=True)]
    return Example(row.where, segments=segments, add_eos=True)


def completion(row: Row, spec: DatasetConfig) -> Example:
    """Plain text, all of it trained, EOS appended."""
    return Example(row.where, segments=[Segment(_text(row.where, row.data, spec.field, "field"), True)], add_eos=True)


def input_output(row: Row, spec: DatasetConfig) -> Example:
    """Pieces `{"label": true or false, "text": …}`, tokenised one by one; nothing is added between or after them."""
    pieces = _field(row.where, row.data, spec.field_segments, "field_segments", "a list of {label, text}")
    return Example(row.where, segments=_segments(row.where, pieces, spec.field_segments))


def pretokenized(row: Row, spec: DatasetConfig) -> Example:
    """`input_ids` and `labels` (and `weights`) as they are; a padded row and one without labels are refused."""
    return Example(row.where, sample=given_sample(row.where, row.data))


FORMATS: dict[str, Format] = {
    "chat_template": chat_template,
    "alpaca": alpaca,
    "completion": completion,
    "input_output": input_output,
    "pretokenized": pretokenized,
}


def _user_format(name: str, function: Callable[[dict[str, Any]], Any]) -> Format:
    expected = "{'messages': […]}, {'segments': […]} or {'input_ids': […], 'labels': […]}"

    def apply(row: Row, spec: DatasetConfig) -> Example:
        try:
            result = function(row.data)
        except Exception as error:  # the user's code may raise anything; the row is what they need to know
            raise DataError(f"{row.where}: {name} raised {type(error).__name__}: {error}") from error
        if not isinstance(result, dict):
            raise DataError(f"{row.where}: {name} returned a {type(result).__name__}; expected {expected}")
        where = f"{row.where} ({name})"
        if "messages" in result:
            roles = _role_names(spec.roles)
            return _conversation(where, result["messages"], result.get("tools"), {}, roles, "messages")
        if "segments" in result:
            segments = _segments(where, result["segments"], "segments")
            return Example(where, segments=segments, add_eos=bool(result.get("add_eos")))
        if "input_ids" in result:
            return Example(where, sample=given_sample(where, result))
        raise DataError(f"{where}: returned a dict with {_listed(result)}; expected {expected}")

    return apply


# ---- fields ----


def _listed(names: Any) -> str:
    return ", ".join(str(name) for name in names) or "no fields"


def _field(where: str, data: dict[str, Any], name: str, key: str, expected: str) -> Any:
    """The value of a required field; a null counts as missing."""
    if data.get(name) is not None:
        return data[name]
    problem = f"field {name!r} is null" if name in data else f"no field {name!r}"
    close = None if name in data else nearest(name, data)
    hint = f"; did you mean `{key}: {close}`?" if close else f" (`{key}` names it)"
    raise DataError(f"{where}: {problem}, expected {expected}; the row has {_listed(data)}{hint}")


def _text(where: str, data: dict[str, Any], name: str, key: str) -> str:
    value = _field(where, data, name, key, "text")
    if not isinstance(value, str):
        raise DataError(f"{where}: field {name!r} is a {type(value).__name__}, expected text")
    return value


def _optional_text(where: str, data: dict[str, Any], name: str, key: str) -> str:
    return _text(where, data, name, key) if data.get(name) is not None else ""


def _segments(where: str, pieces: Any, name: str) -> list[Segment]:
    if not isinstance(pieces, list) or not pieces:
        raise DataError(f"{where}: field {name!r} is not a list with pieces; expected [{{'label': …, 'text': …}}, …]")
    segments = []
    for number, piece in enumerate(pieces, 1):
        at = f"{where}: piece {number} of {name!r}"
        if not isinstance(piece, dict) or not isinstance(piece.get("text"), str):
            raise DataError(f"{at} has no text; expected {{'label': true or false, 'text': …}}")
        if not isinstance(piece.get("label"), bool):
            raise DataError(f"{at} has label {piece.get('label')!r}; expected true (train) or false (context)")
        segments.append(Segment(piece["text"], piece["label"]))
    return segments


# ---- conversations ----


def _role_names(mapping: dict[str, list[str]]) -> dict[str, str]:
    """Name in the rows → standard role. The user's mapping comes before the usual names."""
    names = {alias: role for role, aliases in ROLES.items() for alias in aliases}
    for role, aliases in mapping.items():
        names.setdefault(role, role)
        names.update(dict.fromkeys(aliases, role))
    return names


def _conversation(
    where: str, turns: Any, tools: Any, properties: dict[str, str], roles: dict[str, str], field: str
) -> Example:
    turns = _parsed(where, turns, field)
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{where}: field {field!r} is not a list with turns; expected [{{'role': …, 'content': …}}, …]")
    messages = [_message(f"{where}, turn {number}", turn, properties, roles) for number, turn in enumerate(turns, 1)]
    return Example(where, messages=messages, tools=_tools(where, tools))


def _message(where: str, turn: Any, properties: dict[str, str], roles: dict[str, str]) -> Message:
    """One turn in the OpenAI form: nulls left out, content parts joined, role mapped to its standard name."""
    if not isinstance(turn, dict):
        raise DataError(f"{where}: is a {type(turn).__name__}; expected {{'role': …, 'content': …}}")
    theirs = {name: name for name in ("role", "content", "tool_calls", *_TEXT_PROPERTIES)} | properties
    role = _property(where, turn, "role", theirs["role"])
    if role not in roles:
        close = nearest(str(role), roles)
        hint = f"; did you mean {close!r}?" if close else ""
        raise DataError(
            f"{where}: unknown role {role!r}, expected one of {', '.join(roles)}{hint} "
            f"(a `roles` mapping adds names: {{assistant: [{role}]}})"
        )
    message: dict[str, Any] = {"role": roles[role]}
    calls = turn.get(theirs["tool_calls"])
    if calls and turn.get(theirs["content"]) is None:
        message["content"] = ""  # what servers pass to the template for a turn that only calls tools
    else:
        message["content"] = _content(where, _property(where, turn, "content", theirs["content"]))
    if calls:
        message["tool_calls"] = _tool_calls(where, calls)
    for ours, name in theirs.items():
        if ours not in ("role", "content", "tool_calls") and turn.get(name) is not None:
            message[ours] = turn[name]
    return cast(Message, message)


def _property(where: str, turn: dict[str, Any], ours: str, theirs: str) -> Any:
    if turn.get(theirs) is not None:
        return turn[theirs]
    usual = {"role": ("from", "speaker"), "content": ("value", "text")}[ours]
    close = next((name for name in usual if name in turn), None) or nearest(theirs, turn)
    hint = f"; did you mean `message_property_mappings: {{{ours}: {close}}}`?" if close and close != theirs else ""
    problem = f"{theirs!r} is null" if theirs in turn else f"no {theirs!r}"
    raise DataError(f"{where}: {problem}, expected text; the turn has {_listed(turn)}{hint}")


def _content(where: str, content: Any) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, (str, dict)) for part in content):
        parts = [part if isinstance(part, str) else part.get("text") for part in content]
        if all(isinstance(part, str) for part in parts):
            return "".join(cast(list[str], parts))
        kinds = sorted({str(part.get("type")) for part in content if isinstance(part, dict) and "text" not in part})
        raise DataError(f"{where}: content has parts of type {', '.join(kinds)}, expected only text parts")
    raise DataError(f"{where}: content is a {type(content).__name__}, expected text or a list of text parts")


def _parsed(where: str, value: Any, name: str) -> Any:
    """A value that some data sets store as JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: {name!r} is text but not JSON ({error}); expected a list or JSON text") from error


def _tool_calls(where: str, calls: Any) -> list[dict[str, Any]]:
    """Calls in the OpenAI form with their arguments as an object, which is what chat templates expect."""
    calls = _parsed(where, calls, "tool_calls")
    if not isinstance(calls, list):
        raise DataError(f"{where}: tool_calls is a {type(calls).__name__}, expected a list")
    result = []
    for number, call in enumerate(calls, 1):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(f"{where}: tool call {number} has no name; expected {{'function': {{'name': …, …}}}}")
        arguments = _parsed(where, function.get("arguments") or {}, f"arguments of tool call {number}")
        if not isinstance(arguments, dict):
            kind = type(arguments).__name__
            raise DataError(f"{where}: arguments of tool call {number} are a {kind}, expected an object")
        known = {"id": call["id"]} if call.get("id") is not None else {}
        result.append({**known, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return result


def _tools(where: str, tools: Any) -> list[dict[str, Any]] | None:
    """Tool definitions, wrapped as `{"type": "function", "function": {…}}` where the row holds them bare."""
    tools = _parsed(where, tools, "tools") if tools else None
    if not tools:
        return None
    if not isinstance(tools, Sequence) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"{where}: the tools are not a list of objects, expected [{{'type': …, 'function': …}}]")
    return [tool if "function" in tool or "name" not in tool else _wrapped(tool) for tool in tools]


def _wrapped(function: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": function}
