"""The cache, option by option: what changes an id or a label makes a new store, and nothing else does."""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eft.config.data import DataConfig, DatasetConfig
from eft.config.model import ModelConfig
from eft.core.errors import DataError
from eft.data import cache, masking_code
from eft.data.prepare import prepare_datasets
from eft.models import tokenizer as models_tokenizer
from eft.models.tokenizer import load_tokenizer
from tests.unit.test_data_prepare import byte_tokenizer, config, write_rows

TOKENIZER = byte_tokenizer()
THINK = "<think>why not</think>"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EFT_CACHE", str(tmp_path / "cache"))


def turn(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def rows() -> list[dict[str, Any]]:
    """Conversations in which every option of the chat format has something to decide."""
    found = []
    for index in range(6):
        answer = turn("assistant", f"{THINK}yes, {index}", motive=f"because {index}", heavy=0.25)
        answer |= {"skip": False, "parts": [{"begin_offset": 0, "end_offset": 2, "train": False}]}
        messages = [turn("system", "be brief"), turn("user", f"what {index}?"), answer]
        messages += [turn("user", "more"), turn("assistant", "long " * (2 * index))]
        found.append(
            {
                "messages": messages,
                "turns": [turn("user", "other"), turn("assistant", f"turns {index}")],
                "odd": [turn("user", "what is <eos>?"), turn("assistant", f"an end {index}")],
                "text": f"plain {index}",
                "rules": f"be {index}",
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
                "more_tools": [{"type": "function", "function": {"name": "g", "parameters": {}}}],
            }
        )
    return found


NEW = "another store"
SAME = "the same store"
ERROR = "an error"

Case = tuple[Any, str] | tuple[Any, str, dict[str, Any]]
"""A value, what comes of it beside the default, and the keys of both preparations."""

PLAIN = "{% for message in messages %}{{ message.role + ': ' + message.content + '<eos>' }}{% endfor %}"
THOUGHTS = (
    "{% for message in messages %}{{ message.role + ': ' }}{% if message.thoughts %}{{ message.thoughts }}"
    "{% elif message.reasoning_content %}{{ 'so: ' + message.reasoning_content }}{% endif %}"
    "{{ message.content + '<eos>' }}{% endfor %}"
)
TAGGED = (
    "{% for message in messages %}{{ message.role + ': ' }}{% generation %}{{ message.content }}{% endgeneration %}"
    "{{ '<eos>' }}{% endfor %}"
)
DATED = "{{ strftime_now('%d %m %Y') }}" + PLAIN
GREETED = "{{ greeting or '' }}" + PLAIN
OWN: dict[str, Any] = {"field_tools": "none", "message_field_weight": "none"}
"""For templates without tools."""


def jinja(text: str, **entry: Any) -> dict[str, Any]:
    return {"chat_template": "jinja", "chat_template_jinja": text, "entry": {**OWN, **entry}}


OTHER_TURNS: dict[str, Any] = {"entry": {"field_messages": "turns"}}
ODD: dict[str, Any] = {"entry": {"field_messages": "odd", "special_tokens_in_content": "escape"}}
LONG: dict[str, Any] = {"sequence_len": 4096}
REASONED: dict[str, Any] = {"chat_template": "qwen3", "entry": {**OWN, "split_thinking": True}}

ENTRY_OPTIONS: dict[str, list[Case]] = {
    "ds_type": [("json", SAME)],
    "name": [("a name", SAME)],
    "revision": [("main", SAME)],
    "split": [("train[:3]", NEW)],
    "type": [("completion", NEW, {"chat_template": "tokenizer_default", "entry": OWN}), ("alpaca", ERROR)],
    "field_messages": [("turns", NEW)],
    "message_property_mappings": [({"content": "motive"}, ERROR)],
    "roles": [({"assistant": ["user"]}, NEW)],
    "field_tools": [("more_tools", NEW)],
    "field_thinking": [("motive", NEW)],
    "template_thinking_key": [("thoughts", NEW, jinja(THOUGHTS, field_thinking="motive"))],
    "split_thinking": [(True, NEW)],
    "drop_system_message": [(True, NEW)],
    "message_field_training": [("skip", NEW)],
    "message_field_training_detail": [("parts", NEW)],
    "message_field_weight": [("heavy", NEW)],
    "roles_to_train": [(["user"], NEW)],
    "turns_to_train": [("last", NEW)],
    "train_on_eos": [("none", NEW), ("last", NEW), ("all", NEW)],
    "train_on_eot": [("turn", SAME), ("none", NEW, jinja(PLAIN))],
    "chat_template": [("chatml", SAME), ("qwen3", NEW, LONG)],
    "chat_template_jinja": [(PLAIN, SAME, jinja(PLAIN)), ("so " + PLAIN, NEW, jinja(PLAIN))],
    "rewritten_history": [("raise", ERROR, REASONED)],
    "special_tokens_in_content": [("keep", NEW, ODD), ("error", ERROR, ODD)],
    "field": [("other", SAME)],
    "field_system": [("rules", NEW, OTHER_TURNS)],
    "field_instruction": [("other", SAME)],
    "field_input": [("other", SAME)],
    "field_output": [("other", SAME)],
    "field_segments": [("other", SAME)],
    "train_on_inputs": [(True, NEW), (False, SAME)],
    "generation_tags": [("ignore", NEW, jinja(TAGGED))],
    "weight": [(2.0, SAME)],
    "token_share": [(1.0, SAME)],
    "max_rows": [(3, SAME)],
    "max_tokens": [(1000, SAME)],
}
GLOBAL_OPTIONS: dict[str, list[Case]] = {
    "val_set_size": [(2.0, SAME)],
    "chat_template": [("qwen3", NEW, LONG)],
    "chat_template_jinja": [("so " + PLAIN, NEW, jinja(PLAIN))],
    "chat_template_kwargs": [({"greeting": "hello"}, NEW, jinja(GREETED)), ({}, SAME, jinja(GREETED))],
    "chat_template_date": [
        ("2026-02-01", NEW, {**jinja(DATED), "chat_template_date": "2026-01-02"}),
        ("2026-01-02", SAME, {**jinja(DATED), "chat_template_date": "2026-01-02"}),
    ],
    "eot_tokens": [(["<|im_start|>"], NEW, jinja(PLAIN))],
    "train_on_inputs": [(True, NEW)],
    "sequence_len": [(4096, SAME), (379, SAME), (350, NEW)],
    "excess_length_strategy": [("truncate", SAME), ("raise", SAME)],
    "min_sample_len": [(329, SAME), (340, NEW)],
    "malformed_rows": [("drop", SAME)],
    "dataset_processes": [(1, SAME)],
    "shuffle_merged_datasets": [(False, SAME)],
    "dataset_exact_deduplication": [(True, SAME)],
    "seed": [(7, SAME)],
    "epoch_tokens": [(1000, SAME)],
    "data_gates": [("warn", SAME)],
    "data_gate_limits": [({"duplicates": 0.5}, SAME)],
    "data_gate_conversations": [(7, SAME)],
}
PLACES = {"path", "data_files", "datasets", "test_datasets", "dataset_prepared_path"}
"""Where rows and stores are: see the tests of moved files below."""

CASES = [
    pytest.param(place, name, *case[:2], (*case, {})[2], id=f"{place} {name} {str(case[0])[:20]}")
    for place, options in (("entry", ENTRY_OPTIONS), ("global", GLOBAL_OPTIONS))
    for name, cases in options.items()
    for case in cases
]


def test_the_table_has_every_option() -> None:
    """A new key has to be put into it, with a value that shows whether it decides an id, label or weight."""
    assert set(ENTRY_OPTIONS) | PLACES >= set(DatasetConfig.model_fields) >= set(ENTRY_OPTIONS)
    assert set(GLOBAL_OPTIONS) | PLACES >= set(DataConfig.model_fields) >= set(GLOBAL_OPTIONS)
    assert all(cases for cases in (*ENTRY_OPTIONS.values(), *GLOBAL_OPTIONS.values()))


def changed(path: str, place: str, name: str, value: Any, **keys: Any) -> DataConfig:
    keys = {"type": "chat_template", "chat_template": "chatml", "sequence_len": 512, **keys}
    if place == "entry":
        keys["entry"] = {**keys.get("entry", {}), name: value}
    elif name:
        keys[name] = value
    return config(path, **keys)


def content(path: str, cfg: DataConfig, location: Path) -> tuple[str, bool]:
    """(fingerprint of the store, whether there was one)."""
    prepared = prepare_datasets(cfg.model_copy(update={"dataset_prepared_path": str(location)}), TOKENIZER)
    (store,) = prepared.train.bases  # type: ignore[attr-defined]
    return store.fingerprint, ": reused " in prepared.cache_note


@pytest.mark.parametrize(("place", "name", "value", "outcome", "keys"), CASES)
def test_an_option_makes_a_new_store_exactly_where_it_changes_one(
    tmp_path: Path, place: str, name: str, value: Any, outcome: str, keys: dict[str, Any]
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", rows())
    base, _ = content(path, changed(path, "", "", None, **keys), tmp_path / "a")
    cfg = changed(path, place, name, value, **keys)
    if outcome == ERROR:
        with pytest.raises(DataError, match="row 1"):
            content(path, cfg, tmp_path / "a")
        return
    fingerprint, reused = content(path, cfg, tmp_path / "a")
    alone, was_there = content(path, cfg, tmp_path / "b")
    assert not was_there
    assert fingerprint == alone
    assert (alone != base) is (outcome == NEW)
    assert reused is (outcome == SAME)


def bare_rows() -> list[dict[str, Any]]:
    """Questions and answers, and nothing that any other key speaks of."""
    return [{"messages": [turn("user", f"what {index}?"), turn("assistant", f"yes, {index}")]} for index in range(6)]


WITHOUT_SAY: dict[str, list[Any]] = {
    "field_system": ["rules"],
    "field_tools": ["functions"],
    "field_thinking": ["motive"],
    "template_thinking_key": ["thoughts"],
    "split_thinking": [True],
    "drop_system_message": [True],
    "message_field_training": ["skip"],
    "message_field_training_detail": ["parts"],
    "message_field_weight": ["heavy"],
    "roles_to_train": [["assistant", "tool"], ["system", "assistant"]],
    "rewritten_history": ["raise"],
    "special_tokens_in_content": ["keep", "escape"],
    "generation_tags": ["ignore"],
}
"""Keys of an entry that chat rows are read with, and values that decide nothing in rows without what they speak of."""
BY_VALUE: dict[str, Any] = {
    "message_property_mappings": {"name": "who"},
    "roles": {"assistant": ["bot"]},
    "turns_to_train": "last",
    "train_on_eos": "last",
    "train_on_eot": "last",
}
"""Keys that count by their value, also where another value gives the same samples."""


def test_every_key_that_chat_rows_are_read_with_is_in_one_of_the_two(tmp_path: Path) -> None:
    cfg = changed(write_rows(tmp_path / "rows.jsonl", bare_rows()), "", "", None)
    (store,) = prepare_datasets(cfg, TOKENIZER).train.bases  # type: ignore[attr-defined]
    always = {"field_messages", "path", "type", "train_on_inputs", "chat_template", "chat_template_jinja"}
    read = set(store.meta["keys_read"]["spec"]) - always
    assert read | {"generation_tags"} == set(WITHOUT_SAY) | set(BY_VALUE)


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, values in WITHOUT_SAY.items() for value in values],
    ids=str,
)
def test_a_key_that_had_nothing_to_decide_finds_the_store(tmp_path: Path, name: str, value: Any) -> None:
    path = write_rows(tmp_path / "rows.jsonl", bare_rows())
    base, _ = content(path, changed(path, "", "", None), tmp_path / "a")
    cfg = changed(path, "entry", name, value)
    assert content(path, cfg, tmp_path / "a") == (base, True)
    assert content(path, cfg, tmp_path / "b") == (base, False)


@pytest.mark.parametrize("name", BY_VALUE)
def test_the_other_keys_count_by_their_value_and_the_page_says_so(tmp_path: Path, name: str) -> None:
    path = write_rows(tmp_path / "rows.jsonl", bare_rows())
    base, _ = content(path, changed(path, "", "", None), tmp_path / "a")
    assert content(path, changed(path, "entry", name, BY_VALUE[name]), tmp_path / "a") == (base, False)
    page = (Path(__file__).parents[2] / "docs/preparation.md").read_text()
    sentence = " ".join(page.split()).partition("count by their value")[2].partition(". ")[0]
    assert f"`{name}`" in sentence


FEATURES: dict[str, dict[str, Any]] = {
    "system turn": {"messages": [turn("system", "be brief"), turn("user", "what?"), turn("assistant", "yes")]},
    "system column": {"rules": "be kind"},
    "tools": {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
    "other tools": {"functions": [{"type": "function", "function": {"name": "g", "parameters": {}}}]},
    "reasoning": {"messages": [turn("user", "what?"), turn("assistant", "yes", motive="so")]},
    "usual reasoning": {"messages": [turn("user", "what?"), turn("assistant", "yes", thinking="thus")]},
    "tags": {"messages": [turn("user", "what?"), turn("assistant", f"{THINK}yes")]},
    "special text": {"messages": [turn("user", "a <eos>?"), turn("assistant", "yes")]},
    "marks": {"messages": [turn("user", "what?", skip=True), turn("assistant", "yes", heavy=0.5, skip=False)]},
    "weight": {"messages": [turn("user", "what?"), turn("assistant", "yes", weight=0.5)]},
    "text": {"messages": json.dumps([turn("user", "what?"), turn("assistant", "yes", motive="so")])},
    "history": {
        "messages": [
            turn("user", "what?"),
            turn("assistant", "yes", thinking="thus"),
            turn("user", "more"),
            turn("assistant", "no", thinking="then"),
        ]
    },
    "unreadable": {"messages": [turn("user", "what?"), turn("assistant", "yes", weight="much")]},
}
ENTRY_VALUES: dict[str, list[Any]] = {
    "field_system": ["system", "rules"],
    "field_tools": ["tools", "functions"],
    "field_thinking": ["reasoning_content", "motive", "thinking"],
    "split_thinking": [False, True],
    "drop_system_message": [False, True],
    "message_field_training": [None, "skip"],
    "message_field_weight": ["weight", "heavy"],
    "roles_to_train": [["assistant"], ["assistant", "system"], ["assistant", "tool"]],
    "special_tokens_in_content": ["error", "keep", "escape"],
    "rewritten_history": ["split", "raise"],
    "generation_tags": ["follow", "ignore"],
}
entries = st.fixed_dictionaries({name: st.sampled_from(values) for name, values in ENTRY_VALUES.items()})


@settings(max_examples=60, deadline=None)
@given(
    features=st.lists(st.sampled_from(sorted(FEATURES)), max_size=3),
    template=st.sampled_from(["chatml", "qwen3", "jinja"]),
    first=entries,
    changes=st.dictionaries(st.sampled_from(sorted(ENTRY_VALUES)), st.integers(0, 2), min_size=1, max_size=3),
)
def test_a_store_that_is_found_is_the_one_that_would_be_made(
    tmp_path_factory: pytest.TempPathFactory,
    features: list[str],
    template: str,
    first: dict[str, Any],
    changes: dict[str, int],
) -> None:
    folder = tmp_path_factory.mktemp("found")
    found = [{**row, **FEATURES[name]} for row, name in zip(bare_rows(), features, strict=False)]
    path = write_rows(folder / "rows.jsonl", [*found, *bare_rows()])
    second = first | {name: ENTRY_VALUES[name][at % len(ENTRY_VALUES[name])] for name, at in changes.items()}
    text = {"chat_template_jinja": TAGGED} if template == "jinja" else {}
    stores = []
    for entry, location in ((first, "a"), (second, "a"), (second, "b")):
        cfg = changed(path, "", "", None, chat_template=template, malformed_rows="drop", entry=entry, **text)
        stores.append(content(path, cfg, folder / location))
    assert stores[1][0] == stores[2][0]
    assert not stores[2][1]


MODEL_OPTIONS: dict[str, list[tuple[Any, str]]] = {
    "special_tokens": [
        ({"pad_token": "<|im_end|>"}, SAME),  # padding is no part of a row
        ({"eos_token": "<eos>"}, NEW),
        ({"bos_token": "<|new|>"}, NEW),
    ],
    "tokens": [(["answer"], NEW)],
}
TOKENIZER_PLACES = {"base_model", "gguf_file", "revision_of_model", "trust_remote_code", "tokenizer_config"}
"""Where the tokenizer comes from: what it is counts, see the copied tokenizer below."""
NOT_OF_THE_TOKENIZER = {
    "resize_token_embeddings_to_32x",
    "attn_implementation",
    "load_in_4bit",
    "load_in_8bit",
    "processor_type",  # rows with images have no store
    "bnb_config_kwargs",
}


def test_every_key_of_the_model_is_known_to_change_the_tokenizer_or_not() -> None:
    """What prepares data gets the tokenizer and the section of the data, and nothing else of the config."""
    known = {*MODEL_OPTIONS, *TOKENIZER_PLACES, *NOT_OF_THE_TOKENIZER}
    assert known == set(ModelConfig.model_fields)
    loader = inspect.getsource(load_tokenizer) + inspect.getsource(models_tokenizer._load_plain)
    assert set(re.findall(r"cfg\.(\w+)", loader)) == set(MODEL_OPTIONS) | TOKENIZER_PLACES


@pytest.mark.parametrize(
    ("name", "value", "outcome"),
    [(name, *case) for name, cases in MODEL_OPTIONS.items() for case in cases],
    ids=lambda value: str(value)[:30],
)
def test_a_tokenizer_option_makes_a_new_store_where_it_may_change_an_id(
    tmp_path: Path, name: str, value: Any, outcome: str
) -> None:
    TOKENIZER.save_pretrained(tmp_path / "model")
    shutil.copytree(tmp_path / "model", tmp_path / "copy")
    cfg = changed(write_rows(tmp_path / "rows.jsonl", rows()), "", "", None)
    prepare_datasets(cfg, load_tokenizer(ModelConfig(base_model=str(tmp_path / "model"))))
    copied = load_tokenizer(ModelConfig(base_model=str(tmp_path / "copy")))
    assert ": reused " in prepare_datasets(cfg, copied).cache_note
    other = load_tokenizer(ModelConfig.model_validate({"base_model": str(tmp_path / "copy"), name: value}))
    assert (": reused " in prepare_datasets(cfg, other).cache_note) is (outcome == SAME)


def test_another_token_that_the_template_writes_counts(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", rows())
    cfg = changed(path, "", "", None, **jinja("{{ pad_token }}" + PLAIN))
    first = prepare_datasets(cfg, TOKENIZER)
    other = byte_tokenizer()
    other.pad_token = "<|im_start|>"
    second = prepare_datasets(cfg, other)
    assert "(tokenizer changed)" in second.cache_note
    assert first.train.fingerprint != second.train.fingerprint


def test_the_masking_code_is_all_that_lies_between_the_rows_and_a_store() -> None:
    """What these modules import of this room has a say, or is named here with the reason why not."""
    without_say = {
        "ledger": "counts",
        "sample_set": "reads what is there, and what it digests is in the store's version",
    }
    root = Path(masking_code.__file__).parent
    found, left = set(), ["block_encoder", "sources", "bpe"]
    while left:
        name = left.pop()
        found.add(name)
        path = root / name.replace(".", "/")
        source = (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text(encoding="utf-8")
        imported = re.findall(r"^\s*from eft\.data\.([\w.]+) import", source, re.MULTILINE)
        imported += re.findall(r"^\s*from eft\.data import (\w+)", source, re.MULTILINE)
        left += sorted(set(imported) - found - set(without_say))
    assert set(masking_code.DECIDING) == found


def test_the_masking_code_changes_with_its_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(masking_code.__file__).parent
    shutil.copytree(root, tmp_path / "data")
    monkeypatch.setattr(masking_code.resources, "files", lambda package: tmp_path / "data")
    digests = set()
    for name in ("", "masks.py", "formats/chat.py", "formats/__init__.py", "bpe_merges.py"):
        if name:
            with (tmp_path / "data" / name).open("a") as file:
                file.write("\nX = 1\n")
        digests.add(masking_code.masking_code.__wrapped__())
    assert len(digests) == 5


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"sequence_len": 350}, {"sequence_len": 360}),
        ({"sequence_len": 350}, {"sequence_len": 512}),
        ({"sequence_len": 350}, {"sequence_len": 350, "excess_length_strategy": "truncate"}),
        ({"min_sample_len": 340}, {"min_sample_len": 350}),
        ({"min_sample_len": 340}, {"min_sample_len": 2}),
    ],
    ids=str,
)
def test_limits_that_were_met_count(tmp_path: Path, first: dict[str, Any], second: dict[str, Any]) -> None:
    path = write_rows(tmp_path / "rows.jsonl", rows())
    before, _ = content(path, changed(path, "", "", None, **first), tmp_path / "a")
    after, reused = content(path, changed(path, "", "", None, **second), tmp_path / "a")
    assert not reused
    assert after != before
    assert content(path, changed(path, "", "", None, **first), tmp_path / "a") == (before, True)


def test_dropped_rows_count(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [*rows(), "broken"])
    cfg = changed(path, "", "", None, malformed_rows="drop")
    assert content(path, cfg, tmp_path / "a")[1] is False
    assert content(path, cfg, tmp_path / "a")[1] is True
    with pytest.raises(Exception, match="line 7"):
        content(path, changed(path, "", "", None), tmp_path / "a")


def test_template_tokenizer_and_variables_count(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", rows())
    template = "{{ '<eos>' if greeting is defined and greeting else '' }}" + TOKENIZER.chat_template
    (tmp_path / "one.jinja").write_text(template)
    shutil.copy(tmp_path / "one.jinja", tmp_path / "other name.jinja")
    keys: dict[str, Any] = {"entry": {"field_tools": "none", "field_thinking": "none", "message_field_weight": "none"}}
    first, _ = content(path, changed(path, "global", "chat_template", str(tmp_path / "one.jinja"), **keys), tmp_path)
    other = changed(path, "global", "chat_template", str(tmp_path / "other name.jinja"), **keys)
    assert content(path, other, tmp_path) == (first, True)
    text = changed(path, "global", "chat_template", "jinja", chat_template_jinja=template, **keys)
    assert content(path, text, tmp_path) == (first, True)
    own = changed(path, "", "", None, entry={**keys["entry"], "chat_template": str(tmp_path / "one.jinja")})
    assert content(path, own, tmp_path) == (first, True)
    greeted = changed(
        path, "global", "chat_template", str(tmp_path / "one.jinja"), chat_template_kwargs={"greeting": True}, **keys
    )
    fingerprint, reused = content(path, greeted, tmp_path)
    assert not reused
    assert fingerprint != first


def test_given_ids_do_not_depend_on_the_tokenizer(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "ids.jsonl", [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}])
    prepare_datasets(config(path), TOKENIZER)
    other = byte_tokenizer(template=None)
    other.add_special_tokens({"bos_token": "<eos>"})
    assert ": reused " in prepare_datasets(config(path), other).cache_note
    other.add_tokens(["one more"])
    assert "(tokenizer " in prepare_datasets(config(path), other).cache_note


def test_moved_and_renamed_files_are_found_and_say_where_they_are_now(tmp_path: Path) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    before.mkdir()
    first = [{"input_ids": [index, 2, 3], "labels": [index, 2, 3]} for index in range(5)]
    write_rows(before / "a.jsonl", first)
    write_rows(before / "b.jsonl", [*first[:1], {"input_ids": [9], "labels": [9]}, "broken"])
    keys = {"malformed_rows": "drop", "dataset_exact_deduplication": True}
    old = prepare_datasets(config(str(before), **keys), TOKENIZER)
    shutil.move(before, after)
    (after / "a.jsonl").rename(after / "a-renamed.jsonl")
    os.utime(after / "b.jsonl", (1, 1))
    new = prepare_datasets(config(str(after), **keys), TOKENIZER)
    assert ": reused " in new.cache_note
    assert new.train.fingerprint == old.train.fingerprint
    assert new.train.origin(0).startswith(str(after))  # type: ignore[attr-defined]
    account = new.ledger.sources[0]
    assert account.name == str(after)
    assert account.dropped["malformed"].first_rows[0].startswith(f"{after / 'b.jsonl'} line 3, ")
    assert account.dropped["too_short"].first_rows == [f"{after / 'b.jsonl'} row 2"]
    assert account.dropped["duplicate"].first_rows == [f"{after / 'b.jsonl'} row 1"]


def test_the_order_of_files_counts(tmp_path: Path) -> None:
    write_rows(tmp_path / "data/a.jsonl" if (tmp_path / "data").mkdir() is None else tmp_path, [{"text": "one"}])
    write_rows(tmp_path / "data/b.jsonl", [{"text": "two"}])
    cfg = config(str(tmp_path / "data"), type="completion", entry={})
    plain = byte_tokenizer()
    before = prepare_datasets(cfg, plain).train.fingerprint
    (tmp_path / "data/a.jsonl").rename(tmp_path / "data/c.jsonl")
    after = prepare_datasets(cfg, plain)
    assert "(rows changed)" in after.cache_note
    assert after.train.fingerprint != before


def test_half_built_stores_of_yesterday_are_removed_unless_someone_works_on_them(tmp_path: Path) -> None:
    location = tmp_path / "cache"
    location.mkdir()
    for name in ("old", "new", "held"):
        (location / f".partial-{name}").mkdir()
    yesterday = time.time() - 2 * 24 * 3600
    for name in ("old", "held"):
        os.utime(location / f".partial-{name}", (yesterday, yesterday))
    import fcntl

    with (location / ".lock-held").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        cache.remove_abandoned(location)
    assert sorted(path.name for path in location.glob(".partial-*")) == [".partial-held", ".partial-new"]


def test_a_store_of_an_older_version_is_left_alone(tmp_path: Path) -> None:
    old = tmp_path / "cache" / "0123456789abcdef"
    old.mkdir(parents=True)
    (old / "meta.json").write_text(json.dumps({"name": "x", "key": {"rows": "y"}}))
    path = write_rows(tmp_path / "ids.jsonl", [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}])
    assert "no store of it yet" in prepare_datasets(config(path), TOKENIZER).cache_note
    assert (old / "meta.json").exists()
