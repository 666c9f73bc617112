"""The cache, option by option: what changes an id or a label makes a new store, and nothing else does."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from eft.config.data import DataConfig, DatasetConfig
from eft.core.errors import DataError
from eft.data import cache
from eft.data.prepare import prepare_datasets
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
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
                "more_tools": [{"type": "function", "function": {"name": "g", "parameters": {}}}],
            }
        )
    return found


NEW = "another store"
SAME = "the same store"

ENTRY_OPTIONS: dict[str, list[tuple[Any, str]]] = {
    "path": [],  # see the moved files below
    "ds_type": [("json", SAME)],
    "data_files": [],
    "name": [("a name", SAME)],
    "revision": [("main", SAME)],
    "split": [("train[:3]", NEW)],
    "type": [],
    "field_messages": [("turns", NEW)],
    "message_property_mappings": [({"content": "motive"}, "an error")],
    "roles": [({"assistant": ["user"]}, NEW)],
    "field_tools": [("more_tools", NEW)],
    "field_thinking": [("motive", NEW)],
    "template_thinking_key": [],
    "split_thinking": [(True, NEW)],
    "drop_system_message": [(True, NEW)],
    "message_field_training": [("skip", NEW)],
    "message_field_training_detail": [("parts", NEW)],
    "message_field_weight": [("heavy", NEW)],
    "roles_to_train": [(["user"], NEW)],
    "turns_to_train": [("last", NEW)],
    "train_on_eos": [("none", NEW), ("last", NEW)],
    "train_on_eot": [("turn", SAME)],
    "chat_template": [],
    "chat_template_jinja": [],
    "rewritten_history": [],
    "special_tokens_in_content": [],
    "field": [("other", SAME)],
    "field_system": [],
    "field_instruction": [("other", SAME)],
    "field_input": [("other", SAME)],
    "field_output": [("other", SAME)],
    "field_segments": [("other", SAME)],
    "train_on_inputs": [(True, NEW), (False, SAME)],
}
GLOBAL_OPTIONS: dict[str, list[tuple[Any, str]]] = {
    "datasets": [],
    "test_datasets": [],
    "val_set_size": [(2.0, SAME)],
    "chat_template": [],
    "chat_template_jinja": [],
    "chat_template_kwargs": [],
    "chat_template_date": [],
    "eot_tokens": [],
    "train_on_inputs": [(True, NEW)],
    "sequence_len": [(4096, SAME), (379, SAME), (350, NEW)],
    "excess_length_strategy": [("truncate", SAME), ("raise", SAME)],
    "min_sample_len": [(329, SAME), (340, NEW)],
    "malformed_rows": [("drop", SAME)],
    "dataset_prepared_path": [],
    "dataset_processes": [(1, SAME)],
    "shuffle_merged_datasets": [(False, SAME)],
    "dataset_exact_deduplication": [(True, SAME)],
    "seed": [(7, SAME)],
}
"""Options without a value here are those that a test below turns, or that this tokenizer and template cannot show."""

CASES = [
    *(("entry", name, value, outcome) for name, cases in ENTRY_OPTIONS.items() for value, outcome in cases),
    *(("global", name, value, outcome) for name, cases in GLOBAL_OPTIONS.items() for value, outcome in cases),
]


def test_the_table_has_every_option() -> None:
    assert set(ENTRY_OPTIONS) == set(DatasetConfig.model_fields)
    assert set(GLOBAL_OPTIONS) == set(DataConfig.model_fields)


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


@pytest.mark.parametrize(("place", "name", "value", "outcome"), CASES, ids=lambda value: str(value)[:30])
def test_an_option_makes_a_new_store_exactly_where_it_changes_one(
    tmp_path: Path, place: str, name: str, value: Any, outcome: str
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", rows())
    base, _ = content(path, changed(path, "", "", None), tmp_path / "a")
    cfg = changed(path, place, name, value)
    if outcome == "an error":
        with pytest.raises(DataError, match="motive"):
            content(path, cfg, tmp_path / "a")
        return
    fingerprint, reused = content(path, cfg, tmp_path / "a")
    alone, was_there = content(path, cfg, tmp_path / "b")
    assert not was_there
    assert fingerprint == alone
    assert (alone != base) is (outcome == NEW)
    assert reused is (outcome == SAME)


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
