"""Several processes: the same bytes as one, the same errors, and no trace of them when something goes wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from eft.core.errors import DataError
from eft.data import prepare, readers, speed, store_writer, workers
from eft.data.block_encoder import Job
from eft.data.prepare import prepare_datasets
from eft.data.workers import encode_in_workers
from tests.unit.test_data_prepare import byte_tokenizer, chat, config, files_of, write_rows

TOKENIZER = byte_tokenizer()


@pytest.fixture(autouse=True)
def _small_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(readers, "BLOCK_BYTES", 1 << 12)
    monkeypatch.setattr(store_writer, "SHARD_BLOCKS", 4)


def rows_file(path: Path, count: int = 400) -> str:
    rows: list[Any] = [chat(f"question {index} é", "answer " * (index % 9)) for index in range(count)]
    return write_rows(path, [*rows[: count // 2], "broken", {"messages": []}, *rows[count // 2 :]])


def test_any_number_of_processes_gives_the_same_bytes(tmp_path: Path) -> None:
    path = rows_file(tmp_path / "chats.jsonl")
    notes, ledgers, stores = [], [], []
    for count in (1, 2):
        location = tmp_path / f"by {count}"
        cfg = config(
            path,
            type="chat_template",
            malformed_rows="drop",
            sequence_len=80,
            dataset_processes=count,
            dataset_prepared_path=str(location),
        )
        prepared = prepare_datasets(cfg, TOKENIZER)
        assert "dataset_processes" in cfg.keys_read()
        notes.append(prepared.cache_note.replace(str(location), ""))
        ledgers.append(prepared.ledger)
        stores.append(files_of(location))
    assert notes[0] == notes[1]
    assert ledgers[0] == ledgers[1]
    assert ledgers[0].sources[0].dropped["malformed"].rows == 2
    assert ledgers[0].sources[0].dropped["too_long"].rows > 0
    assert stores[0] == stores[1]


def test_the_first_wrong_row_is_the_one_that_is_told(tmp_path: Path) -> None:
    path = rows_file(tmp_path / "chats.jsonl")
    with Path(path).open("a") as file:
        file.write("broken at the end\n")
    messages = []
    for count in (1, 2):
        with pytest.raises(DataError) as caught:
            prepare_datasets(config(path, type="chat_template", dataset_processes=count), TOKENIZER)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert "line 201" in messages[0]
    assert not [entry for entry in (tmp_path / "cache").iterdir() if not entry.name.startswith(".lock")]


def test_a_users_function_runs_in_the_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "talking.py").write_text(
        "def rows(row):\n    print('noise on the standard output')\n"
        "    return {'segments': [{'text': row['text'], 'label': True}]}\n"
        "def bug(row):\n    return {'segments': [{'text': row['absent'], 'label': True}]}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    path = write_rows(tmp_path / "texts.jsonl", [{"text": f"text {index}"} for index in range(300)])
    prepared = prepare_datasets(config(path, type="talking:rows", dataset_processes=2), TOKENIZER)
    assert len(prepared.train) == 300
    with pytest.raises(DataError, match="row 1: talking:bug raised KeyError"):
        prepare_datasets(config(path, type="talking:bug", dataset_processes=2), TOKENIZER)


def test_a_worker_that_dies_is_told_and_what_is_finished_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = rows_file(tmp_path / "chats.jsonl", 3000)
    cfg = config(path, type="chat_template", malformed_rows="drop", dataset_processes=2)
    started: list[psutil.Process] = []
    reports: list[int] = []

    def kill_one(*report: Any) -> None:
        reports.append(1)
        if len(reports) == 6:
            started.extend(psutil.Process().children(recursive=True))
            one = next(process for process in started if process.ppid() != os.getpid())
            one.kill()  # as the kernel does when memory is full

    with pytest.raises(DataError, match="ended by signal 9 .*fewer `dataset_processes`.*what it finished is kept"):
        prepare_datasets(cfg, TOKENIZER, progress=kill_one)
    assert len(started) == 3
    psutil.wait_procs(started, timeout=20)
    assert not any(process.is_running() for process in started)
    assert list((tmp_path / "cache").glob(".partial-*/manifest.jsonl"))
    prepared = prepare_datasets(cfg, TOKENIZER)
    assert "; went on after " in prepared.cache_note


def test_workers_end_in_silence_when_the_main_process_is_killed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = rows_file(tmp_path / "chats.jsonl", 3000)
    cfg = config(path, type="chat_template", malformed_rows="drop", dataset_processes=2)
    reports: list[int] = []

    def kill(*report: Any) -> None:
        reports.append(1)
        if len(reports) == 3:
            workers = [process.pid for process in psutil.Process().children(recursive=True)]
            (tmp_path / "workers").write_text(json.dumps(workers))
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        prepare_datasets(cfg, TOKENIZER, progress=kill)
        os._exit(1)
    os.waitpid(child, 0)
    pids = json.loads((tmp_path / "workers").read_text())
    assert len(pids) == 3
    deadline = time.monotonic() + 20
    while any(map(psutil.pid_exists, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(psutil.pid_exists, pids))
    assert capfd.readouterr().err == ""


def test_workers_end_with_their_reader(tmp_path: Path) -> None:
    cfg = config(rows_file(tmp_path / "chats.jsonl"), type="chat_template", malformed_rows="drop")
    spec = cfg.datasets[0]
    job = Job(spec, cfg, TOKENIZER, prepare.template_for(spec, cfg, TOKENIZER))
    encoded = encode_in_workers(job, readers.READERS["json"](Path(spec.path)), 2)
    assert len(next(encoded).rows) > 0
    encoded.close()  # type: ignore[attr-defined]  # a generator


def test_a_worker_needs_no_torch() -> None:
    code = "import sys, eft.data.worker, eft.data.block_encoder; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_nothing_runs_beside_what_the_workers_are_forked_from() -> None:
    """A fork has one thread; what others held stays locked in it."""
    code = "import os, sys, eft.data.worker, eft.data.bpe; sys.exit(len(os.listdir('/proc/self/task')) - 1)"
    environment = {**os.environ, **workers._ENVIRONMENT}
    assert subprocess.run([sys.executable, "-c", code], check=False, env=environment).returncode == 0


def test_a_small_data_set_is_done_by_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config(rows_file(tmp_path / "chats.jsonl"), type="chat_template")
    job = Job(cfg.datasets[0], cfg, TOKENIZER, None)
    assert speed.num_processes(job) == 1
    monkeypatch.setattr(speed, "PARALLEL_FROM_BYTES", 1000)
    cores = len(os.sched_getaffinity(0))
    assert speed.num_processes(job) == min(cores, speed.MOST_PROCESSES)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    assert speed.num_processes(job) == speed.MOST_PROCESSES


def test_a_large_one_goes_through_the_fast_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = rows_file(tmp_path / "chats.jsonl")
    keys: dict[str, Any] = {"type": "chat_template", "malformed_rows": "drop"}
    slow = prepare_datasets(config(path, **keys, dataset_prepared_path=str(tmp_path / "slow")), TOKENIZER)
    monkeypatch.setattr(speed, "FAST_FROM_BYTES", 1000)
    asked: list[int] = []
    monkeypatch.setattr(speed.FastTokenizer, "labelled", _counting(asked, speed.FastTokenizer.labelled))
    fast = prepare_datasets(config(path, **keys, dataset_prepared_path=str(tmp_path / "fast")), TOKENIZER)
    assert len(asked) > 1
    assert fast.train.fingerprint == slow.train.fingerprint
    assert files_of(tmp_path / "fast") == files_of(tmp_path / "slow")


def _counting(calls: list[int], function: Any) -> Any:
    def counted(*arguments: Any) -> Any:
        calls.append(1)
        return function(*arguments)

    return counted


def test_a_fast_encoder_that_differs_on_the_rows_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = rows_file(tmp_path / "chats.jsonl")
    keys: dict[str, Any] = {"type": "chat_template", "malformed_rows": "drop"}
    monkeypatch.setattr(speed, "FAST_FROM_BYTES", 1000)
    label = speed.FastTokenizer.labelled

    def wrong(*arguments: Any) -> Any:
        found = label(*arguments)
        for sample in found:
            if sample is not None:
                sample.labels[-1] = sample.input_ids[-1]
        return found

    monkeypatch.setattr(speed.FastTokenizer, "labelled", wrong)
    note = prepare_datasets(config(path, **keys), TOKENIZER).cache_note
    assert "the fast one differs on the first rows" in note
    sentencepiece = byte_tokenizer()
    sentencepiece.backend_tokenizer.pre_tokenizer = None
    note = prepare_datasets(config(path, **keys), sentencepiece).cache_note
    assert "not the fast one: its pre-tokeniser None" in note


def test_the_order_of_rows_is_that_of_the_file(tmp_path: Path) -> None:
    path = write_rows(
        tmp_path / "ids.jsonl", [json.dumps({"input_ids": [i, 1, i], "labels": [i, 1, i]}) for i in range(250)]
    )
    cfg = config(path, dataset_processes=3, shuffle_merged_datasets=False)
    prepared = prepare_datasets(cfg, TOKENIZER)
    np.testing.assert_array_equal([prepared.train.sample(i).input_ids[0] for i in range(250)], range(250))
