"""Signs of life, and what is said when they stop; what a launcher says of processes that failed."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from torch.distributed import HashStore
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from eft.core.errors import ConfigError
from eft.parallel.launch import Fleet, failure_text, shown, torchrun_command
from eft.parallel.watch import StallWatch, place_of


def test_a_neighbour_that_falls_silent_is_named_with_the_line_it_was_at() -> None:
    store, said = HashStore(), []
    heard = threading.Event()

    def listen(message: str) -> None:
        said.append(message)
        heard.set()

    store.set("eft/alive/0/1", json.dumps([1, "model.py:7 in forward: x = y (waits in all_reduce, c10d.py:3)"]))
    watch = StallWatch(store, 0, 2, 2.0, listen)
    watch.start()
    assert heard.wait(20)
    watch.stop()
    assert said[0].startswith(
        "rank 1 of 2 has not answered for 2 s: it was last at model.py:7 in forward: x = y (waits"
    )
    assert "Rank 0 is at " in said[0]


def test_neighbours_that_answer_or_have_said_goodbye_are_left_alone() -> None:
    store, said = HashStore(), []
    watches = [StallWatch(store, rank, 2, 2.0, said.append) for rank in range(2)]
    for watch in watches:
        watch.start()
    watches[1].stop()
    threading.Event().wait(4)
    watches[0].stop()
    assert said == []


def test_the_place_of_a_thread_names_its_line() -> None:
    place = place_of(threading.get_ident())
    assert "place_of" in place or "test_parallel_watch.py" in place


@pytest.mark.parametrize(
    ("content", "code", "expected"),
    [
        (
            {"message": "ConfigError: no such thing", "extraInfo": {"py_callstack": "Trace", "timestamp": "1"}},
            2,
            "error: no",
        ),
        (
            {"message": "ValueError: odd", "extraInfo": {"py_callstack": "Trace\nValueError: odd", "timestamp": "1"}},
            1,
            "Trace",
        ),
    ],
)
def test_the_first_failure_speaks_first(content: dict[str, object], code: int, expected: str, tmp_path: Path) -> None:
    file = tmp_path / "error.json"
    file.write_text(json.dumps({"message": content}))
    text = failure_text(1, ProcessFailure(1, 0, code, str(file)), tmp_path)
    assert text.startswith(expected)
    assert f"(rank 1 failed first, exit code {code}; all output: {tmp_path})" in text


def test_a_killed_rank_is_named_with_the_signal_and_its_last_lines(tmp_path: Path) -> None:
    (tmp_path / "attempt_0" / "1").mkdir(parents=True)
    (tmp_path / "attempt_0" / "1" / "stderr.log").write_text("the last words\n")
    text = failure_text(1, ProcessFailure(1, 0, -9, str(tmp_path / "none")), tmp_path)
    assert text.startswith("rank 1 was ended by signal 9\nthe last words")


def test_the_command_for_several_machines() -> None:
    command = torchrun_command(Fleet(8, 2, "host:29500"), ["train", "run.yaml", "output_dir=a b"])
    assert shown(command) == (
        "torchrun --nnodes=2 --nproc-per-node=8 --max-restarts=0 --rdzv-backend=c10d --rdzv-endpoint=host:29500 "
        "--rdzv-id=eft-launch -m eft.cli train run.yaml 'output_dir=a b'"
    )
    with pytest.raises(ConfigError, match="--rendezvous HOST:PORT"):
        Fleet(8, 2)
    with pytest.raises(ConfigError, match="--max-restarts: not offered over several machines"):
        Fleet(8, 2, "host:29500", 3)
