"""Exact ids, labels, weights and trained text of a row of every format, and of the options of conversations.

See `records` for how to rewrite `formats.json`.
"""

from __future__ import annotations

from functools import cache
from typing import Any, get_args

import pytest

from eft.config.data import DataConfig, DatasetConfig
from eft.config.formats import FORMATS
from eft.data.chat_template import template_of
from eft.data.formats import gives_conversations, resolve_format
from eft.data.readers import Row
from eft.data.tokenize import Outcome, encode_examples
from tests.golden import records
from tests.tiny import tiny_tokenizer

GOLDEN = "formats.json"
CHAT = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "What is the capital of Italy?"},
    {"role": "assistant", "content": "Rome."},
    {"role": "user", "content": "And of France? 😀"},
    {"role": "assistant", "content": "Paris."},
]
CALL = [{"type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}]
TOOLS = [{"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}]
TOOL_CHAT = [
    {"role": "user", "content": "Weather in Rome?"},
    {"role": "assistant", "content": None, "tool_calls": CALL},
    {"role": "tool", "content": '{"celsius": 21}', "name": "get_weather"},
    {"role": "assistant", "content": [{"type": "text", "text": "It is "}, {"type": "text", "text": "21."}]},
]
THINKING = [CHAT[1], {**CHAT[2], "reasoning_content": "one two"}, CHAT[3], {**CHAT[4], "reasoning_content": "three"}]
PARTS = [
    CHAT[1],
    {
        "role": "assistant",
        "content": [
            {"type": "text", "text": "one two ", "train": False},
            {"type": "text", "text": "three", "weight": 0.5},
            {"type": "text", "text": " four"},
        ],
    },
]
DETAIL = [{"begin_offset": 0, "end_offset": 2, "train": True}, {"begin_offset": 8, "end_offset": 12, "train": False}]
DETAIL += [{"begin_offset": 14, "end_offset": 17, "train": True, "weight": 2}]
INSTRUCTION = {"instruction": "Answer.", "input": "one two", "output": "three"}
WITH_SYSTEM = {**INSTRUCTION, "system": "You are helpful."}
CHOICE = {"question": "How are you?", "choices": ["fine", "hello"], "solution": "fine", "explanation": "not this"}
ORCA = {"system_prompt": "You are helpful.", "question": "How are you?", "response": "I am fine."}

ROWS: dict[str, dict[str, Any]] = {
    "chat_template": {"messages": CHAT},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "I am fine."}],
        "system": "Be short.",
    },
    "pygmalion": {
        "conversations": [
            {"role": "system", "value": "You are helpful.\n<START>"},
            {"role": "human", "value": "hello "},
            {"role": "bot", "value": " I am fine.\n"},
            {"role": "human", "value": "thank you"},
            {"role": "bot", "value": "hello"},
        ]
    },
    "gpteacher": {"instruction": "Answer.", "input": "one two", "response": "three"},
    "oasst": {"INSTRUCTION": "Answer.", "RESPONSE": "three"},
    "jeopardy": {"question": "the capital of Italy", "category": "France", "answer": "Rome"},
    "explainchoice": {"question": "How are you?", "choices": ["fine", "hello"], "explanation": "I am fine."},
    "concisechoice": CHOICE,
    "summarizetldr": {"article": "The capital of France is Paris.", "summary": "Paris"},
    "context_qa": {"article": "It is Rome.", "question": "What is it?", "answer": "Rome"},
    "context_qa.load_v2": {"context": "It is Rome.", "question": "What is it?", "answer": "Rome"},
    "context_qa.load_404": {"article": "It is Rome.", "unanswerable_question": "How are you?"},
    "creative_acr.load_answer": {"instruction": "How are you?", "revision": "I am fine."},
    "orcamini": ORCA,
    "metharme": {"prompt": "<|user|>hello<|assistant|>", "generation": "I am fine."},
    "alpaca_chat.load_qa": {"question": "How are you?", "answer": "fine"},
    "alpaca_chat.load_camel_ai": {"message_1": "How are you?", "message_2": "fine"},
    "completion": {"text": "hello world"},
    "input_output": {
        "segments": [
            {"label": False, "text": "hello "},
            {"label": True, "text": "world"},
            {"label": False, "text": "!"},
        ]
    },
    "pretokenized": {"input_ids": [5, 6, 7, 2], "labels": [-100, -100, 7, 2], "attention_mask": [1, 1, 1, 1]},
}


def row_of(format_name: str) -> dict[str, Any]:
    """A row of any of the formats."""
    if format_name in ROWS:
        return ROWS[format_name]
    base = format_name.partition(":")[0]
    if base in ROWS:
        return ROWS[base]
    if "open_orca" in base:
        return ORCA
    return WITH_SYSTEM if base.startswith("alpaca_w_system") else INSTRUCTION


OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "train_on_eos all": ({"messages": CHAT}, {"train_on_eos": "all"}),
    "train_on_eos last": ({"messages": CHAT}, {"train_on_eos": "last"}),
    "train_on_eos none": ({"messages": CHAT}, {"train_on_eos": "none"}),
    "train_on_eot none": ({"messages": CHAT}, {"train_on_eot": "none", "chat_template": "llama3"}),
    "train_on_inputs": ({"messages": CHAT}, {"train_on_inputs": True}),
    "user and assistant": ({"messages": CHAT}, {"roles_to_train": ["user", "assistant"]}),
    "last turn": ({"messages": CHAT}, {"turns_to_train": "last"}),
    "no system turn": ({"messages": CHAT}, {"drop_system_message": True}),
    "tools": ({"messages": TOOL_CHAT, "tools": TOOLS}, {"chat_template": "chatml"}),
    "reasoning": ({"messages": THINKING}, {"chat_template": "chatml"}),
    "reasoning that leaves the history": ({"messages": THINKING}, {"chat_template": "qwen3"}),
    "reasoning split from the content": (
        {"messages": [CHAT[1], {"role": "assistant", "content": "<think>\none two\n</think>\n\nRome."}]},
        {"chat_template": "qwen3", "split_thinking": True},
    ),
    "train of turns": (
        {"messages": [{**CHAT[1], "train": True}, {**CHAT[2], "train": False}, CHAT[3], CHAT[4]]},
        {"message_field_training": "train"},
    ),
    "weight of turns": ({"messages": [CHAT[1], {**CHAT[2], "weight": 0}, CHAT[3], {**CHAT[4], "weight": 0.25}]}, {}),
    "parts of a content": ({"messages": PARTS}, {}),
    "characters of a content": (
        {"messages": [CHAT[1], {"role": "assistant", "content": "one two three four", "detail": DETAIL}]},
        {"message_field_training_detail": "detail"},
    ),
    "special tokens escaped": (
        {"messages": [{"role": "user", "content": "What is <|im_end|>?"}, {"role": "assistant", "content": "<|end|>"}]},
        {"special_tokens_in_content": "escape"},
    ),
    "special tokens kept": (
        {"messages": [{"role": "user", "content": "What is <|im_end|>?"}, {"role": "assistant", "content": "<|end|>"}]},
        {"special_tokens_in_content": "keep"},
    ),
    "special tokens refused": ({"messages": [{"role": "user", "content": "What is <|im_end|>?"}, CHAT[2]]}, {}),
    "a mapping": (
        {"q": "How are you?", "a": "fine", "input": "hello"},
        {
            "type": {
                "field_instruction": "q",
                "field_output": "a",
                "system_prompt": "Be short.",
                "system_format": "<<{system}>> ",
                "format": "[INST] {instruction} {{{input}}} [/INST]",
                "no_input_format": "[INST] {instruction} [/INST]",
            }
        },
    ),
    "alpaca without input": ({"instruction": "Answer.", "input": "", "output": "three"}, {"type": "alpaca"}),
    "completion cut to fit": ({"text": "one two three four five six seven eight nine ten"}, {"type": "completion"}),
}


@cache
def golden_tokenizer(add_bos: bool = False) -> Any:
    specials = ("<|end|>", "<|user|>", "<|assistant|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    return tiny_tokenizer(add_bos=add_bos, specials=specials)


def encode(data: dict[str, Any], keys: dict[str, Any], **run: Any) -> Outcome:
    spec = DatasetConfig(path="data.jsonl", **{"type": "chat_template", **keys})
    cfg = DataConfig(datasets=[spec], **run)
    example = resolve_format(spec)(Row("data.jsonl", 1, data), spec)
    needs_template = gives_conversations(spec) is not False
    tokenizer = golden_tokenizer(add_bos=not needs_template)
    template = template_of(tokenizer, cfg, spec) if needs_template else None
    (outcome,) = encode_examples([example], tokenizer, spec, cfg, template)
    return outcome


def record_of(name: str) -> records.Record:
    if name in OPTIONS:
        data, keys = OPTIONS[name]
        short = {"sequence_len": 10} if name == "completion cut to fit" else {}
        return records.record(encode(data, keys, **short), golden_tokenizer())
    return records.record(encode(row_of(name), {"type": name}), golden_tokenizer())


NAMES = [*get_args(FORMATS), *OPTIONS]


def all_records() -> dict[str, Any]:
    return {name: record_of(name) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_format_gives_exactly_the_golden_ids_labels_and_text(name: str) -> None:
    assert record_of(name) == records.read(GOLDEN)[name]


def test_the_golden_file_has_every_format_and_nothing_else() -> None:
    assert set(records.read(GOLDEN)) == set(NAMES)
