"""Formats: what becomes of good rows, and the one message that a wrong row gets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from eft.config.data import DatasetConfig
from eft.config.formats import FORMAT_KEYS, keys_of_format
from eft.config.formats import FORMATS as FORMAT_NAMES
from eft.core.errors import DataError
from eft.data.formats import (
    FORMATS,
    Example,
    Part,
    TurnMark,
    check_roles_to_train,
    gives_conversations,
    resolve_format,
)
from eft.data.readers import Row
from tests.golden.test_golden_formats import row_of


def convert(data: dict[str, Any], format_name: Any, **keys: Any) -> Example:
    spec = DatasetConfig(path="data.jsonl", type=format_name, **keys)
    return resolve_format(spec)(Row("data.jsonl", 17, data), spec)


def error_of(data: dict[str, Any], format_name: Any, **keys: Any) -> str:
    with pytest.raises(DataError) as caught:
        convert(data, format_name, **keys)
    return str(caught.value)


def turns(*pairs: tuple[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


def test_the_table_has_exactly_the_names_of_the_config() -> None:
    assert sorted(FORMATS) == sorted(get_args(FORMAT_NAMES))


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
    "rows of another format": (
        {"conversations": [], "id": 1},
        "no field 'messages', expected a list of turns; the row has conversations, id; rows with 'conversations' are "
        "those of `type: sharegpt`",
    ),
    "a name of a role": (turns(("customer", "x")), "(a `roles` mapping adds names: {user: ['customer']})"),
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
        "line 1 column 2 (char 1)); expected an object or JSON text",
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
    assert segments.segments[-1].num_eos == 1
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


# ---- further formats ----


def texts_of(example: Example) -> list[tuple[str, bool, int]]:
    assert example.segments is not None
    return [(segment.text, segment.train, segment.num_eos) for segment in example.segments]


def test_sharegpt_with_a_system_column() -> None:
    row = {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}], "system": "Be short."}
    wanted = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "y"},
    ]
    assert convert(row, "sharegpt").messages == wanted
    assert convert({**row, "system": None}, "sharegpt").messages == wanted[1:]
    assert convert(row, "sharegpt", drop_system_message=True).messages == wanted[1:]
    own = {**row, "conversations": [{"from": "system", "value": "Mine."}, *row["conversations"]]}
    assert convert(own, "sharegpt").messages == [{"role": "system", "content": "Mine."}, *wanted[1:]]
    alone = {"conversations": [{"from": "system", "value": "Mine."}]}
    assert "which `drop_system_message` leaves out" in error_of(alone, "sharegpt", drop_system_message=True)
    assert "field 'system' is a int, expected text" in error_of({**row, "system": 3}, "sharegpt")
    assert "rename 'conversation'" in error_of({"conversation": []}, "sharegpt")


REASONED = "<think>\nhm\n</think>\n\ny"


@pytest.mark.parametrize(
    ("turn", "keys", "wanted"),
    [
        ({"content": "y", "reasoning_content": "hm"}, {}, {"content": "y", "reasoning_content": "hm"}),
        ({"content": "y", "thinking": "hm"}, {}, {"content": "y", "reasoning_content": "hm"}),
        ({"content": "y", "why": "hm"}, {"field_thinking": "why"}, {"content": "y", "reasoning_content": "hm"}),
        ({"content": None, "reasoning": "hm"}, {}, {"content": "", "reasoning_content": "hm"}),
        (
            {"content": "y", "reasoning": "hm"},
            {"template_thinking_key": "thought"},
            {"content": "y", "reasoning_content": "hm", "thought": "hm"},
        ),
        ({"content": REASONED}, {}, {"content": REASONED}),
        ({"content": REASONED}, {"split_thinking": True}, {"content": "y", "reasoning_content": "hm"}),
        ({"content": "x " + REASONED}, {"split_thinking": True}, {"content": "x " + REASONED}),
        ({"content": "<think>hm"}, {"split_thinking": True}, {"content": "<think>hm"}),
        (
            {"content": "<reasoning>hm</reasoning><|begin_of_solution|> y <|end_of_solution|>"},
            {"split_thinking": True},
            {"content": "y", "reasoning_content": "hm"},
        ),
    ],
)
def test_reasoning(turn: dict[str, Any], keys: dict[str, Any], wanted: dict[str, Any]) -> None:
    example = convert({"messages": [{"role": "assistant", **turn}]}, "chat_template", **keys)
    assert example.messages == [{"role": "assistant", **wanted}]


def marks_of(turn: dict[str, Any], **keys: Any) -> Any:
    row = {"messages": [{"role": "assistant", "content": "one two", **turn}]}
    keys = {"message_field_training": "train", "message_field_training_detail": "detail", **keys}
    marks = convert(row, "chat_template", **keys).marks
    return None if marks is None else marks[0]


def test_what_a_row_says_of_its_own_training() -> None:
    detail = [{"begin_offset": 0, "end_offset": 2, "train": True, "weight": 2}]
    assert marks_of({}) is marks_of({"weight": 1}) is marks_of({"train": None, "detail": []}) is None
    assert marks_of({"train": False}) == TurnMark(train=False)
    assert marks_of({"train": False}, message_field_training=None) is None
    assert marks_of({"weight": 0.5}) == TurnMark(weight=0.5)
    assert marks_of({"importance": 3}, message_field_weight="importance") == TurnMark(weight=3.0)
    assert marks_of({"detail": detail}) == TurnMark(parts=(Part(0, 3, True, 2.0),), parts_only=True)
    assert marks_of({"detail": json.dumps(detail)}) == marks_of({"detail": detail})
    parts = [{"type": "text", "text": "ab", "train": False}, "c", {"type": "text", "text": "de", "weight": 2}]
    assert marks_of({"content": parts}) == TurnMark(parts=(Part(0, 2, False), Part(2, 3, None), Part(3, 5, None, 2.0)))


WRONG_MARKS: dict[str, tuple[dict[str, Any], str]] = {
    "train is text": ({"train": "no"}, "turn 1: 'train' is 'no', expected true or false"),
    "weight is text": ({"weight": "high"}, "turn 1: 'weight' is 'high', expected a number from 0 to 1e6"),
    "weight is negative": ({"weight": -1}, "'weight' is -1, expected a number from 0"),
    "weight is endless": ({"weight": float("inf")}, "'weight' is inf, expected a number from 0"),
    "detail is a number": ({"detail": 3}, "turn 1: 'detail' is a int, expected a list"),
    "detail beyond the text": (
        {"detail": [{"begin_offset": 0, "end_offset": 7, "train": True}]},
        "item 1 of 'detail' has begin_offset 0 and end_offset 7; expected characters of the content, from 0 to 6",
    ),
    "detail without train": (
        {"detail": [{"begin_offset": 0, "end_offset": 1}]},
        "'train' of item 1 of 'detail' is None",
    ),
    "detail of parts": (
        {"content": ["one"], "detail": [{"begin_offset": 0, "end_offset": 1, "train": True}]},
        "'detail' needs a content that is one text",
    ),
    "part with a wrong weight": (
        {"content": [{"type": "text", "text": "a", "weight": "x"}]},
        "weight of content part 1",
    ),
}


@pytest.mark.parametrize("case", WRONG_MARKS)
def test_a_wrong_mark_names_row_turn_and_expectation(case: str) -> None:
    turn, message = WRONG_MARKS[case]
    row = {"messages": [{"role": "assistant", "content": "one two", **turn}]}
    keys = {"message_field_training": "train", "message_field_training_detail": "detail"}
    assert message in error_of(row, "chat_template", **keys)


def test_values_that_no_json_has_are_refused() -> None:
    deep: Any = []
    for _ in range(100):
        deep = [deep]
    for arguments, problem in (({"a": deep}, "is nested more than 64 deep"), ({"a": b"x"}, "has a bytes")):
        call = [{"name": "f", "arguments": arguments}]
        message = error_of({"messages": [{"role": "assistant", "tool_calls": call}]}, "chat_template")
        assert f"turn 1: arguments of tool call 1 {problem}" in message
    tools = [{"name": "f", "parameters": {1: 2}}]
    assert "tool 1 has a name that is not text" in error_of({**turns(("user", "x")), "tools": tools}, "chat_template")


def test_tools_whose_parameters_are_text() -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": '{"type": "object"}'}}]
    example = convert({**turns(("user", "x")), "tools": tools}, "chat_template")
    assert example.tools == [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    assert "tool 1 has no name" in error_of({**turns(("user", "x")), "tools": [{"function": {}}]}, "chat_template")


def test_a_prompt_described_by_a_mapping() -> None:
    mapping: Any = {"format": "Q: {instruction} ({input})\nA:", "no_input_format": "Q: {instruction}\nA:"}
    row = {"instruction": "{x}", "input": "", "output": "y"}
    assert texts_of(convert(row, mapping)) == [("Q: {x}\nA:", False, 0), ("y", True, 1)]
    assert texts_of(convert({**row, "input": "{y}"}, mapping))[0][0] == "Q: {x} ({y})\nA:"
    assert texts_of(convert({**row, "system": "S. "}, mapping))[0][0] == "S. Q: {x}\nA:"
    assert texts_of(convert(row, {**mapping, "system_prompt": "D. "}))[0][0] == "D. Q: {x}\nA:"
    assert texts_of(convert(row, {"format": None}))[0][0] == "{x} ", "null means the default"
    wrong: list[tuple[Any, str]] = [
        ({"fromat": "x"}, "`type` has the unknown key `fromat`; it may have `system_prompt`, "),
        ({"format": "{instruction} {other}"}, "`format` of `type` has {other}; expected {input} and {instruction}"),
        ({"no_input_format": "{instruction} {input}"}, "has {input}; expected {instruction} (braces that are meant: "),
        ({"format": "{instruction!r}"}, "has {instruction}; expected"),
        ({"format": "{"}, "`format` of `type` is no format text"),
    ]
    for keys, message in wrong:
        assert message in error_of(row, keys)
    assert "no field 'instruction', expected text" in error_of({"output": "y"}, mapping)


def test_instructions_with_columns_of_their_own() -> None:
    assert "no field 'response', expected text; the row has instruction, output" in error_of(
        {"instruction": "x", "output": "y"}, "gpteacher"
    )
    assert "field 'choices' is not a list of texts" in error_of({"question": "x", "choices": "a"}, "explainchoice")
    assert "no field 'system', expected text" in error_of({"instruction": "x", "output": "y"}, "alpaca_w_system")
    empty = convert({"instruction": "x", "output": "y", "system": None}, "alpaca_w_system")
    assert texts_of(empty)[0][0] == "USER: x\nASSISTANT:"
    orca = {"system_prompt": "", "question": "x", "response": "y"}
    assert texts_of(convert(orca, "orcamini"))[0][0] == "### System:\n\n\n### User:\nx\n\n### Response:\n"
    assert texts_of(convert(orca, "alpaca_w_system.load_open_orca"))[0][0] == "### Human:\nx\n### Assistant:\n"
    assert texts_of(convert({"prompt": "x", "generation": "y"}, "metharme")) == [("x", False, 0), ("y", True, 3)]
    own = convert({"a": "x", "b": "y", "c": "z"}, "alpaca", field_instruction="a", field_output="b", field_input="c")
    assert texts_of(own)[0][0].endswith("### Instruction:\nx\n\n### Input:\nz\n\n### Response:\n")


def test_pygmalion_names_the_wrong_turn() -> None:
    assert "turn 1: unknown role 'humam', expected one of system, human, bot; did you mean 'human'?" in error_of(
        {"conversations": [{"role": "humam", "value": "x"}]}, "pygmalion"
    )
    assert "turn 1: no field 'value', expected text" in error_of({"conversations": [{"role": "bot"}]}, "pygmalion")


def test_formats_that_are_refused_say_what_to_do() -> None:
    for name in ("llama2_chat", "alpaca:chatt"):
        assert "is no format; expected one of those in docs/data.md" in error_of({}, name)
    assert "Did you mean 'alpaca:chat'?" in error_of({}, "alpaca:chatt")


def test_which_formats_need_a_chat_template() -> None:
    def needed(type_: Any) -> bool | None:
        return gives_conversations(DatasetConfig(path="x", type=type_))

    assert needed("chat_template") is needed("sharegpt") is True
    assert needed("alpaca:chatml") is needed(None) is needed({"format": "x"}) is needed("pygmalion") is False
    assert needed("my.module:function") is None


def test_each_key_of_a_format_is_read_by_it_and_no_other() -> None:
    """A key that a format does not read is an error of the config, and no part of what a prepared store depends on."""
    masks = {"roles_to_train", "turns_to_train", "train_on_eos", "train_on_eot", "rewritten_history"}
    masks |= {
        "generation_tags",
        "chat_template",
        "chat_template_jinja",
        "special_tokens_in_content",
    }  # read when rows are tokenised
    for name in get_args(FORMAT_NAMES):
        spec = DatasetConfig(path="data.jsonl", type=name)
        spec.forget_reads()
        resolve_format(spec)(Row("data.jsonl", 1, row_of(name)), spec)
        assert spec.keys_read() & FORMAT_KEYS == keys_of_format(name) - masks, name
