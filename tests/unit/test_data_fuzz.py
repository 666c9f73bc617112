"""Thousands of broken rows over all formats: each becomes samples or one message with file, row and reason, and never
any other exception. Seeded, so that a failure can be repeated."""

from __future__ import annotations

import copy
import datetime
import json
import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from eft.config.data import DataConfig, DatasetConfig
from eft.config.formats import FORMATS, keys_of_format
from eft.core.constants import IGNORE_INDEX
from eft.core.errors import DataError
from eft.core.records import TokenSample
from eft.data.chat_template import template_of
from eft.data.formats import gives_conversations, resolve_format
from eft.data.readers import Row
from eft.data.tokenize import Rejected, encode_examples
from tests.golden.test_golden_formats import DETAIL, OPTIONS, TOOL_CHAT, TOOLS, golden_tokenizer, row_of

MUTANTS_PER_CASE = 90
BATCH = 100
LONGEST_MESSAGE = 1500


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def nested_names(depth: int) -> Any:
    value: Any = {}
    for _ in range(depth):
        value = {"a": value}
    return value


VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 3.5, float("nan"), float("inf"), 10**30, 10**5000, "", " ", "\n", "\x00", "\ud800",
    "text", "a\udfffb", "<|im_end|>", "<|end|>x", "</think>", "<think>", "{{ x }}", "{% raw %}", "é😀" * 20,
    "x" * 20_000, "[", "[]", datetime.date(2025, 1, 31), np.int64(3), np.zeros(2), range(3),
    '{"a": 1, "a": 2}', '[{"role": "user", "content": "x", "content": "y"}]', "[" * 3000, "1" * 5000, "null", "NaN", [],
    [[]], [None], {}, [{}], {"a": 1}, {1: 2}, {None: None}, {("a",): "b"}, {"role": "user"}, [1, "a"], b"\xff\xfe",
    nested(70), nested(3000), nested_names(80), nested_names(3000), {"text": "x"}, ["a", "b"],
    {"type": "image", "url": "x"}, [{"type": "text"}], [{"type": "text", "text": None}],
    [1.0, 2.0], [True, False], [2**40], [-1], [5, 6, 7, 2], [-100, -100, 7, 2], "assistant", "narrator", {"name": None},
    {"function": {"name": "f", "arguments": "{"}}, [{"function": {"name": 3}}], [{"name": "f", "arguments": [1]}],
]  # fmt: skip
NAMES = ["", "role", "content", "messages", "tools", "train", "weight", "extra", "from", "value", "text", "é" * 300]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value inside."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if len(path) > 5:
        return
    for name, item in items:
        yield (*path, name)
        yield from places(item, (*path, name))


def parent_of(row: dict[str, Any], path: tuple[Any, ...]) -> Any:
    value: Any = row
    for name in path[:-1]:
        value = value[name]
    return value


def mutated(row: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    """The row with one to three faults."""
    row = copy.deepcopy(row)
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        path = chance.choice([(), *places(row)])
        if not path:
            row[chance.choice(NAMES)] = chance.choice(VALUES)
            continue
        parent, name = parent_of(row, path), path[-1]
        fault = chance.randrange(6)
        if fault == 0 and isinstance(parent, dict):
            del parent[name]
        elif fault == 1 and isinstance(parent, dict):
            parent[chance.choice(NAMES)] = parent.pop(name)
        elif fault == 2 and isinstance(parent, list):
            parent.insert(name, chance.choice(parent))
        elif fault == 3 and isinstance(parent, list):
            del parent[name]
        elif fault == 4 and isinstance(parent[name], str):
            text = parent[name]
            parent[name] = chance.choice(
                [text[::-1], text + "\ud83d", text.encode(errors="replace"), [text], {"text": text}, text * 50]
            )
        else:
            parent[name] = chance.choice(VALUES)
    return row


def cases() -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Name → (a good row, the keys of its entry): every format, and every option of conversations."""
    found = {name: (row_of(name), {"type": name}) for name in get_args(FORMATS)}
    found |= {name: (row, {"type": "chat_template", **keys}) for name, (row, keys) in OPTIONS.items()}
    for template in ("chatml", "qwen3"):
        keys = {"type": "chat_template", "chat_template": template, "special_tokens_in_content": "keep"}
        found[f"tools, {template}"] = ({"messages": TOOL_CHAT, "tools": TOOLS}, keys)
    everything = {
        "message_field_training": "train",
        "message_field_training_detail": "train_detail",
        "split_thinking": True,
        "special_tokens_in_content": "escape",
    }
    turn = {"role": "assistant", "content": "one two three four", "train": True, "train_detail": DETAIL, "weight": 2}
    answered = {"messages": [{"role": "user", "content": "hello"}, turn]}
    found["all marks"] = (answered, {"type": "chat_template", "chat_template": "chatml", **everything})
    return found


def samples_of(outcome: Any) -> tuple[TokenSample, ...]:
    return outcome if isinstance(outcome, tuple) else (outcome,)


def require_sound(sample: TokenSample) -> None:
    assert sample.input_ids.dtype == sample.labels.dtype == np.int32
    assert len(sample.input_ids) == len(sample.labels)
    assert np.all((sample.labels == IGNORE_INDEX) | (sample.labels == sample.input_ids))
    if sample.weights is not None:
        assert sample.weights.dtype == np.float32
        assert np.all(np.isfinite(sample.weights))
        assert np.all(sample.weights >= 0)


@pytest.mark.parametrize("part", range(4))
def test_a_broken_row_gives_one_message_or_samples_and_nothing_else(part: int) -> None:
    started = time.process_time()
    outcomes: Counter[str] = Counter()
    for index, (name, (row, keys)) in enumerate(sorted(cases().items())):
        if index % 4 == part:
            fuzz(name, row, keys, outcomes)
    assert sum(outcomes.values()) >= 1250, outcomes
    assert outcomes["message"] > outcomes.total() / 5
    assert outcomes["sample"] > outcomes.total() / 20
    assert time.process_time() - started < 20


def fuzz(name: str, row: dict[str, Any], keys: dict[str, Any], outcomes: Counter[str]) -> None:
    chance = random.Random(name)
    spec = DatasetConfig(path="data.jsonl", **keys)
    cfg = DataConfig(datasets=[spec], sequence_len=64)
    is_chat = gives_conversations(spec) is not False
    tokenizer = golden_tokenizer(add_bos=not is_chat)
    template = template_of(tokenizer, cfg, spec) if is_chat else None
    convert = resolve_format(spec)
    examples = []
    for number in range(1, MUTANTS_PER_CASE + 1):
        broken = Row("data.jsonl", number, mutated(row, chance))
        try:
            examples.append(convert(broken, spec))
        except DataError as error:
            require_message(str(error), number)
            outcomes["message"] += 1
    for start in range(0, len(examples), BATCH):
        batch = examples[start : start + BATCH]
        for example, outcome in zip(batch, encode_examples(batch, tokenizer, spec, cfg, template), strict=True):
            if isinstance(outcome, Rejected):
                require_message(f"{example.where}: {outcome.reason}", None)
                outcomes["message"] += 1
                continue
            outcomes["sample"] += 1
            for sample in samples_of(outcome):
                require_sound(sample)
            json.dumps({"messages": example.messages, "tools": example.tools})  # what the store keeps of it


def require_message(message: str, number: int | None) -> None:
    where = "data.jsonl row " if number is None else f"data.jsonl row {number}"
    assert message.startswith(where), message[:200]
    assert len(message) <= LONGEST_MESSAGE, message
    assert len(message.partition(": ")[2]) > 10, message


def test_the_corpus_is_large_and_covers_every_format() -> None:
    assert len(cases()) * MUTANTS_PER_CASE >= 5000
    assert set(get_args(FORMATS)) <= set(cases())
    used = set().union(*(keys.keys() for _, keys in cases().values()))
    masking = keys_of_format("chat_template") - {"field_messages", "field_tools", "field_system", "field_thinking"}
    assert {"train_on_eos", "turns_to_train", "split_thinking", "special_tokens_in_content"} <= used & masking


def test_broken_rows_of_a_file_are_counted_drops(tmp_path: Path) -> None:
    """Through the whole preparation: every row is a sample or a drop with its message, and the ledger balances."""
    chance = random.Random(7)
    lines = []
    for row, _ in (cases()["chat_template"], cases()["tools, qwen3"]):
        lines.append(json.dumps(row))
        for _ in range(150):
            try:
                lines.append(json.dumps(mutated(row, chance)))
            except (TypeError, ValueError, RecursionError):
                continue  # no JSON file holds such a value
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(lines) + "\n", encoding="utf-8")
    spec = DatasetConfig(path=str(rows), type="chat_template", chat_template="qwen3")
    cfg = DataConfig(
        datasets=[spec], malformed_rows="drop", sequence_len=4096, dataset_prepared_path=str(tmp_path / "prepared")
    )
    from eft.data.prepare import prepare_datasets

    (account,) = prepare_datasets(cfg, golden_tokenizer()).ledger.sources
    account.check()
    assert account.rows == len(lines)
    assert account.samples > account.further_samples > 0
    assert sum(portion.rows for portion in account.dropped.values()) > 50
    for reason in ("malformed", "template"):
        assert all(f"{rows}" in place for place in account.dropped[reason].first_rows)
