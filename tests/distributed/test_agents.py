"""Two launchers on this machine, as on two: they meet by torchrun's rendezvous, train as one, and end as one."""

from __future__ import annotations

import signal
import socket
import time
from pathlib import Path

import pytest

from tests.distributed.commands import Job, descendants, environment_of, kill, start, wait_for_checkpoint, write_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

AN_HOUR_FAST = """
import time
from datetime import datetime, timedelta

from torch.distributed.elastic.rendezvous import dynamic_rendezvous


class Fast(datetime):
    @classmethod
    def now(cls, tz=None):
        return datetime.now(tz) + timedelta(hours=1)


now = time.time
time.time = lambda: now() + 3600
dynamic_rendezvous.datetime = Fast
"""
"""What torch's launchers compare, and all that Python's own clock is asked for."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def agents(config: Path, output: Path, *, planted: Path | None = None, at_once: bool = True) -> list[Job]:
    """Two launchers of one process each. `at_once`: who keeps the store is left to chance, otherwise the first does.

    `planted`: into the processes of the second.
    """
    port = free_port()
    arguments = ["train", config, f"output_dir={output}", "--nproc", 1, "--nnodes", 2]
    arguments += ["--rendezvous", f"127.0.0.1:{port}"]
    first = start(*arguments)
    while not at_once:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            break
        except ConnectionRefusedError:
            time.sleep(0.1)
    return [first, start(*arguments, planted=planted)]


def export(output: Path) -> bytes:
    return (output / "adapter_model.safetensors").read_bytes()


def straight(folder: Path, config: Path) -> bytes:
    """Of two processes under one launcher."""
    code, text = start("train", config, f"output_dir={folder / 'straight'}", "--nproc", 2).end()
    assert code == 0, text
    return export(folder / "straight")


def test_two_launchers_train_as_one_though_one_clock_is_an_hour_ahead(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    (tmp_path / "planted").mkdir()
    (tmp_path / "planted" / "sitecustomize.py").write_text(AN_HOUR_FAST)
    jobs = agents(config, tmp_path / "out", planted=tmp_path / "planted")
    ended = [job.end() for job in jobs]
    assert [code for code, _ in ended] == [0, 0], ended
    assert export(tmp_path / "out") == straight(tmp_path, config)


@pytest.mark.parametrize("lost", [0, 1], ids=["the one they meet at", "the other"])
@pytest.mark.parametrize("whole", [False, True], ids=["launcher", "machine"])
def test_a_lost_launcher_ends_the_other_and_the_same_commands_continue(lost: int, whole: bool, tmp_path: Path) -> None:
    config, output = write_run(tmp_path, max_steps=60), tmp_path / "out"
    jobs = agents(config, output, at_once=False)
    wait_for_checkpoint(output, 4)
    struck = time.monotonic()
    with_it = descendants(jobs[lost].process.pid)
    kill(jobs[lost].process.pid, signal.SIGKILL)
    for process in with_it if whole else []:
        kill(process, signal.SIGKILL)
    code, text = jobs[1 - lost].end(timeout=100)
    print(f"ended {time.monotonic() - struck:.0f} s after, exit code {code}:\n{text[-3000:]}")
    assert time.monotonic() - struck < 60
    assert code != 0
    assert "Traceback" not in text.split("error: ")[0]
    assert any(words in text for words in ("same command", "Start the same")), text
    assert jobs[lost].end()[0] == -signal.SIGKILL
    # Nobody goes on without its launcher.
    end = time.monotonic() + 30
    while any(environment_of(process) for process in with_it):
        assert time.monotonic() < end, "processes of the lost launcher live on"
        time.sleep(0.2)
    ended = [job.end() for job in agents(config, output)]
    assert [code for code, _ in ended] == [0, 0], ended
    assert any("Continuing the unfinished run" in text for _, text in ended)
    assert export(output) == straight(tmp_path, config)
