"""Signs of life, and what is said when they stop; what a launcher says of processes that failed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from datetime import timedelta
from typing import Any, cast

import pytest
import torch
from torch.distributed import HashStore

from eft.core.errors import ConfigError
from eft.parallel.group import Agreement, from_first_rank
from eft.parallel.launch import Fleet, shown, torchrun_command
from eft.parallel.watch import StallWatch, place_of
from eft.runtime.metrics import Throughput


def test_a_neighbour_that_falls_silent_is_named_with_the_line_it_was_at() -> None:
    store, said, silent = HashStore(), [], []
    heard = threading.Event()

    def listen(message: str, pid: int | None) -> None:
        said.append(message)
        silent.append(pid)
        heard.set()

    store.set("eft/alive/0/1", json.dumps([1, "model.py:7 in forward: x = y (waits in all_reduce, c10d.py:3)", 77]))
    watch = StallWatch(store, 0, 2, 2.0, listen)
    watch.start()
    assert heard.wait(20)
    watch.stop()
    assert said[0].startswith(
        "rank 1 of 2 has not answered for 2 s: at its last sign (one a second) it was at model.py:7 "
        "in forward: x = y (waits in all_reduce, c10d.py:3). Rank 0 is at "
    )
    assert silent == [77]


def test_the_first_sign_is_given_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a process that is stopped before its first sign neither the line nor the process id would be known."""
    monkeypatch.setattr("eft.parallel.watch.BEAT_S", 600.0)
    store = HashStore()
    signs = StallWatch(store, 0, 2, 600.0, lambda *message: None)
    signs.start()
    store.wait(["eft/alive/0/0"], timedelta(seconds=10))
    _, place, pid = json.loads(store.get("eft/alive/0/0"))
    signs.stop()
    assert ".py:" in place
    assert pid == os.getpid()


def test_neighbours_that_answer_or_have_said_goodbye_are_left_alone() -> None:
    store, said = HashStore(), []
    watches = [StallWatch(store, rank, 2, 4.0, lambda *message: said.append(message)) for rank in range(2)]
    for watch in watches:
        watch.start()
    watches[1].stop()
    threading.Event().wait(2)
    watches[0].stop()
    assert said == []


def test_who_has_left_is_not_waited_for_without_end() -> None:
    """Nobody leaves before all are done, so one that has left leaves the others in a collective that never ends."""
    store, said, heard = HashStore(), [], threading.Event()

    def listen(message: str, pid: int | None) -> None:
        said.append((message, pid))
        heard.set()

    store.set("eft/alive/0/1", "done")
    watch = StallWatch(store, 0, 2, 1.0, listen)
    watch.start()
    assert heard.wait(20)
    watch.stop()
    assert said[0][0].startswith("rank 1 of 2 has ended, but rank 0 is still at ")
    assert said[0][1] is None


def test_the_place_of_a_thread_is_the_innermost_line_of_the_package_that_is_no_wrapper() -> None:
    """Not that of the watch itself, nor that of a library in an environment below a folder called eft."""
    places: list[str] = []
    library = compile("def call(work): work()", "/home/user/eft/.venv/lib/torch/nn/module.py", "exec")
    names: dict[str, Any] = {}
    exec(library, names)

    def clock() -> float:
        from_first_rank(lambda: names["call"](lambda: places.append(place_of(threading.get_ident()))))
        return 0.0

    Throughput(clock)
    assert places[0].startswith("metrics.py:"), places[0]
    assert "self._since = clock()" in places[0]


def test_who_waits_for_a_gpu_is_said_to_wait_for_what_is_queued_there() -> None:
    places: list[str] = []
    events = compile("def synchronize(work): work()", "/home/user/.venv/lib/torch/cuda/streams.py", "exec")
    names: dict[str, Any] = {}
    exec(events, names)

    def clock() -> float:
        names["synchronize"](lambda: places.append(place_of(threading.get_ident())))
        return 0.0

    Throughput(clock)
    assert places[0].startswith("metrics.py:"), places[0]
    assert places[0].endswith("(waits for its device, where the collectives of the ranks are queued)")


def test_who_waits_for_an_all_reduce_that_was_begun_a_step_ago_is_said_to_wait_in_it() -> None:
    """The stack ends in C++ there: without a name of ours nothing would tell what is waited for."""
    places: list[str] = []

    class Work:
        def wait(self) -> None:
            places.append(place_of(threading.get_ident()))

    class Group:
        def allreduce(self, tensors: list[torch.Tensor], options: object) -> Work:
            return Work()

    agree = Agreement()
    agree._group = cast(Any, Group())
    agree(1)
    agree(1)
    assert "(waits in _all_reduced, group.py:" in places[0]


def test_the_command_for_several_machines() -> None:
    fleet, arguments = Fleet(8, 2, "host:29500"), ["train", "run.yaml", "output_dir=a b"]
    command = torchrun_command(fleet, arguments)
    assert shown(command) == (
        "torchrun --nnodes=2 --nproc-per-node=8 --max-restarts=0 --rdzv-backend=c10d --rdzv-endpoint=host:29500 "
        f"--rdzv-id={fleet.run_id(arguments)} -m eft.cli train run.yaml 'output_dir=a b'"
    )
    with pytest.raises(ConfigError, match="--rendezvous HOST:PORT"):
        Fleet(8, 2)
    with pytest.raises(ConfigError, match="--max-restarts: not offered over several machines"):
        Fleet(8, 2, "host:29500", 3)


END = """
import os, subprocess, sys
sleeper = subprocess.Popen(["sleep", "60"])
if os.fork() == 0:
    from eft.parallel.watch import end_process
    end_process("rank 1 is silent", sleeper.pid)
print(os.waitstatus_to_exitcode(os.wait()[1]), os.waitstatus_to_exitcode(os.wait()[1]))
"""


def test_a_silent_process_of_the_same_launcher_is_killed_and_no_other() -> None:
    """A stopped process does not hear that it is to end."""
    done = subprocess.run([sys.executable, "-c", END], capture_output=True, text=True, timeout=120, check=True)
    assert sorted(done.stdout.split()) == ["-9", "1"]
    assert done.stderr == "error: rank 1 is silent\n"
    code = f"from eft.parallel.watch import end_process; end_process('silent', {os.getpid()})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120, check=False).returncode == 1
