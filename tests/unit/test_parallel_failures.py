"""What processes leave when they end early, and which of several failures the launcher shows."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from eft.core.errors import ConfigError, DataGateError, EftError
from eft.parallel.failures import (
    Cause,
    OtherRankFailed,
    exit_code_of,
    first_failure,
    record_failure,
    record_stop,
    recorded_stop,
)
from eft.parallel.watch import StalledRank

GLOO = RuntimeError("[gloo/transport/tcp/pair.cc:544] Connection closed by peer [127.0.0.1]:1234")


def leave(logs: Path, rank: int, error: Exception, monkeypatch: pytest.MonkeyPatch, *, at_ns: int = 0) -> Path:
    """What `rank` leaves, in the folder where torchrun has it."""
    path = logs / "run" / "attempt_0" / str(rank) / "error.json"
    path.parent.mkdir(parents=True)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    try:
        raise error
    except Exception as raised:
        record_failure(raised)
    os.utime(path, ns=(10**18 + at_ns, 10**18 + at_ns))
    return path


def failed(rank: int, code: int, path: Path | str = "none") -> dict[int, ProcessFailure]:
    return {rank: ProcessFailure(rank, 0, code, str(path))}


def test_an_error_for_the_user_is_told_without_a_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, error in enumerate([ConfigError("no such thing"), DataGateError("odd rows"), StalledRank("silent")]):
        path = leave(tmp_path / str(number), 0, error, monkeypatch)
        assert first_failure(failed(0, 2, path), tmp_path / str(number)).text == f"error: {error}"


def test_any_other_error_is_shown_with_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failure = first_failure(failed(0, 1, leave(tmp_path, 0, ValueError("odd"), monkeypatch)), tmp_path)
    assert failure.text.startswith("Traceback (most recent call last)")
    assert failure.text.endswith("ValueError: odd")


def test_a_collective_that_waited_names_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = RuntimeError("Timed out waiting 3000ms for recv operation to complete")
    assert "`ddp_timeout`" in first_failure(failed(0, 1, leave(tmp_path, 0, error, monkeypatch)), tmp_path).text


@pytest.mark.parametrize("followed", [GLOO, OtherRankFailed("rank 1: ValueError")])
def test_what_followed_from_another_failure_is_not_shown_first(
    followed: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 was faster in ending, and rank 1 still ends when the launcher looks: only its file is there."""
    zero = leave(tmp_path, 0, followed, monkeypatch, at_ns=-5)
    leave(tmp_path, 1, ValueError("the cause"), monkeypatch)
    failure = first_failure(failed(0, 1, zero), tmp_path)
    assert (failure.rank, failure.cause) == (1, Cause.OWN)
    assert "the cause" in failure.text


def test_the_earlier_of_two_in_one_second_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zero = leave(tmp_path, 0, ValueError("second"), monkeypatch, at_ns=2)
    one = leave(tmp_path, 1, ValueError("first"), monkeypatch, at_ns=1)
    assert first_failure(failed(0, 1, zero) | failed(1, 1, one), tmp_path).rank == 1


def test_ranks_are_counted_over_all_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second machine of two with two processes each: local 0 and 1 are ranks 2 and 3."""
    zero = leave(tmp_path, 0, GLOO, monkeypatch)
    leave(tmp_path, 1, ValueError("the cause"), monkeypatch)
    failures = {2: ProcessFailure(0, 0, 1, str(zero))}
    assert first_failure(failures, tmp_path, several_machines=True).rank == 3


def test_a_killed_process_comes_before_what_it_broke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run" / "attempt_0" / "1").mkdir(parents=True)
    (tmp_path / "run" / "attempt_0" / "1" / "stderr.log").write_text("the last words\n")
    zero = leave(tmp_path, 0, GLOO, monkeypatch)
    failure = first_failure(failed(0, 1, zero) | failed(1, -9), tmp_path)
    assert failure.text == "rank 1 was ended by signal 9, SIGKILL\nthe last words"
    assert failure.exit_code == -9


def test_processes_that_the_launcher_ended_come_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = leave(tmp_path, 1, GLOO, monkeypatch)
    assert first_failure(failed(0, -15) | failed(1, 1, one), tmp_path).rank == 1
    assert "stopped on request (exit code 143)" in first_failure(failed(0, 143), tmp_path / "none").text


def test_where_all_only_lost_another_machine_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zero = leave(tmp_path, 0, GLOO, monkeypatch)
    text = first_failure(failed(0, 1, zero), tmp_path, several_machines=True).text
    assert text.startswith("error: a process on another machine was lost")
    assert "Connection closed by peer" in text


def test_a_file_cut_off_by_a_kill_is_as_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = leave(tmp_path, 1, ValueError("x"), monkeypatch)
    path.write_text(path.read_text()[:20])
    zero = leave(tmp_path, 0, GLOO, monkeypatch)
    assert first_failure(failed(0, 1, zero), tmp_path).rank == 0


CUT_OFF = """
import resource, signal
from eft.parallel.failures import record_failure, record_stop
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
resource.setrlimit(resource.RLIMIT_FSIZE, (1, 1))
"""
"""A process that is killed with the first byte of a file on the disk."""


@pytest.mark.parametrize("words", ["record_failure(ValueError('x'))", "record_stop(75)"])
def test_whoever_is_killed_while_writing_leaves_nothing(words: str, tmp_path: Path) -> None:
    """torchrun raises on half a file, so that its own user would lose the run."""
    path = tmp_path / "attempt_0" / "1" / "error.json"
    path.parent.mkdir(parents=True)
    environment = os.environ | {"TORCHELASTIC_ERROR_FILE": str(path)}
    done = subprocess.run([sys.executable, "-c", CUT_OFF + words], env=environment, timeout=120, check=False)
    assert done.returncode == -signal.SIGXFSZ
    assert recorded_stop(tmp_path) == 0
    assert ProcessFailure(1, 0, -9, str(path)).error_file_data["message"] == "<NONE>"


def test_where_nothing_can_be_written_the_error_stands_on_stderr(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").touch()
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "full" / "error.json"))
    record_failure(OSError("no space left"))
    assert capsys.readouterr().err.endswith("OSError: no space left\n")


def test_torch_reads_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's own torchrun shows it, too."""
    path = leave(tmp_path, 0, ValueError("odd"), monkeypatch)
    failure = ProcessFailure(0, 0, 1, str(path))
    assert failure.timestamp > 0
    assert json.loads(path.read_text())["message"]["message"] == "ValueError: odd"
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE")
    record_failure(ValueError("nobody listens"))


def test_a_run_that_was_asked_to_stop_tells_its_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert recorded_stop(tmp_path) == 0
    (tmp_path / "attempt_0" / "0").mkdir(parents=True)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "attempt_0" / "0" / "error.json"))
    record_stop(75)
    assert recorded_stop(tmp_path) == 75


def test_exit_codes_are_those_of_the_command_line() -> None:
    assert [exit_code_of(error) for error in (EftError(), ValueError())] == [2, 1]
