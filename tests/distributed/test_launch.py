"""Real processes under torchrun: they train as one, fail as one and leave what can be continued. Slow: each imports."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from eft.core.constants import METRICS_FILE
from tests.distributed.commands import kill, start, wait_for_checkpoint, write_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def losses(output: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (output / METRICS_FILE).read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def test_two_processes_train_as_one_does(tmp_path: Path) -> None:
    config = write_run(tmp_path, lora_dropout=0.0, adam_epsilon=1e-3)
    one, two = tmp_path / "one", tmp_path / "two"
    code, text = start("train", config, f"output_dir={one}", "--launcher", "none").end()
    assert code == 0, text
    code, text = start("train", config, f"output_dir={two}", "--nproc", 2).end()
    assert code == 0, text
    assert "torchrun --nnodes=1 --nproc-per-node=2" in text, "the command that does the same is shown"
    assert text.count("Before the first step") == 1, "rank 0 alone speaks"
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    expected, got = (load_file(folder / "adapter_model.safetensors") for folder in (one, two))
    assert expected.keys() == got.keys()
    assert max(float((got[name] - expected[name]).abs().max()) for name in expected) < 1e-5


def test_a_lost_rank_ends_the_job_and_the_same_command_continues(tmp_path: Path) -> None:
    config = write_run(tmp_path, max_steps=200)
    job = start("train", config, "--nproc", 2)
    wait_for_checkpoint(tmp_path / "out", 4)
    killed = time.monotonic()
    kill(job.rank(1), signal.SIGKILL)
    code, text = job.end()
    assert time.monotonic() - killed < 60
    assert code != 0
    assert "rank 1 was ended by signal 9" in text
    code, text = start("train", config, "max_steps=200", "--nproc", 2).end()
    assert code == 0, text
    assert "Continuing the unfinished run" in text


def test_a_stopped_rank_is_named_with_its_line_and_what_the_other_waits_in(tmp_path: Path) -> None:
    config = write_run(tmp_path, max_steps=400, stall_timeout=10)
    job = start("train", config, "--nproc", 2)
    wait_for_checkpoint(tmp_path / "out", 4)
    stopped = time.monotonic()
    kill(job.rank(1), signal.SIGSTOP)
    code, text = job.end()
    assert time.monotonic() - stopped < 100
    assert code != 0
    message = next(line for line in text.splitlines() if "has not answered" in line)
    assert "rank 1 of 2 has not answered for 10 s: at its last sign (one a second) it was at " in message
    assert "Rank 0 is at " in message
    assert "backward" in message or "waits in" in message, message


def test_restarts_after_a_kill_end_in_the_weights_of_an_undisturbed_run(tmp_path: Path) -> None:
    config = write_run(tmp_path, max_steps=60)
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    code, text = start("train", config, f"output_dir={straight}", "--nproc", 2).end()
    assert code == 0, text
    job = start("train", config, f"output_dir={killed}", "--nproc", 2, "--max-restarts", 3)
    wait_for_checkpoint(killed, 4)
    first = job.rank(1)
    kill(first, signal.SIGKILL)
    code, text = job.end()
    assert code == 0, text
    assert losses(killed) == losses(straight)
    for name in ("adapter_model.safetensors",):
        assert (killed / name).read_bytes() == (straight / name).read_bytes()


def test_a_wrong_config_is_said_once_and_before_any_process_is_started(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    code, text = start("train", config, "global_batch_size=3", "--nproc", 2).end()
    assert code == 2
    assert text.count("global_batch_size: 3 is no multiple of") == 1
    assert "starting:" not in text


PLANTED = """
import os
import signal

if os.environ.get("RANK") == "1":

    def fail(*arguments):
        raise ValueError("a planted fault")

    signal.signal(signal.SIGUSR2, fail)
"""


def test_a_failing_rank_ends_the_job_with_its_own_traceback_first(tmp_path: Path) -> None:
    config = write_run(tmp_path, max_steps=400)
    (tmp_path / "planted").mkdir()
    (tmp_path / "planted" / "sitecustomize.py").write_text(PLANTED)
    job = start("train", config, "--nproc", 2, planted=tmp_path / "planted")
    wait_for_checkpoint(tmp_path / "out", 4)
    failed = time.monotonic()
    kill(job.rank(1), signal.SIGUSR2)
    code, text = job.end()
    print(f"ended after {time.monotonic() - failed:.1f} s:\n{text[-4000:]}")
    assert time.monotonic() - failed < 60
    assert code == 1
    assert text.count("Traceback (most recent call last)") == text.count("ValueError: a planted fault") == 1
    assert "(rank 1 failed first, exit code 1; all output: " in text


def test_a_stop_file_stops_also_where_lost_processes_are_started_again(tmp_path: Path) -> None:
    config = write_run(tmp_path, max_steps=400)
    job = start("train", config, "--nproc", 2, "--max-restarts", 3)
    wait_for_checkpoint(tmp_path / "out", 4)
    (tmp_path / "out" / "STOP").touch()
    code, text = job.end()
    assert code == 75, text
    assert text.count("the same command continues") == 1
    assert "Continuing the unfinished run" not in text


def test_accelerates_launcher_starts_the_same_run(tmp_path: Path) -> None:
    config = write_run(tmp_path, max_steps=4)
    code, text = start("train", config, f"output_dir={tmp_path / 'ours'}", "--nproc", 2).end()
    assert code == 0, text
    code, text = start("train", config, "--nproc", 2, "--launcher", "accelerate").end()
    assert code == 0, text
    assert "starting: accelerate launch --multi_gpu" in text
    assert losses(tmp_path / "out") == losses(tmp_path / "ours")
    for folder in ("out", "ours"):
        assert len(list((tmp_path / folder / "checkpoint-4").glob("rng_*.json"))) == 2, "two processes"
