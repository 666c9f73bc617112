"""One conversation written in every format that can say it: the same ids and the same labels."""

from __future__ import annotations

import json
import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eft.config.data import DataConfig, DatasetConfig
from eft.core.constants import IGNORE_INDEX
from eft.core.records import TokenSample
from eft.data.chat_template import template_of
from eft.data.formats import gives_conversations, resolve_format
from eft.data.formats.instruct import ALPACA
from eft.data.readers import Row
from eft.data.tokenize import encode_examples
from tests.tiny import tiny_tokenizer

BETWEEN = (  # ChatML with its line breaks between the turns, as the instruction formats in ChatML have them
    "{% for m in messages %}{{ ('' if loop.first else '\n') + '<|im_start|>' + m.role + '\n' + m.content }}"
    "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '\n<|im_start|>assistant\n' }}{% endif %}"
)
TOKENIZER = tiny_tokenizer(BETWEEN)
Turns = list[tuple[str, str]]


def encode(data: dict[str, Any], type_: Any, **keys: Any) -> TokenSample:
    spec = DatasetConfig(path="data.jsonl", type=type_, **keys)
    cfg = DataConfig(datasets=[spec])
    template = None if gives_conversations(spec) is False else template_of(TOKENIZER, cfg, spec)
    (sample,) = encode_examples(
        [resolve_format(spec)(Row("data.jsonl", 1, data), spec)], TOKENIZER, spec, cfg, template
    )
    assert isinstance(sample, TokenSample), sample
    return sample


def openai(turns: Turns) -> list[dict[str, Any]]:
    return [{"role": role, "content": text} for role, text in turns]


def as_conversation(turns: Turns) -> dict[str, TokenSample]:
    """The conversation in every format for any conversation."""
    messages = openai(turns)
    parts = [
        {"role": role, "content": [{"type": "text", "text": text[:3]}, {"type": "text", "text": text[3:]}]}
        for role, text in turns
    ]
    names = {"user": "human", "assistant": "gpt"}
    share = [{"from": names.get(role, role), "value": text} for role, text in turns]
    others = [{"who": f"the {role}", "says": text, "spare": None} for role, text in turns]
    roles = {role: [f"the {role}"] for role in ("system", "user", "assistant")}
    mapping = {"role": "who", "content": "says"}
    found = {
        "chat_template": encode({"messages": messages}, "chat_template"),
        "content parts": encode({"messages": parts}, "chat_template"),
        "JSON text": encode({"messages": json.dumps(messages)}, "chat_template"),
        "sharegpt": encode({"conversations": share}, "sharegpt"),
        "other names": encode(
            {"talk": others},
            "chat_template",
            field_messages="talk",
            message_property_mappings=mapping,
            roles=roles,
        ),
        "function, messages": encode({"turns": messages}, "equivalence_formats:messages"),
        "function, segments": encode({"turns": messages}, "equivalence_formats:segments"),
    }
    if turns[0][0] == "system":
        row = {"messages": messages[1:], "system": turns[0][1]}
        found["system column"] = encode(row, "chat_template")
    found["input_output"] = encode({"segments": segments({"turns": messages})["segments"]}, "input_output")
    marked = [{**message, "train": message["role"] == "assistant"} for message in messages]
    found["train of turns"] = encode(
        {"messages": marked}, "chat_template", roles_to_train=[], message_field_training="train"
    )
    first = found["chat_template"]
    ids = {"input_ids": first.input_ids.tolist(), "labels": first.labels.tolist()}
    found["pretokenized"] = encode(ids, "pretokenized")
    found["no type"] = encode({**ids, "attention_mask": [1] * len(first.labels)}, None)
    return found


def messages(row: dict[str, Any]) -> dict[str, Any]:
    return {"messages": row["turns"]}


def segments(row: dict[str, Any]) -> dict[str, Any]:
    """The same text in pieces, cut at the edges of what is trained."""
    pieces = []
    for number, turn in enumerate(row["turns"]):
        opening = ("\n" if number else "") + f"<|im_start|>{turn['role']}\n"
        is_trained = turn["role"] == "assistant"
        pieces.append({"label": False, "text": opening})
        pieces.append({"label": is_trained, "text": turn["content"] + "<|im_end|>"})
    return {"segments": pieces}


@pytest.fixture(autouse=True)
def own_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("equivalence_formats")
    monkeypatch.setattr(module, "messages", messages, raising=False)
    monkeypatch.setattr(module, "segments", segments, raising=False)
    monkeypatch.setitem(sys.modules, "equivalence_formats", module)


def as_instruction(instruction: str, answer: str) -> dict[str, TokenSample]:
    """A question with Alpaca's system text in every format that says the same in ChatML."""
    system = ALPACA.without_input
    row = {"instruction": instruction, "output": answer}
    orca = {"system_prompt": system, "question": instruction, "response": answer}
    prompt = {
        "system_prompt": system,
        "system_format": "<|im_start|>system\n{system}<|im_end|>\n",
        "no_input_format": "<|im_start|>user\n{instruction}<|im_end|>\n<|im_start|>assistant\n",
    }
    return {
        **as_conversation([("system", system), ("user", instruction), ("assistant", answer)]),
        "alpaca:chatml": encode(row, "alpaca:chatml"),
        "renamed columns": encode(
            {"a": instruction, "b": answer}, "alpaca:chatml", field_instruction="a", field_output="b"
        ),
        "gpteacher:chatml": encode({"instruction": instruction, "response": answer}, "gpteacher:chatml"),
        "oasst:chatml": encode({"INSTRUCTION": instruction, "RESPONSE": answer}, "oasst:chatml"),
        "open orca": encode(orca, "alpaca_w_system.load_open_orca_chatml"),
        "a mapping": encode(row, prompt),
    }


def require_equal(found: dict[str, TokenSample]) -> None:
    first = found["chat_template"]
    assert np.any(first.labels != IGNORE_INDEX)
    for name, sample in found.items():
        assert np.array_equal(sample.input_ids, first.input_ids), name
        assert np.array_equal(sample.labels, first.labels), name
        assert sample.weights is None, name


TEXT = st.text(alphabet="abcdefgh", min_size=4, max_size=8).map(lambda text: f"{text} one, two.")


@settings(max_examples=15, deadline=None)
@given(questions=st.lists(TEXT, min_size=1, max_size=4), answers=st.lists(TEXT, min_size=4, max_size=4), system=TEXT)
def test_conversations(questions: list[str], answers: list[str], system: str) -> None:
    turns: Turns = [("system", system)] if len(questions) % 2 else []
    for question, answer in zip(questions, answers, strict=False):
        turns += [("user", question), ("assistant", answer)]
    require_equal(as_conversation(turns))


@settings(max_examples=15, deadline=None)
@given(instruction=TEXT, answer=TEXT)
def test_instructions(instruction: str, answer: str) -> None:
    found = as_instruction(instruction, answer)
    assert len(found) >= 18
    require_equal(found)
