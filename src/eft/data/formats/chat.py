"""Conversations: rows with a list of turns, in the OpenAI form or with other names for the same things."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from eft.config.data import DatasetConfig
from eft.core.errors import DataError, nearest
from eft.core.records import Message
from eft.data.formats.example import UNMARKED, Example, Format, TurnMark
from eft.data.formats.fields import field, is_given, listed, optional_text, parsed, require_json, shown
from eft.data.formats.marks import NO_MARKS, MarkFields, mark_of
from eft.data.readers import Row

ROLES: dict[str, tuple[str, ...]] = {
    "system": ("system",),
    "developer": ("developer",),
    "user": ("user", "human"),
    "assistant": ("assistant", "gpt", "model"),
    "tool": ("tool",),
}
"""Standard roles, each with the names that rows may use for it without a `roles` mapping."""

REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names of a turn's reasoning. A template finds it under any of them: transformers passes it under all."""

_THINKING_TAGS = (
    ("<think>", "</think>"),
    ("<reasoning>", "</reasoning>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
)
THINKING_STARTS = tuple(opening for opening, _ in _THINKING_TAGS)
_SOLUTION_TAGS = ("<|begin_of_solution|>", "<|end_of_solution|>")


@dataclass(frozen=True)
class Properties:
    """Where a turn holds what."""

    names: Mapping[str, str]
    """Our name of a property to theirs; at least role and content."""
    thinking_key: str = "reasoning_content"
    """The template's name of the reasoning."""
    split_thinking: bool = False
    marks: MarkFields = NO_MARKS


_USUAL = {name: name for name in ("role", "content", "tool_calls", "name", "tool_call_id")}
PROPERTIES = Properties(_USUAL, marks=MarkFields(training="train", detail="train_detail"))
"""What a user's own function may give: the OpenAI form, with `train`, `train_detail` and `weight` of a turn."""


def chat_template(spec: DatasetConfig) -> Format:
    """A conversation: `field_messages` holds the turns, `field_tools` and `field_system` (where present) the tool
    definitions and the system text."""
    return _reader(spec, spec.field_messages, "field_messages", spec.message_property_mappings)


def sharegpt(spec: DatasetConfig) -> Format:
    """As `chat_template`, with turns `{"from": …, "value": …}` in the column `conversations`."""
    return _reader(spec, "conversations", None, {"role": "from", "content": "value"})


CHAT_FORMATS: dict[str, Callable[[DatasetConfig], Format]] = {"chat_template": chat_template, "sharegpt": sharegpt}
"""Name → what makes the format for one entry: what it needs of the entry's keys is worked out once, not per row."""


def check_roles_to_train(spec: DatasetConfig) -> None:
    """Raise DataError when `roles_to_train` names a role that no turn can have."""
    known = list(dict.fromkeys([*ROLES, *spec.roles]))
    for role in spec.roles_to_train:
        if role not in known:
            close = next((name for name, aliases in ROLES.items() if role in aliases), None) or nearest(role, known)
            hint = f" Did you mean {close!r}?" if close else ""
            raise DataError(f"{spec.path}: `roles_to_train` has {role!r}; expected roles of {', '.join(known)}.{hint}")


# ---- conversations ----


def _reader(spec: DatasetConfig, column: str, key: str | None, mapping: dict[str, str]) -> Format:
    names = _USUAL | mapping
    names.setdefault("reasoning_content", spec.field_thinking)
    marks = MarkFields(spec.message_field_training, spec.message_field_training_detail, spec.message_field_weight)
    properties = Properties(names, spec.template_thinking_key, spec.split_thinking, marks)
    roles = role_names(spec.roles)
    field_system, field_tools, drops_system = spec.field_system, spec.field_tools, spec.drop_system_message

    def read(row: Row, _: DatasetConfig) -> Example:
        where = row.where
        turns = field(where, row.data, column, key, "a list of turns")
        system = optional_text(where, row.data, field_system)
        tools = row.data.get(field_tools)
        return conversation(
            where, turns, tools, properties, roles, column=column, system=system, drops_system=drops_system
        )

    return read


def conversation(
    where: str,
    turns: Any,
    tools: Any,
    properties: Properties,
    roles: dict[str, str],
    *,
    column: str = "messages",
    system: str = "",
    drops_system: bool = False,
) -> Example:
    """Turns in the standard form. `system` becomes the first turn where there is no system turn.

    Raises:
        DataError: what is wrong, with the turn.
    """
    turns = parsed(where, turns, column)
    if not isinstance(turns, list) or not turns:
        expected = "[{'role': …, 'content': …}, …]"
        raise DataError(f"{where}: field {column!r} is not a list with turns; expected {expected}")
    plain = _plain_messages(turns, properties, roles)
    messages, marks = _messages(where, turns, properties, roles) if plain is None else (plain, [UNMARKED] * len(plain))
    if messages[0]["role"] == "system":
        if drops_system:
            del messages[0], marks[0]
    elif system and not drops_system:
        messages.insert(0, {"role": "system", "content": system})
        marks.insert(0, UNMARKED)
    if not messages:
        raise DataError(f"{where}: has no turn but the system turn, which `drop_system_message` leaves out")
    is_marked = plain is None and any(mark is not UNMARKED for mark in marks)
    return Example(where, messages=messages, tools=_tools(where, tools), marks=tuple(marks) if is_marked else None)


def role_names(mapping: dict[str, list[str]]) -> dict[str, str]:
    """Name in the rows → standard role. The user's mapping comes before the usual names."""
    names = {alias: role for role, aliases in ROLES.items() for alias in aliases}
    for role, aliases in mapping.items():
        names.setdefault(role, role)
        names.update(dict.fromkeys(aliases, role))
    return names


def _plain_messages(turns: list[Any], properties: Properties, roles: dict[str, str]) -> list[Message] | None:
    """Turns of nothing but a role and a text; None where there is any other, or one that is wrong."""
    if properties.split_thinking:
        return None
    role_name, content_name = properties.names["role"], properties.names["content"]
    messages: list[Message] = []
    for turn in turns:
        if type(turn) is not dict or len(turn) != 2:
            return None
        role, content = turn.get(role_name), turn.get(content_name)
        if type(role) is not str or type(content) is not str or role not in roles:
            return None
        messages.append({"role": roles[role], "content": content})
    return messages


def _messages(
    where: str, turns: list[Any], properties: Properties, roles: dict[str, str]
) -> tuple[list[Message], list[TurnMark]]:
    """Turns of any kind, and what the row says about the training of each."""
    messages: list[Message] = []
    marks: list[TurnMark] = []
    for number, turn in enumerate(turns, 1):
        at = f"{where}, turn {number}"
        if not isinstance(turn, dict):
            raise DataError(f"{at}: is a {type(turn).__name__}; expected {{'role': …, 'content': …}}")
        message = _message(at, turn, properties, roles)
        messages.append(message)
        marks.append(mark_of(at, turn, properties.names["content"], message, properties.marks))
    return messages, marks


def _message(where: str, turn: dict[str, Any], properties: Properties, roles: dict[str, str]) -> Message:
    """One turn in the OpenAI form: nulls left out, content parts joined, role mapped to its standard name."""
    theirs = properties.names
    role = _property(where, turn, "role", theirs["role"])
    if not isinstance(role, str) or role not in roles:
        close = nearest(role, roles) if isinstance(role, str) else None
        hint = f"; did you mean {close!r}?" if close else ""
        raise DataError(
            f"{where}: unknown role {shown(role)}, expected one of {', '.join(roles)}{hint} "
            f"(a `roles` mapping adds names: {{{roles[close] if close else 'assistant'}: [{shown(role)}]}})"
        )
    message: dict[str, Any] = {"role": roles[role]}
    reasoning = _reasoning(where, turn, properties)
    calls = turn.get(theirs["tool_calls"])
    has_calls = is_given(calls)
    if (has_calls or reasoning) and turn.get(theirs["content"]) is None:
        message["content"] = ""  # what servers pass to the template for a turn that only calls tools
    else:
        message["content"] = _content(where, _property(where, turn, "content", theirs["content"]))
    if properties.split_thinking and message["role"] == "assistant" and not reasoning:
        reasoning, message["content"] = _split(message["content"])
    if has_calls:
        message["tool_calls"] = _tool_calls(where, calls)
    for ours, name in theirs.items():
        if ours not in ("role", "content", "tool_calls", "reasoning_content") and turn.get(name) is not None:
            message[ours] = require_json(where, turn[name], repr(name))
    if reasoning:
        message["reasoning_content"] = reasoning
        if properties.thinking_key not in REASONING:
            message[properties.thinking_key] = reasoning
    return cast(Message, message)


def _property(where: str, turn: dict[str, Any], ours: str, theirs: str) -> Any:
    if turn.get(theirs) is not None:
        return turn[theirs]
    usual = {"role": ("from", "speaker"), "content": ("value", "text")}[ours]
    close = next((name for name in usual if name in turn), None) or nearest(theirs, [str(name) for name in turn])
    hint = f"; did you mean `message_property_mappings: {{{ours}: {close}}}`?" if close and close != theirs else ""
    problem = f"{theirs!r} is null" if theirs in turn else f"no {theirs!r}"
    raise DataError(f"{where}: {problem}, expected text; the turn has {listed(turn)}{hint}")


def _content(where: str, content: Any) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, (str, dict)) for part in content):
        parts = [part if isinstance(part, str) else part.get("text") for part in content]
        if all(isinstance(part, str) for part in parts):
            return "".join(cast(list[str], parts))
        others = [part for part in content if isinstance(part, dict) and not isinstance(part.get("text"), str)]
        kinds = ", ".join(sorted({_kind(part) for part in others}))
        raise DataError(f"{where}: content has parts of type {kinds}, expected only text parts")
    raise DataError(f"{where}: content is a {type(content).__name__}, expected text or a list of text parts")


def _kind(part: dict[str, Any]) -> str:
    kind = part.get("type")
    return (kind[:40] if isinstance(kind, str) else shown(kind)) + (" (without text)" if kind == "text" else "")


# ---- reasoning ----


def _reasoning(where: str, turn: dict[str, Any], properties: Properties) -> str:
    """The turn's reasoning, empty where it has none."""
    named = properties.names.get("reasoning_content", "reasoning_content")
    for name in (named,) if named not in REASONING else (named, *REASONING):
        value = turn.get(name)
        if value is None:
            continue
        if not isinstance(value, str):
            raise DataError(f"{where}: {name!r} is a {type(value).__name__}, expected text")
        return value
    return ""


def _split(content: str) -> tuple[str, str]:
    """(reasoning, the rest) of a content that starts with reasoning between tags; both trimmed."""
    for opening, closing in _THINKING_TAGS:
        if content.lstrip().startswith(opening) and closing in content:
            reasoning, _, answer = content.lstrip().removeprefix(opening).partition(closing)
            answer = answer.lstrip()
            if answer.startswith(_SOLUTION_TAGS[0]) and answer.rstrip().endswith(_SOLUTION_TAGS[1]):
                answer = answer.rstrip().removeprefix(_SOLUTION_TAGS[0]).removesuffix(_SOLUTION_TAGS[1]).strip()
            return reasoning.strip(), answer
    return "", content


# ---- tools ----


def _tool_calls(where: str, calls: Any) -> list[dict[str, Any]]:
    """Calls in the OpenAI form with their arguments as an object, which is what chat templates expect."""
    calls = parsed(where, calls, "tool_calls")
    if not isinstance(calls, list):
        raise DataError(f"{where}: tool_calls is a {type(calls).__name__}, expected a list")
    result = []
    for number, call in enumerate(calls, 1):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(f"{where}: tool call {number} has no name; expected {{'function': {{'name': …, …}}}}")
        arguments = function.get("arguments")
        name = f"arguments of tool call {number}"
        arguments = parsed(where, "{}" if arguments in (None, "") else arguments, name, "an object")
        if not isinstance(arguments, dict):
            kind = type(arguments).__name__
            raise DataError(f"{where}: arguments of tool call {number} are a {kind}, expected an object")
        arguments = require_json(where, arguments, f"arguments of tool call {number}")
        known = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        result.append({**known, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return result


def _tools(where: str, tools: Any) -> list[dict[str, Any]] | None:
    """Tool definitions, wrapped as `{"type": "function", "function": {…}}` where the row holds them bare; parameters
    that are JSON text become objects."""
    tools = parsed(where, tools, "tools") if is_given(tools) else None
    if not is_given(tools):
        return None
    if not isinstance(tools, (list, tuple)):
        raise DataError(f"{where}: the tools are not a list of objects, expected [{{'type': …, 'function': …}}]")
    result = []
    for number, tool in enumerate(tools, 1):
        if isinstance(tool, dict) and "function" not in tool and "name" in tool:
            tool = {"type": "function", "function": tool}
        if not isinstance(tool, dict) or not isinstance(tool.get("function"), dict):
            raise DataError(f"{where}: tool {number} is not an object, expected {{'type': …, 'function': {{…}}}}")
        function = tool["function"]
        if not isinstance(function.get("name"), str):
            raise DataError(f"{where}: tool {number} has no name, expected {{'function': {{'name': …, …}}}}")
        if isinstance(function.get("parameters"), str):
            parameters = parsed(where, function["parameters"], f"parameters of tool {number}", "an object")
            tool = {**tool, "function": {**function, "parameters": parameters}}
        result.append(require_json(where, tool, f"tool {number}"))
    return result
