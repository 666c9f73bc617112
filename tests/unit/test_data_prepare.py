"""Preparation: every row and token accounted for, stores reused only when they may be, nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from eft.config.data import DataConfig
from eft.core.errors import ConfigError, DataError
from eft.core.records import TokenDataset
from eft.data import cache, entry, prepare, readers, store_writer, tokenize
from eft.data.prepare import PreparedData, prepare_datasets, prepared_location

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """One token per byte, and three special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({sign: index for index, sign in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(text, special=True) for text in ("<|im_start|>", "<|im_end|>", "<eos>")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<eos>")
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EFT_CACHE", str(tmp_path / "cache"))


def write_rows(path: Path, rows: list[Any]) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def chats(path: Path, count: int = 20, word: str = "q") -> str:
    return write_rows(path, [chat(f"{word}{index}", f"answer {index}") for index in range(count)])


def ids_file(path: Path, lengths: list[int], trained_from: int = 1) -> str:
    """Pre-tokenised rows of these lengths, all different, trained from position `trained_from` on."""
    rows = []
    for number, length in enumerate(lengths):
        ids = [(number * 7 + position) % 250 for position in range(length)]
        rows.append({"input_ids": ids, "labels": [-100] * min(trained_from, length) + ids[trained_from:]})
    return write_rows(path, rows)


def config(*paths: str, type: str | None = None, **keys: Any) -> DataConfig:
    entry_keys = keys.pop("entry", {})
    return DataConfig.model_validate(
        {"datasets": [{"path": path, "type": type, **entry_keys} for path in paths], **keys}
    )


def no_tokenising(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> Any:
        raise AssertionError("tokenised again")

    monkeypatch.setattr(tokenize.ExampleEncoder, "__call__", fail)


def contents(dataset: TokenDataset) -> list[tuple[int, ...]]:
    return [tuple(dataset.sample(index).input_ids.tolist()) for index in range(len(dataset))]


# ---- the whole way ----


def test_chats_become_training_and_evaluation_data(tmp_path: Path, tokenizer: Any) -> None:
    prepared = prepare_datasets(
        config(chats(tmp_path / "chats.jsonl"), type="chat_template", val_set_size=0.2), tokenizer
    )
    assert (len(prepared.train), len(prepared.evals["eval"])) == (16, 4)
    sample = prepared.train.sample(0)
    trained = tokenizer.decode(sample.labels[sample.labels != -100])
    assert trained.startswith("answer ")
    assert trained.endswith("<|im_end|>")
    (account,) = prepared.ledger.sources
    assert (account.rows, account.samples, account.held_out.rows) == (20, 16, 4)
    assert account.trainable == prepared.train.trainable_counts.sum()
    assert account.held_out.tokens == prepared.evals["eval"].lengths.sum()
    assert len(prepared.eval_conversations) == 4
    question = prepared.eval_conversations[0][0]["content"]
    assert question in tokenizer.decode(prepared.evals["eval"].sample(0).input_ids)
    assert prepared.eval_tools == [None] * 4
    assert all(place.startswith(str(tmp_path / "chats.jsonl") + " row ") for place in account.held_out.first_rows)


def test_a_second_run_reuses_the_store_and_gives_the_same(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config(chats(tmp_path / "chats.jsonl"), type="chat_template", val_set_size=0.2, sequence_len=32)
    first = prepare_datasets(cfg, tokenizer)
    assert "no store of it yet" in first.cache_note
    no_tokenising(monkeypatch)
    again = prepare_datasets(cfg, tokenizer)
    assert "reused" in again.cache_note
    assert again.ledger == first.ledger
    assert again.train.fingerprint == first.train.fingerprint
    assert again.eval_conversations == first.eval_conversations
    other = prepare_datasets(cfg.model_copy(update={"seed": 1, "val_set_size": 3.0}), tokenizer)
    assert len(other.evals["eval"]) == 3
    assert other.train.fingerprint != first.train.fingerprint


def test_a_reused_store_counts_as_having_read_what_made_it(tmp_path: Path, tokenizer: Any) -> None:
    path = chats(tmp_path / "chats.jsonl")
    reads = []
    for _ in range(2):
        cfg = config(path, type="chat_template")
        cfg.forget_reads()
        prepare_datasets(cfg, tokenizer)
        reads.append((cfg.keys_read(), cfg.datasets[0].keys_read()))
    assert reads[0] == reads[1]
    assert "field_messages" in reads[0][1]
    assert "field_instruction" not in reads[0][1]
    assert "excess_length_strategy" in reads[0][0]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"sequence_len": 100}, "sequence_len 100 is below its longest sample, "),
        ({"min_sample_len": 70}, "min_sample_len 70 is above its shortest sample, "),
        ({"train_on_inputs": True}, "datasets.train_on_inputs false → true"),
        ({"chat_template": "jinja", "chat_template_jinja": "<eos>" + CHATML}, "template changed"),
        ({"entry": {"train_on_eos": "none"}}, 'datasets.train_on_eos "turn" → "none"'),
    ],
)
def test_a_new_store_says_why(tmp_path: Path, tokenizer: Any, change: dict[str, Any], why: str) -> None:
    rows = [chat(f"q{index}", "answer" * index) for index in range(30)]
    path = write_rows(tmp_path / "chats.jsonl", rows)
    prepare_datasets(config(path, type="chat_template"), tokenizer)
    note = prepare_datasets(config(path, type="chat_template", **change), tokenizer).cache_note
    assert f"({why}" in note


def test_rows_tokenizer_and_masking_code_make_a_new_store(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = chats(tmp_path / "chats.jsonl")
    cfg = config(path, type="chat_template")
    prepare_datasets(cfg, tokenizer)
    with_token = byte_tokenizer()
    with_token.add_tokens(["answer"])
    assert "(tokenizer changed)" in prepare_datasets(cfg, with_token).cache_note
    with Path(path).open("a") as file:
        file.write(json.dumps(chat("new", "row")) + "\n")
    assert "(rows changed)" in prepare_datasets(cfg, tokenizer).cache_note
    monkeypatch.setattr(prepare, "masking_code", lambda: "other code")
    assert "(masking code changed)" in prepare_datasets(cfg, tokenizer).cache_note
    monkeypatch.setattr(prepare, "libraries", lambda: "tokenizers 0.0.1")
    assert "libraries " in prepare_datasets(cfg, tokenizer).cache_note


def test_the_code_of_a_users_function_is_part_of_the_key(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = tmp_path / "my_rows.py"
    code.write_text("def rows(row):\n    return {'segments': [{'text': row['text'], 'label': True}]}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    cfg = config(write_rows(tmp_path / "texts.jsonl", [{"text": "abc"}]), type="my_rows:rows")
    assert prepare_datasets(cfg, tokenizer).train.lengths.tolist() == [3]
    code.write_text(code.read_text() + "# changed\n")
    assert "(function changed)" in prepare_datasets(cfg, tokenizer).cache_note


# ---- lengths, masks, malformed rows ----


def test_drop_truncate_raise(tmp_path: Path, tokenizer: Any) -> None:
    path = ids_file(tmp_path / "ids.jsonl", [1, 5, 10, 14], trained_from=2)
    dropped = prepare_datasets(config(path, sequence_len=9), tokenizer).ledger.sources[0]
    assert (dropped.raw, dropped.samples, dropped.trainable, dropped.context) == (30, 1, 3, 2)
    assert dropped.dropped["too_long"].tokens == 24
    assert dropped.dropped["too_long"].first_rows == [f"{path} row 3", f"{path} row 4"]
    assert dropped.dropped["too_short"].tokens == 1
    cut = prepare_datasets(config(path, sequence_len=9, excess_length_strategy="truncate"), tokenizer)
    account = cut.ledger.sources[0]
    assert sorted(cut.train.lengths.tolist()) == [5, 9, 9]
    assert (account.truncated, account.truncated_rows, account.trainable, account.context) == (6, 2, 17, 6)
    with pytest.raises(DataError, match=r"ids\.jsonl row 3: 10 tokens exceed sequence_len 9"):
        prepare_datasets(config(path, sequence_len=9, excess_length_strategy="raise"), tokenizer)


def test_a_sample_cut_before_its_first_trained_token_is_dropped(tmp_path: Path, tokenizer: Any) -> None:
    path = ids_file(tmp_path / "ids.jsonl", [6, 10], trained_from=4)
    cfg = config(path, sequence_len=5, excess_length_strategy="truncate")
    account = prepare_datasets(cfg, tokenizer).ledger.sources[0]
    assert (account.samples, account.truncated_rows) == (2, 2)
    path = ids_file(tmp_path / "more.jsonl", [5, 10], trained_from=4)
    rows = Path(path).read_text().splitlines()
    rows[1] = json.dumps({"input_ids": list(range(10)), "labels": [-100] * 8 + [8, 9]})
    cfg = config(write_rows(tmp_path / "more.jsonl", rows), sequence_len=5, excess_length_strategy="truncate")
    account = prepare_datasets(cfg, tokenizer).ledger.sources[0]
    assert account.dropped["no_trainable_tokens"].tokens == 10
    assert (account.samples, account.truncated) == (1, 0)


def test_weights_of_zero_are_no_trainable_tokens(tmp_path: Path, tokenizer: Any) -> None:
    rows = [
        {"input_ids": [1, 2, 3], "labels": [1, 2, 3], "weights": [5.0, 0.0, 0.0]},
        {"input_ids": [1, 2, 4], "labels": [-100, 2, 4], "weights": [1.0, 0.5, 0.25]},
    ]
    prepared = prepare_datasets(config(write_rows(tmp_path / "w.jsonl", rows)), tokenizer)
    assert prepared.train.weight_sums.tolist() == [0.75]
    assert prepared.ledger.sources[0].dropped["no_trainable_tokens"].rows == 1


def test_malformed_rows_stop_the_run_or_are_counted(tmp_path: Path, tokenizer: Any) -> None:
    rows = [chat("a", "b"), '{"broken', {"other": 1}, chat("c", "d")]
    path = write_rows(tmp_path / "chats.jsonl", rows)
    with pytest.raises(DataError, match=r"chats\.jsonl line 2"):
        prepare_datasets(config(path, type="chat_template"), tokenizer)
    prepared = prepare_datasets(config(path, type="chat_template", malformed_rows="drop"), tokenizer)
    account = prepared.ledger.sources[0]
    assert (account.rows, account.samples, account.dropped["malformed"].rows) == (4, 2, 2)
    assert "line 2" in account.dropped["malformed"].first_rows[0]
    assert "messages" in account.dropped["malformed"].first_rows[1]


def test_only_malformed_rows(tmp_path: Path, tokenizer: Any) -> None:
    path = write_rows(tmp_path / "chats.jsonl", ["{broken", "[1]x"])
    with pytest.raises(DataError):
        prepare_datasets(config(path, type="chat_template"), tokenizer)
    path = write_rows(tmp_path / "chats.jsonl", ["{broken", "17"])
    with pytest.raises(DataError, match="none of its 2 rows can be trained on: 2 malformed"):
        prepare_datasets(config(path, type="chat_template", malformed_rows="drop"), tokenizer)


def test_truncation_that_leaves_no_answer_is_named(tmp_path: Path, tokenizer: Any) -> None:
    path = write_rows(tmp_path / "chats.jsonl", [chat("a" * 40, "b"), chat("c" * 40, "d")])
    with pytest.raises(DataError, match="sequence_len is 8, and what truncation keeps ends before the answers"):
        prepare_datasets(
            config(path, type="chat_template", sequence_len=8, excess_length_strategy="truncate"), tokenizer
        )


def test_an_empty_data_set(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"empty\.jsonl.* no rows"):
        prepare_datasets(config(write_rows(tmp_path / "empty.jsonl", [])), tokenizer)


def test_rows_without_trained_turns_explain_the_roles(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]}] * 3
    with pytest.raises(DataError, match=r"3 no trainable tokens .*user \(3 turns\).*roles_to_train: assistant"):
        prepare_datasets(config(write_rows(tmp_path / "c.jsonl", rows), type="chat_template"), tokenizer)
    assert not [path for path in (tmp_path / "cache").iterdir() if not path.name.startswith(".lock")]


def test_a_mask_that_trains_everything_is_refused(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = tokenize.ExampleEncoder.__call__

    def everything(*arguments: Any) -> Any:
        outcomes = encode(*arguments)
        for outcome in outcomes:
            assert not isinstance(outcome, tokenize.Rejected)
            outcome.labels[:] = outcome.input_ids
        return outcomes

    path = chats(tmp_path / "c.jsonl", 3)
    monkeypatch.setattr(tokenize.ExampleEncoder, "__call__", everything)
    with pytest.raises(DataError, match="every token of all 3 samples would be trained"):
        prepare_datasets(config(path, type="chat_template"), tokenizer)
    assert len(prepare_datasets(config(path, type="chat_template", train_on_inputs=True), tokenizer).train) == 3


def test_rows_that_fit_no_format_and_turns_that_fit_no_template(tmp_path: Path, tokenizer: Any) -> None:
    path = write_rows(tmp_path / "c.jsonl", [{"other": 1}] * 3)
    with pytest.raises(DataError, match="3 malformed"):
        prepare_datasets(config(path, type="chat_template", malformed_rows="drop"), tokenizer)
    refusing = "{% if messages[0].content == 'bad' %}{{ raise_exception('no bad ones') }}{% endif %}" + CHATML
    path = write_rows(tmp_path / "d.jsonl", [chat("good", "b"), chat("bad", "b")])
    keys = {"type": "chat_template", "chat_template": "jinja", "chat_template_jinja": refusing}
    with pytest.raises(DataError, match=r"d\.jsonl row 2: .*no bad ones"):
        prepare_datasets(config(path, **keys), tokenizer)
    account = prepare_datasets(config(path, **keys, malformed_rows="drop"), tokenizer).ledger.sources[0]
    assert "row 2" in account.dropped["template"].first_rows[0]


def test_tools_travel_with_the_held_out_conversations(tmp_path: Path, tokenizer: Any) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    path = write_rows(tmp_path / "c.jsonl", [chat(str(index), "a") | {"tools": [tool]} for index in range(4)])
    prepared = prepare_datasets(config(path, type="chat_template", chat_template="chatml", val_set_size=1), tokenizer)
    assert prepared.eval_tools == [[tool]]


def test_a_users_function_may_give_turns_or_not(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "turning.py").write_text(
        "def turns(row):\n"
        "    return {'messages': [{'role': 'user', 'content': 'x'}, {'role': 'assistant', 'content': 'y'}]}\n"
        "def pieces(row):\n    return {'segments': [{'text': 'ab', 'label': True}]}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    path = write_rows(tmp_path / "rows.jsonl", [{"any": 1}])
    bare = byte_tokenizer(template=None)
    assert prepare_datasets(config(path, type="turning:pieces"), bare).train.lengths.tolist() == [2]
    with pytest.raises(DataError, match="chat_template"):
        prepare_datasets(config(path, type="turning:turns"), bare)
    prepared = prepare_datasets(config(path, type="turning:turns", chat_template="chatml"), bare)
    assert prepared.train.trainable_counts.tolist() == [2]
    with pytest.raises(DataError, match="turning:absent"):
        prepare_datasets(config(path, type="turning:absent"), bare)


# ---- several data sets ----


def test_every_source_has_its_own_account(tmp_path: Path, tokenizer: Any) -> None:
    first = ids_file(tmp_path / "a.jsonl", [4, 5, 6])
    second = ids_file(tmp_path / "b.jsonl", [7, 8, 4])
    cfg = config(first, second, dataset_exact_deduplication=True, shuffle_merged_datasets=False)
    prepared = prepare_datasets(cfg, tokenizer)
    assert prepared.train.lengths.tolist() == [4, 5, 6, 7, 8, 4]
    # Row 1 of b equals row 1 of a once it has its length.
    ids_file(tmp_path / "b.jsonl", [4, 8, 9])
    prepared = prepare_datasets(cfg, tokenizer)
    assert prepared.train.lengths.tolist() == [4, 5, 6, 8, 9]
    accounts = prepared.ledger.sources
    assert [account.samples for account in accounts] == [3, 2]
    assert accounts[1].dropped["duplicate"].first_rows == [f"{second} row 1"]


def test_test_sets_are_named_whole_and_never_trained_on(tmp_path: Path, tokenizer: Any) -> None:
    train = ids_file(tmp_path / "train.jsonl", [4, 5, 6, 7])
    test = write_rows(tmp_path / "test.jsonl", Path(train).read_text().splitlines()[1:3] * 2)
    cfg = config(train, test_datasets=[{"path": test}])
    prepared = prepare_datasets(cfg, tokenizer)
    assert list(prepared.evals) == ["eval"]
    assert len(prepared.evals["eval"]) == 4
    assert sorted(prepared.train.lengths.tolist()) == [4, 7]
    train_account, test_account = prepared.ledger.sources
    assert train_account.dropped["held_out_duplicate"].first_rows == [f"{train} row 2", f"{train} row 3"]
    assert (test_account.split, test_account.samples) == ("eval", 4)
    three = [{"path": test}, {"path": test, "type": "pretokenized"}, {"path": test, "name": "named"}]
    assert list(prepare_datasets(config(train, test_datasets=three), tokenizer).evals) == ["test", "test_2", "named"]
    with pytest.raises(ConfigError, match="exclude each other"):
        prepare_datasets(config(train, test_datasets=[{"path": test}], val_set_size=1), tokenizer)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_row_and_token_goes_to_exactly_one_place(data: st.DataObject, tokenizer: Any, tmp_path: Path) -> None:
    paths = []
    row_of_place = {}
    for source in range(data.draw(st.integers(1, 2))):
        rows = []
        for number in range(1, data.draw(st.integers(1, 12)) + 1):
            length = data.draw(st.integers(1, 9))
            ids = data.draw(st.lists(st.integers(0, 2), min_size=length, max_size=length))
            trained = data.draw(st.lists(st.booleans(), min_size=length, max_size=length))
            labels = [token if keep else -100 for token, keep in zip(ids, trained, strict=True)]
            rows.append({"input_ids": ids, "labels": labels} if data.draw(st.integers(0, 9)) else {"input_ids": "x"})
            row_of_place[f"{tmp_path}/{source}.jsonl row {number}"] = rows[-1]
        paths.append(write_rows(tmp_path / f"{source}.jsonl", rows))
    cfg = config(
        *paths,
        sequence_len=data.draw(st.integers(2, 9)),
        min_sample_len=data.draw(st.integers(2, 4)),
        excess_length_strategy=data.draw(st.sampled_from(["drop", "truncate"])),
        dataset_exact_deduplication=data.draw(st.booleans()),
        val_set_size=data.draw(st.sampled_from([0.0, 0.3, 2.0])),
        seed=data.draw(st.integers(0, 5)),
        malformed_rows="drop",
    )
    try:
        prepared = prepare_datasets(cfg, tokenizer)
    except DataError:
        return
    prepared.ledger.check()
    sets: list[Any] = [prepared.train, *prepared.evals.values()]
    places = Counter(dataset.origin(index) for dataset in sets for index in range(len(dataset)))
    for account in prepared.ledger.sources:
        for portion in account.dropped.values():
            places.update(message.split(":")[0] for message in portion.first_rows)
    assert places == Counter(row_of_place.keys())
    for dataset in sets:
        for index in range(len(dataset)):
            kept = dataset.sample(index).input_ids.tolist()
            assert kept == row_of_place[dataset.origin(index)]["input_ids"][: cfg.sequence_len]
    raw = sum(len(row["input_ids"]) for row in row_of_place.values() if isinstance(row["input_ids"], list))
    assert raw == sum(account.raw for account in prepared.ledger.sources)
    if prepared.evals:
        assert not set(contents(prepared.train)) & set(contents(prepared.evals["eval"]))


# ---- crashes, races, folders ----


def files_of(location: Path) -> dict[str, bytes]:
    """The files of the only store in a folder."""
    (meta,) = location.glob("*/meta.json")
    return {file.name: file.read_bytes() for file in meta.parent.iterdir()}


@pytest.mark.parametrize("killed_after", [1, 4, 9])
def test_kill_minus_nine_and_again_gives_the_same_bytes(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, killed_after: int
) -> None:
    monkeypatch.setattr(readers, "BLOCK_BYTES", 1 << 12)
    monkeypatch.setattr(store_writer, "SHARD_BLOCKS", 3)
    cfg = config(ids_file(tmp_path / "ids.jsonl", [5] * 700), malformed_rows="drop")
    with Path(cfg.datasets[0].path).open("a") as file:
        file.write("broken\n" * 3)
    straight = prepare_datasets(cfg.model_copy(update={"dataset_prepared_path": str(tmp_path / "other")}), tokenizer)
    reports: list[int] = []

    def kill(*report: Any) -> None:
        reports.append(1)
        if len(reports) == killed_after:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        prepare_datasets(cfg, tokenizer, progress=kill)
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    location = tmp_path / "cache"
    assert list(location.glob(".partial-*")), "the child was killed in the middle"
    assert not list(location.glob("*/meta.json"))

    prepared = prepare_datasets(cfg, tokenizer)
    assert not list(location.glob(".partial-*"))
    assert prepared.train.fingerprint == straight.train.fingerprint
    assert prepared.ledger == straight.ledger
    finished = killed_after // 3 * 3
    assert (f"went on after {finished} finished blocks" in prepared.cache_note) is (finished > 0)
    assert files_of(location) == files_of(tmp_path / "other")


def run_child(cfg: DataConfig, tokenizer: Any, killed_after_s: float | None = None, at_event: int = 0) -> int:
    """Prepare in a child that kills itself before its `at_event`-th change of a file, or is killed after some time; the
    number of changes where it came to its end, -1 where it did not."""
    location = str(prepared_location(cfg))
    child = os.fork()
    if child == 0:
        seen = 0

        def watch(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal seen
            if event in CHANGES and str(arguments[0]).startswith(location):
                seen += 1
                if seen == at_event:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        prepare_datasets(cfg, tokenizer)
        os._exit(seen)
    if killed_after_s is not None:
        time.sleep(killed_after_s)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.WEXITSTATUS(status) if os.WIFEXITED(status) else -1


CHANGES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")


def require_whole_stores(location: Path, expected: dict[str, bytes]) -> None:
    """Whatever another process can find there is finished."""
    for folder in location.glob("[!.]*"):
        assert {file.name: file.read_bytes() for file in folder.iterdir()} == expected


def small_and_prepared(
    tmp_path: Path, tokenizer: Any, patch: pytest.MonkeyPatch
) -> tuple[DataConfig, dict[str, bytes]]:
    """A config whose data make four shards, and the files of their store."""
    patch.setattr(readers, "BLOCK_BYTES", 1 << 10)
    patch.setattr(store_writer, "SHARD_BLOCKS", 3)
    cfg = config(ids_file(tmp_path / "ids.jsonl", [5] * 150), malformed_rows="drop")
    prepare_datasets(cfg.model_copy(update={"dataset_prepared_path": str(tmp_path / "other")}), tokenizer)
    return cfg, files_of(tmp_path / "other")


def test_killed_before_a_change_of_a_file_and_again_gives_the_same_bytes(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed just before a file is opened, renamed or removed: before each of the last ones, the rename of the store
    among them, and before some of those in which its shards are written."""
    cfg, expected = small_and_prepared(tmp_path, tokenizer, monkeypatch)
    location = tmp_path / "cache"
    count = run_child(cfg, tokenizer)
    assert 60 < count < 200
    shutil.rmtree(location)
    early = np.random.default_rng(0).choice(np.arange(3, count - 18), 8, replace=False).tolist()
    resumed = Counter[bool]()
    for event in (*early, *range(count - 18, count + 1)):
        assert run_child(cfg, tokenizer, at_event=event) == -1
        require_whole_stores(location, expected)
        note = prepare_datasets(cfg, tokenizer).cache_note
        resumed["went on after" in note] += 1
        assert files_of(location) == expected, event
        assert not list(location.glob(".partial-*")), event
        shutil.rmtree(location)
    assert min(resumed[False], resumed[True]) > 2


@pytest.mark.parametrize("seed", range(5))
def test_killed_at_any_time_and_again_gives_the_same_bytes(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    cfg, expected = small_and_prepared(tmp_path, tokenizer, monkeypatch)
    start = time.monotonic()
    prepare_datasets(cfg.model_copy(update={"dataset_prepared_path": str(tmp_path / "timed")}), tokenizer)
    usual = time.monotonic() - start
    for share in np.random.default_rng(seed).uniform(0, 1.2, 3):
        run_child(cfg, tokenizer, killed_after_s=share * usual)  # one after the other, on what is left
        require_whole_stores(tmp_path / "cache", expected)
    prepare_datasets(cfg, tokenizer)
    assert files_of(tmp_path / "cache") == expected


def test_two_at_the_same_time_do_the_work_once(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config(ids_file(tmp_path / "ids.jsonl", [5, 6, 7]))
    calls: list[int] = []
    waiting = threading.Event()

    encode = tokenize.ExampleEncoder.__call__

    def slow(*arguments: Any) -> Any:
        calls.append(1)
        assert waiting.wait(20), "nobody waited for the lock"
        return encode(*arguments)

    monkeypatch.setattr(tokenize.ExampleEncoder, "__call__", slow)
    found: list[PreparedData] = []

    def progress(what: str, done: int, total: int | None, speed: str) -> None:
        if "another process" in what:
            waiting.set()

    def work() -> None:
        found.append(prepare_datasets(cfg, tokenizer, progress=progress))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert found[0].train.fingerprint == found[1].train.fingerprint
    assert sorted("reused" in prepared.cache_note for prepared in found) == [False, True]


def test_without_locks_the_slower_one_takes_the_winners_store(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config(ids_file(tmp_path / "ids.jsonl", [5, 6, 7]))
    winner = prepare_datasets(cfg, tokenizer)
    monkeypatch.setattr(cache, "reusable", lambda *arguments: None)
    monkeypatch.setattr(cache, "discard_damaged", lambda *arguments: False)
    assert prepare_datasets(cfg, tokenizer).train.fingerprint == winner.train.fingerprint


def test_a_damaged_store_is_made_anew(tmp_path: Path, tokenizer: Any) -> None:
    cfg = config(ids_file(tmp_path / "ids.jsonl", [5, 6, 7]))
    first = prepare_datasets(cfg, tokenizer)
    (meta,) = (tmp_path / "cache").glob("*/meta.json")
    for damage in ("tokens-00000.arrow", "meta.json"):
        (meta.parent / damage).write_bytes(b"{")
        again = prepare_datasets(cfg, tokenizer)
        assert "its files were damaged" in again.cache_note
        assert again.train.fingerprint == first.train.fingerprint


def test_where_stores_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert prepared_location(config("x", dataset_prepared_path=str(tmp_path))) == tmp_path
    assert prepared_location(config("x")) == tmp_path / "cache"
    monkeypatch.delenv("EFT_CACHE")
    assert prepared_location(config("x")) == Path("~/.cache/eft").expanduser()


def test_a_folder_that_cannot_be_written(tmp_path: Path, tokenizer: Any) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    cfg = config(ids_file(tmp_path / "ids.jsonl", [5]), dataset_prepared_path=str(blocker / "cache"))
    with pytest.raises(DataError, match="dataset_prepared_path"):
        prepare_datasets(cfg, tokenizer)


def test_progress_is_reported(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "BLOCK_BYTES", 1 << 14)
    monkeypatch.setattr(entry, "_SPEED_SHOWN_AFTER_S", 0.0)
    reports: list[tuple[str, int, int | None, str]] = []
    path = ids_file(tmp_path / "ids.jsonl", [5] * 1100)
    prepare_datasets(config(path), tokenizer, progress=lambda *report: reports.append(report))
    done = [done for _, done, _, _ in reports]
    assert len(done) > 2
    assert done == sorted(done)
    assert done[-1] == 1100
    assert {what for what, _, _, _ in reports} == {path}
    assert {total for _, _, total, _ in reports} == {1100}
    assert all(re.fullmatch(r"[\d,]+ rows/s, [\d,]+ tokens/s, \d:\d\d:\d\d left", speed) for *_, speed in reports[1:])


def test_text_formats_keep_their_store_when_only_the_chat_template_changes(tmp_path: Path) -> None:
    text = write_rows(tmp_path / "text.jsonl", [{"text": f"text {index}"} for index in range(3)])
    conversations = chats(tmp_path / "chats.jsonl")
    for path, type, reused in ((text, "completion", True), (conversations, "chat_template", False)):
        prepare_datasets(config(path, type=type), byte_tokenizer())
        note = prepare_datasets(config(path, type=type), byte_tokenizer("<eos>" + CHATML)).cache_note
        assert ("reused" in note) is reused, note


def test_masking_keys_are_read_only_where_they_decide_something(tmp_path: Path, tokenizer: Any) -> None:
    pairs = [{"instruction": "x", "output": f"y{index}"} for index in range(3)]
    cases = {
        "chat_template": (chats(tmp_path / "chats.jsonl"), True),
        "alpaca": (write_rows(tmp_path / "alpaca.jsonl", pairs), True),
        "completion": (write_rows(tmp_path / "text.jsonl", [{"text": "hello"}]), False),
        "pretokenized": (ids_file(tmp_path / "ids.jsonl", [5, 6]), False),
    }
    for type, (path, is_read) in cases.items():
        cfg = config(path, type=type, train_on_inputs=True)
        prepare_datasets(cfg, tokenizer)
        assert ("train_on_inputs" in cfg.keys_read()) is is_read, type
        assert not cfg.datasets[0].keys_read() & {"roles_to_train", "train_on_eos"}, type


def test_one_changed_byte_of_equal_size_and_time_makes_a_new_store(tmp_path: Path, tokenizer: Any) -> None:
    path = Path(chats(tmp_path / "chats.jsonl"))
    before = prepare_datasets(config(str(path), type="chat_template"), tokenizer)
    times = path.stat()
    path.write_bytes(path.read_bytes().replace(b"answer 7", b"answer !"))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    after = prepare_datasets(config(str(path), type="chat_template"), tokenizer)
    assert path.stat().st_mtime_ns == times.st_mtime_ns
    assert "(rows changed)" in after.cache_note
    assert after.train.fingerprint != before.train.fingerprint


def test_half_a_character_is_a_malformed_row(tmp_path: Path, tokenizer: Any) -> None:
    rows: list[Any] = [chat("q", "fine \U0001f600"), json.dumps(chat("q", "cut here")).replace("here", r"\ud83d")]
    path = write_rows(tmp_path / "chats.jsonl", rows)
    with pytest.raises(DataError, match=r"chats\.jsonl line 2: .*half of a character"):
        prepare_datasets(config(path, type="chat_template"), tokenizer)
    prepared = prepare_datasets(config(path, type="chat_template", malformed_rows="drop"), tokenizer)
    assert len(prepared.train) == 1
    assert prepared.ledger.sources[0].dropped["malformed"].rows == 1


@pytest.mark.parametrize("where", ["a shard", "its columns", "all columns", "the end"])
def test_a_full_disk_leaves_no_store_and_what_is_finished(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    monkeypatch.setattr(readers, "BLOCK_BYTES", 1 << 12)
    monkeypatch.setattr(store_writer, "SHARD_BLOCKS", 3)
    cfg = config(ids_file(tmp_path / "ids.jsonl", [5] * 700))
    targets = {
        "a shard": (store_writer._Shard, "append"),
        "its columns": (store_writer._Shard, "record"),
        "all columns": (store_writer, "_write_columns"),
        "the end": (store_writer.atomic, "write_json"),
    }
    holder, name = targets[where]
    original = getattr(holder, name)
    calls: list[int] = []

    def full(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) > (7 if where == "a shard" else 2 if where == "its columns" else 0):
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(holder, name, full)
        with pytest.raises(DataError, match="No space left on device.*free some space, or set dataset_prepared_path"):
            prepare_datasets(cfg, tokenizer)
    location = tmp_path / "cache"
    assert not list(location.glob("[!.]*"))
    (partial,) = location.glob(".partial-*")
    finished = {
        name for line in (partial / "manifest.jsonl").read_text().splitlines() for name in json.loads(line)["files"]
    }
    kept = {file.name for file in partial.iterdir()}
    assert finished
    assert finished <= kept
    if where == "a shard":
        assert kept == finished | {"manifest.jsonl"}
    assert "went on after" in prepare_datasets(cfg, tokenizer).cache_note
    straight = config(cfg.datasets[0].path, dataset_prepared_path=str(tmp_path / "other"))
    prepare_datasets(straight, tokenizer)
    assert files_of(location) == files_of(tmp_path / "other")
