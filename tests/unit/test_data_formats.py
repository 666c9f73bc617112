"""Formats: what becomes of good rows, and the one message that a wrong row gets."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from eft.config.data import FORMATS as FORMAT_NAMES
from eft.config.data import DatasetConfig
from eft.core.errors import DataError
from eft.data.formats import FORMATS, Example, check_roles_to_train, resolve_format
from eft.data.readers import Row


def convert(data: dict[str, Any], format_name: str | None, **keys: Any) -> Example:
    spec = DatasetConfig(path="data.jsonl", type=format_name, **keys)
    return resolve_format(spec)(Row("data.jsonl", 17, data), spec)


def error_of(data: dict[str, Any], format_name: str | None, **keys: Any) -> str:
    with pytest.raises(DataError) as caught:
        convert(data, format_name, **keys)
    return str(caught.value)


def turns(*pairs: tuple[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


def test_the_table_has_exactly_the_names_of_the_config() -> None:
    assert tuple(FORMATS) == get_args(FORMAT_NAMES)


def test_conversation_with_parts_nulls_and_json_text() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": {"b": null}}'}}
    data = {
        "messages": [
            {"role": "human", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": None},
            {"role": "gpt", "content": None, "tool_calls": [call], "reasoning_content": "hm", "tool_call_id": None},
            {"role": "tool", "content": "3", "tool_calls": None, "tool_call_id": "c1", "unknown": 1},
        ],
        "tools": '[{"name": "f", "parameters": {}}, {"type": "function", "function": {"name": "g"}}]',
    }
    example = convert(data, "chat_template")
    function = {"name": "f", "arguments": {"a": {"b": None}}}
    assert example.where == "data.jsonl row 17"
    assert example.messages == [
        {"role": "user", "content": "ab"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "c1", "type": "function", "function": function}],
            "reasoning_content": "hm",
        },
        {"role": "tool", "content": "3", "tool_call_id": "c1"},
    ]
    assert example.tools == [
        {"type": "function", "function": {"name": "f", "parameters": {}}},
        {"type": "function", "function": {"name": "g"}},
    ]
    assert convert({"messages": str(data["messages"][:1]).replace("'", '"').replace("None", "null")}, "chat_template")


def test_mappings_of_properties_and_roles() -> None:
    example = convert(
        {"turns": [{"who": "prompter", "says": "x", "why": "y", "mood": "good"}]},
        "chat_template",
        field_messages="turns",
        message_property_mappings={"role": "who", "content": "says", "reasoning_content": "why", "mood": "mood"},
        roles={"user": ["prompter"], "critic": ["critic"]},
    )
    assert example.messages == [{"role": "user", "content": "x", "reasoning_content": "y", "mood": "good"}]


WRONG_CHATS: dict[str, tuple[dict[str, Any], str]] = {
    "no column": (
        {"mesages": [], "id": 1},
        "data.jsonl row 17: no field 'messages', expected a list of turns; the row has mesages, id; did you mean "
        "`field_messages: mesages`?",
    ),
    "null column": ({"messages": None}, "field 'messages' is null"),
    "no turns": ({"messages": []}, "field 'messages' is not a list with turns"),
    "broken JSON text": ({"messages": "[{"}, "'messages' is text but not JSON"),
    "turn is text": ({"messages": ["hi"]}, "row 17, turn 1: is a str; expected {'role'"),
    "ShareGPT names": (
        {"messages": [{"from": "human", "value": "x"}]},
        "turn 1: no 'role', expected text; the turn has from, value; did you mean `message_property_mappings: "
        "{role: from}`?",
    ),
    "no content": ({"messages": [{"role": "user"}]}, "turn 1: no 'content', expected text; the turn has role"),
    "unknown role": (
        turns(("user", "x"), ("asistant", "y")),
        "turn 2: unknown role 'asistant', expected one of system,",
    ),
    "nearest role": (turns(("asistant", "y")), "did you mean 'assistant'?"),
    "content is a number": (turns(("user", 7)), "turn 1: content is a int, expected text"),
    "image part": (turns(("user", [{"type": "image", "url": "x"}])), "parts of type image, expected only text parts"),
    "call without name": (
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]},
        "turn 1: tool call 1 has no name",
    ),
    "call with broken arguments": (
        {"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}]},
        "'arguments of tool call 1' is text but not JSON",
    ),
    "tools are a number": ({**turns(("user", "x")), "tools": 3}, "tools are not a list of objects"),
}


@pytest.mark.parametrize("case", WRONG_CHATS)
def test_a_wrong_conversation_names_row_turn_and_expectation(case: str) -> None:
    data, message = WRONG_CHATS[case]
    assert message in error_of(data, "chat_template")


WRONG_ROWS: dict[str, tuple[str | None, dict[str, Any], str]] = {
    "alpaca": ("alpaca", {"instruction": "x", "ouput": "y"}, "row 17: no field 'output', expected text; the row has "),
    "alpaca nearest": ("alpaca", {"instruction": "x", "ouput": "y"}, "did you mean `field_output: ouput`?"),
    "alpaca number": ("alpaca", {"instruction": "x", "output": 3}, "field 'output' is a int, expected text"),
    "completion": ("completion", {"body": "x"}, "no field 'text', expected text; the row has body (`field` names it)"),
    "segments": ("input_output", {"segments": []}, "field 'segments' is not a list with pieces"),
    "segment label": ("input_output", {"segments": [{"label": "yes", "text": "x"}]}, "piece 1 of 'segments' has label"),
    "segment text": ("input_output", {"segments": [{"label": True}]}, "piece 1 of 'segments' has no text"),
    "ids missing": (None, {"ids": [1]}, "no field 'input_ids', expected a list of token ids; the row has ids"),
    "ids are text": (None, {"input_ids": "12"}, "'input_ids' is not a flat list of integers"),
    "ids are floats": (None, {"input_ids": [1.5]}, "'input_ids' is not a flat list of integers"),
    "ids nested": (None, {"input_ids": [[1], [2, 3]]}, "'input_ids' is not a flat list of integers"),
    "ids too big": (None, {"input_ids": [1, 2**40]}, "ids outside 32 bits"),
    "labels too few": (None, {"input_ids": [1, 2], "labels": [1]}, "1 labels for 2 input_ids"),
    "labels shifted": (
        "pretokenized",
        {"input_ids": [1, 2, 3], "labels": [2, 3, -100]},
        "labels[0] is 2 where input_ids[0] is 1; expected the same id or -100 (labels are not shifted",
    ),
    "weights negative": (
        None,
        {"input_ids": [1], "labels": [1], "weights": [-1.0]},
        "'weights' must be 1 numbers of 0 or more",
    ),
    "weights infinite": (None, {"input_ids": [1], "labels": [1], "weights": [float("inf")]}, "not finite"),
    "weights ragged": (None, {"input_ids": [1, 2], "labels": [1, 2], "weights": [[1], [1, 2]]}, "'weights' must be 2"),
    "labels missing": ("pretokenized", {"input_ids": [1, 2]}, "row 17: no 'labels' (the row has input_ids)"),
    "labels null": (None, {"input_ids": [1, 2], "labels": None}, "give the input_ids as labels, too"),
    "ids negative": (None, {"input_ids": [1, -1], "labels": [1, -100]}, "input_ids[1] is -1; ids are 0 or more"),
    "padded": (None, {"input_ids": [1, 0], "labels": [1, -100], "attention_mask": [1, 0]}, "is padded (zeros"),
}


@pytest.mark.parametrize("case", WRONG_ROWS)
def test_a_wrong_row_names_row_field_and_expectation(case: str) -> None:
    format_name, data, message = WRONG_ROWS[case]
    assert message in error_of(data, format_name)


def test_unknown_format_and_role_name_the_nearest() -> None:
    assert "Did you mean 'alpaca'?" in error_of({}, "alpacca")
    with pytest.raises(DataError, match=r"`roles_to_train` has 'gpt'.*Did you mean 'assistant'"):
        check_roles_to_train(DatasetConfig(path="x", roles_to_train=["gpt"]))
    check_roles_to_train(DatasetConfig(path="x", roles={"critic": ["c"]}, roles_to_train=["critic", "user"]))


USER_MODULE = """
number = 3
def messages(row): return {"messages": [{"role": "user", "content": row["q"]}], "tools": None}
def segments(row): return {"segments": [{"label": True, "text": row["q"]}], "add_eos": True}
def ids(row): return {"input_ids": [1, 2], "labels": [-100, 2], "weights": [0, 2.5]}
def text(row): return row["q"]
def nothing(row): return {"prompt": 1}
"""


def test_a_users_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_own_format.py").write_text(USER_MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    assert convert({"q": "x"}, "my_own_format:messages").messages == [{"role": "user", "content": "x"}]
    segments = convert({"q": "x"}, "my_own_format:segments")
    assert segments.segments is not None
    assert segments.add_eos
    sample = convert({"q": "x"}, "my_own_format:ids").sample
    assert sample is not None
    assert sample.labels.dtype == np.int32
    assert sample.weights is not None
    assert sample.weights.tolist() == [0, 2.5]
    assert "my_own_format:messages raised KeyError: 'q'" in error_of({}, "my_own_format:messages")
    assert "returned a str; expected {'messages'" in error_of({"q": "x"}, "my_own_format:text")
    assert "returned a dict with prompt; expected" in error_of({}, "my_own_format:nothing")
    assert "is a int; expected a function" in error_of({}, "my_own_format:number")
    assert "cannot be imported (AttributeError" in error_of({}, "my_own_format:missing")
    (tmp_path / "my_broken_format.py").write_text("1 / 0\n")
    assert "cannot be imported (ZeroDivisionError" in error_of({"q": "x"}, "my_broken_format:f")
    assert "cannot be imported (ModuleNotFoundError" in error_of({}, "no_such_module_here:f")
