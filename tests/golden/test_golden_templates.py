"""Exact ids, labels and trained text of every built-in template and of others with habits of their own, each with a
single question, several turns, a system text, tools, reasoning, and cut to a length.

See `records` for how to rewrite `templates.json`.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eft.config.data import DataConfig, DatasetConfig
from eft.config.templates import BUILT_IN_TEMPLATES
from eft.core.constants import IGNORE_INDEX
from eft.core.records import TokenSample
from eft.data.chat_template import template_of
from eft.data.formats import resolve_format
from eft.data.readers import Row
from eft.data.tokenize import Outcome, Rejected, encode_examples
from tests.golden import records
from tests.tiny import tiny_tokenizer

GOLDEN = "templates.json"
FOLDER = Path(__file__).with_name("templates")
STYLES = sorted(path.stem for path in FOLDER.glob("*.jinja"))
TEMPLATES = [*BUILT_IN_TEMPLATES, *STYLES]
DAY = "2025-01-31"
CUT = 40
"""Tokens that are left of the conversation of several turns in the case `truncated`."""

CALL = [{"type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}]
TOOLS = [{"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}]
SYSTEM = {"role": "system", "content": "Be short."}
SINGLE = [
    {"role": "user", "content": "What is the capital of Italy?"},
    {"role": "assistant", "content": "Rome."},
]
FURTHER = [{"role": "user", "content": "And of France? 😀"}, {"role": "assistant", "content": " It is Paris.\n"}]
MULTI = [*SINGLE, *FURTHER]
CASES: dict[str, dict[str, Any]] = {
    "single": {"messages": SINGLE},
    "multi-turn": {"messages": MULTI},
    "system": {"messages": [SYSTEM, *MULTI]},
    "tools": {
        "messages": [
            {"role": "user", "content": "Weather in Rome?"},
            {"role": "assistant", "content": None, "tool_calls": CALL},
            {"role": "tool", "content": '{"celsius": 21}', "name": "get_weather"},
            {"role": "assistant", "content": "It is 21."},
        ],
        "tools": TOOLS,
    },
    "reasoning": {
        "messages": [
            SINGLE[0],
            {**SINGLE[1], "reasoning_content": "one two"},
            FURTHER[0],
            {**FURTHER[1], "reasoning_content": "three"},
        ]
    },
}


@cache
def golden_tokenizer() -> Any:
    """Every token that the templates name is one of its special tokens, but for the tags of reasoning and tools."""
    named = {token for tokens in BUILT_IN_TEMPLATES.values() for token in tokens}
    more = ("<|call|>", "<|start|>", "<|channel|>", "<|message|>", "<|return|>", "<|close|>", "<|quote|>")
    return tiny_tokenizer(None, specials=tuple(sorted({*named, *more} - {"<|im_start|>", "<|im_end|>"})))


def config_of(name: str, rows: str = "data.jsonl") -> DatasetConfig:
    chosen = {"chat_template": name} if name in BUILT_IN_TEMPLATES else {}
    jinja = {} if name in BUILT_IN_TEMPLATES else {"chat_template_jinja": str(FOLDER / f"{name}.jinja")}
    return DatasetConfig(path=rows, type="chat_template", **chosen, **jinja)


def template_text(name: str) -> str:
    spec = config_of(name)
    day = {"chat_template_date": DAY} if name == "dated" else {}
    return template_of(golden_tokenizer(), DataConfig(datasets=[spec], **day), spec)


def encode(name: str, case: str, **keys: Any) -> Outcome:
    spec = config_of(name).model_copy(update=keys)
    example = resolve_format(spec)(Row("data.jsonl", 1, CASES[case]), spec)
    cfg = DataConfig(datasets=[spec])
    (outcome,) = encode_examples([example], golden_tokenizer(), spec, cfg, template_text(name))
    return outcome


def truncated(name: str) -> Outcome:
    """The first tokens of the conversation of several turns, as `excess_length_strategy: truncate` leaves them."""
    outcome = encode(name, "multi-turn")
    if isinstance(outcome, Rejected):
        return outcome
    samples = outcome if isinstance(outcome, tuple) else (outcome,)
    return tuple(TokenSample(sample.input_ids[:CUT], sample.labels[:CUT]) for sample in samples)


def all_records() -> dict[str, Any]:
    tokenizer = golden_tokenizer()
    return {
        name: {
            **{case: records.record(encode(name, case), tokenizer) for case in CASES},
            "truncated": records.record(truncated(name), tokenizer),
        }
        for name in TEMPLATES
    }


def test_there_are_enough_templates() -> None:
    assert len(BUILT_IN_TEMPLATES) >= 12
    assert len(TEMPLATES) >= 30
    assert records.read(GOLDEN).keys() == set(TEMPLATES)


@pytest.mark.parametrize("name", TEMPLATES)
def test_template_gives_exactly_the_golden_ids_labels_and_text(name: str) -> None:
    tokenizer = golden_tokenizer()
    golden = records.read(GOLDEN)[name]
    for case in CASES:
        assert records.record(encode(name, case), tokenizer) == golden[case], case
    assert records.record(truncated(name), tokenizer) == golden["truncated"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_are_those_of_transformers_for_the_conversation_that_ends_with_the_trained_turn(name: str) -> None:
    """A sample is the whole conversation, or the one up to its last trained turn: what a server would be given, and
    would have to answer."""
    tokenizer, text = golden_tokenizer(), template_text(name)
    for case, row in CASES.items():
        spec = config_of(name)
        example = resolve_format(spec)(Row("data.jsonl", 1, row), spec)
        assert example.messages is not None
        outcome = encode(name, case)
        if isinstance(outcome, Rejected):
            continue
        prefixes = []
        for end in range(1, len(example.messages) + 1):
            try:
                prefix = tokenizer.apply_chat_template(
                    example.messages[:end], tools=example.tools, chat_template=text, return_dict=False
                )
            except Exception:  # the template refuses this prefix
                continue
            prefixes.append(prefix)
        for sample in outcome if isinstance(outcome, tuple) else (outcome,):
            assert sample.input_ids.tolist() in prefixes, case
        last = outcome[-1] if isinstance(outcome, tuple) else outcome
        assert last.input_ids.tolist() == prefixes[-1]


@pytest.mark.parametrize("name", [style for style in STYLES if style.startswith("generation")])
@pytest.mark.parametrize("case", ["single", "multi-turn", "system"])
def test_masks_are_those_of_the_generation_tag(name: str, case: str) -> None:
    spec = config_of(name)
    example = resolve_format(spec)(Row("data.jsonl", 1, CASES[case]), spec)
    encoded = golden_tokenizer().apply_chat_template(
        example.messages, chat_template=template_text(name), return_dict=True, return_assistant_tokens_mask=True
    )
    sample = encode(name, case)
    assert isinstance(sample, TokenSample)
    assert sample.input_ids.tolist() == encoded["input_ids"]
    assert (sample.labels != IGNORE_INDEX).astype(int).tolist() == encoded["assistant_masks"]
    assert 0 < np.count_nonzero(sample.labels != IGNORE_INDEX) < len(sample.labels)


def test_each_trained_turn_is_in_exactly_one_sample() -> None:
    """Also where the template rewrites history: the answers that are trained are those of the row, none twice."""
    tokenizer = golden_tokenizer()
    for name in TEMPLATES:
        for case in ("multi-turn", "reasoning"):
            outcome = encode(name, case)
            if isinstance(outcome, Rejected):
                continue
            samples = outcome if isinstance(outcome, tuple) else (outcome,)
            trained = "".join(tokenizer.decode(sample.input_ids[sample.labels != IGNORE_INDEX]) for sample in samples)
            assert trained.count("Rome.") == trained.count("It is Paris.") == 1, (name, case)
            assert "capital" not in trained, (name, case)
            assert "France" not in trained, (name, case)


def test_history_that_is_rewritten_can_be_refused() -> None:
    for name in ("qwen3", "drops_thinking", "channels", "system_last"):
        case = "system" if name == "system_last" else "reasoning"
        assert isinstance(encode(name, case), tuple)
        refused = encode(name, case, rewritten_history="raise")
        assert isinstance(refused, Rejected)
        assert refused.reason.startswith("turn ")
        assert "set `rewritten_history: split`" in refused.reason


def test_truncation_of_prepared_data_is_that_of_the_golden_file(tmp_path: Path) -> None:
    specs, wanted = [], []
    for name in TEMPLATES:
        entries = records.read(GOLDEN)[name]["truncated"]
        trained = [entry for entry in (entries if isinstance(entries, list) else [entries]) if entry.get("labels")]
        if name == "dated" or not trained:
            continue  # a date belongs to a whole run; data sets without a trained token are refused
        wanted += trained
        rows = tmp_path / f"{name}.jsonl"
        rows.write_text(json.dumps(CASES["multi-turn"]) + "\n", encoding="utf-8")
        specs.append(config_of(name, str(rows)))
    cfg = DataConfig(
        datasets=specs,
        sequence_len=CUT,
        excess_length_strategy="truncate",
        shuffle_merged_datasets=False,
        dataset_prepared_path=str(tmp_path / "prepared"),
    )
    from eft.data.prepare import prepare_datasets

    prepared = prepare_datasets(cfg, golden_tokenizer())
    found = [records.record(prepared.train.sample(index), golden_tokenizer()) for index in range(len(prepared.train))]
    assert found == wanted
