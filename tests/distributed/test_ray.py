"""`use_ray`: two workers of Ray Train train as one process does, are started again when lost, fail with their words.

In a cluster of this machine with this process as the driver, and, slow, as the command.
"""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import pytest
from safetensors.torch import load_file

pytest.importorskip("ray", reason="needs Ray Train: pip install 'eft-trainer[ray]'")

from eft import run
from eft.config.load import load_config
from eft.core.constants import EXIT_OK, EXIT_STOP_FILE, EXIT_USAGE
from eft.core.errors import ConfigError
from eft.parallel import ray_train
from eft.parallel.launch import RunFailed
from eft.parallel.ray_train import RayRequest, _Heard, check_room, logs_of_cluster, ray_cluster, run_workers
from eft.runtime.stop import FILE_EVERY_S
from tests.distributed.commands import kill, wait_for_checkpoint, write_run
from tests.distributed.ray_job import (
    check_kills,
    fail_as_told,
    hold_of,
    notes_of,
    start_ray_job,
    train_in_workers,
    workers,
)
from tests.faults.job import metrics

# Ray 2.60 sets options of its own that it has deprecated.
pytestmark = [pytest.mark.timeout(900), pytest.mark.filterwarnings("ignore:`use_.*` is deprecated")]

LOSS_REL = 1e-5
WEIGHT_ABS = 1e-5
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"lora_dropout": 0.0},
    "full": {"adapter": None, "lora_target_linear": None, "lora_dropout": None},
}
TEN: dict[str, Any] = {"max_steps": 10, "adam_epsilon": 1e-3, "val_set_size": 0.0, "eval_steps": None}
REQUEST = RayRequest(2, {"CPU": 1.0}, "PACK", 0, None, str(Path(gettempdir(), "eft-ray")), 60)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with ray_cluster(None):
        yield


def losses(output: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in metrics(output) if "loss" in row}


def one_process(config: Path, output: Path) -> None:
    run.train(load_config(config, [f"output_dir={output}"]).config)


def check_equal(got: Path, expected: Path) -> None:
    assert losses(got) == pytest.approx(losses(expected), rel=LOSS_REL)
    (name,) = {path.name for path in expected.glob("*model.safetensors")}
    weights = [load_file(folder / name) for folder in (got, expected)]
    assert weights[0].keys() == weights[1].keys()
    assert max(float((weights[0][key] - tensor).abs().max()) for key, tensor in weights[1].items()) < WEIGHT_ABS


@pytest.mark.parametrize("kind", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_ten_steps_are_those_of_one_process(kind: str, cluster: None, tmp_path: Path) -> None:
    config = write_run(tmp_path, **TEN, **KINDS[kind])
    one, two = tmp_path / "one", tmp_path / "two"
    one_process(config, one)
    code, text = train_in_workers(config, f"output_dir={two}")
    assert code == EXIT_OK, text
    assert text.count("Before the first step") == 1, "rank 0 alone speaks"
    assert len(losses(two)) == 10
    check_equal(two, one)
    assert {line.count('"rank": 1') for line in notes_of(two).read_text().splitlines()} == {0, 1}, "both have trained"


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_what_two_workers_saved_one_process_continues(kind: str, cluster: None, tmp_path: Path) -> None:
    config = write_run(tmp_path, **TEN, **KINDS[kind])
    one, two = tmp_path / "one", tmp_path / "two"
    one_process(config, one)
    hold_of(two).write_text("6")
    asked: list[float] = []

    def stop() -> None:
        if len(losses(two)) >= 3 and not asked:
            (two / "STOP").touch()
            asked.append(time.monotonic())
        # Workers look for the file now and then only; the first step that is let go comes after that.
        if asked and time.monotonic() - asked[0] > FILE_EVERY_S:
            hold_of(two).unlink(missing_ok=True)

    code, text = train_in_workers(config, f"output_dir={two}", on_wait=stop)
    assert code == EXIT_STOP_FILE, text
    assert "the same command continues" in text
    (two / "STOP").unlink(missing_ok=True)
    assert 3 <= len(losses(two)) < 10
    one_process(config, two)
    check_equal(two, one)


@pytest.mark.slow
def test_killed_workers_are_started_again_and_lose_nothing(cluster: None, tmp_path: Path) -> None:
    text = check_kills(tmp_path, kills=2, seed=0)
    assert "was lost" in text


def test_a_cluster_that_is_not_there_is_an_error_at_once() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"no Ray cluster answers at {address}"), ray_cluster(address):
            pass
    with pytest.raises(ConfigError, match="ray://head:10001 is Ray Client's"), ray_cluster("ray://head:10001"):
        pass


def heard_of(*letters: tuple[str, int, Any]) -> tuple[_Heard, list[str]]:
    said: list[str] = []
    heard = _Heard(lambda stream, text: said.append(text), max_failures=3)
    for letter in (("here", 0, "process 7 on a"), ("here", 1, "process 8 on b"), *letters):
        heard.take(letter)
    return heard, said


def test_who_was_lost_is_named_and_not_who_lost_it() -> None:
    broken = ("failed", 0, ("Traceback: Connection closed by peer", True, None))
    for letters in ([broken], [broken, ("errors", -1, {0: "RuntimeError", 1: "the actor died\nKilled by a signal"})]):
        heard, _ = heard_of(*letters)
        assert str(heard.failure(None, Path("logs"))).startswith("rank 1 (process 8 on b) was lost")
    heard, _ = heard_of(broken, ("failed", 1, ("Traceback: ValueError", False, None)))
    text = str(heard.failure(None, Path("logs")))
    assert text.startswith("Traceback: ValueError\n(rank 1 failed first, exit code 1;")


def test_a_restart_is_told_with_its_reason_and_forgets_the_failures() -> None:
    failed = ("failed", 0, ("Traceback\nValueError: once", False, None))
    heard, said = heard_of(("end", 1, 0), failed, ("here", 1, "process 9 on b"))
    assert said == ["note: ValueError: once\nnote: Ray has started all workers again (1 of 3)\n"]
    heard.take(("out", 1, "only rank 0 is shown\n"))
    heard.take(("out", 0, "step 1\n"))
    assert said[1:] == ["step 1\n"]
    assert "gave up" in str(heard.failure(ValueError("gave up"), Path("logs")))


def test_a_worker_that_fails_has_the_first_word(cluster: None) -> None:
    with pytest.raises(RunFailed) as failed:
        run_workers(fail_as_told, "ValueError", REQUEST, show=lambda *said: None)
    text = str(failed.value)
    assert text.startswith("Traceback")
    assert "in fail_as_told" in text
    assert "ValueError: planted" in text
    assert f"(rank 1 failed first, exit code 1; all output: {logs_of_cluster()})" in text


def test_an_error_of_the_users_is_one_message(cluster: None) -> None:
    with pytest.raises(RunFailed) as failed:
        run_workers(fail_as_told, "ConfigError", REQUEST, show=lambda *said: None)
    assert str(failed.value).startswith("error: planted\n(rank 1 failed first, exit code 2")
    assert failed.value.exit_code == EXIT_USAGE


def test_it_is_not_tried_again() -> None:
    heard, _ = heard_of(("failed", 1, ("error: planted", False, EXIT_USAGE)))
    assert heard.hopeless == EXIT_USAGE
    heard, _ = heard_of(("failed", 1, ("Traceback: ValueError", False, None)))
    assert heard.hopeless is None


@pytest.mark.slow
def test_a_worker_that_ends_itself_is_quoted(cluster: None) -> None:
    """As the stall watch does: it prints, and leaves at once."""
    with pytest.raises(RunFailed) as failed:
        run_workers(fail_as_told, "exit", REQUEST, show=lambda *said: None)
    assert str(failed.value).startswith("error: planted last words\n(rank 1 failed first")


def test_too_many_workers_are_refused(cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="no place for 99 workers with 1 CPU each .* has .* CPU"):
        check_room(replace(REQUEST, num_workers=99), may_grow=False)
    with pytest.raises(ConfigError, match="2 workers with 1 GPU each"):
        check_room(replace(REQUEST, resources={"GPU": 1.0}), may_grow=False)
    check_room(REQUEST, may_grow=False)
    monkeypatch.setattr(ray_train, "ROOM_S", 2.0)
    with pytest.raises(ConfigError, match="`ray_placement_strategy: STRICT_SPREAD`.*cluster of 1 machine "):
        check_room(replace(REQUEST, placement_strategy="STRICT_SPREAD"), may_grow=False)
    with pytest.raises(ConfigError, match="1 GPU each"):
        check_room(replace(REQUEST, resources={"GPU": 1.0}), may_grow=True)


@pytest.mark.slow
def test_the_command_stops_with_a_checkpoint_and_continues(tmp_path: Path) -> None:
    # Hundreds of steps after the checkpoint: they take seconds, and a signal's way to the workers up to one.
    config = write_run(tmp_path, max_steps=600, save_steps=150, eval_steps=150)
    job = start_ray_job(config)
    wait_for_checkpoint(tmp_path / "out", 150)
    assert len(workers(job.process.pid)) == 2
    kill(job.process.pid, signal.SIGTERM)
    code, text = job.end()
    assert code == 128 + signal.SIGTERM, text
    assert "the same command continues" in text
    assert len(losses(tmp_path / "out")) < 600
    code, text = start_ray_job(config).end()
    assert code == EXIT_OK, text
    assert "Continuing the unfinished run" in text
    assert len(losses(tmp_path / "out")) == 600


@pytest.mark.slow
def test_the_command_says_that_there_is_no_room(tmp_path: Path) -> None:
    code, text = start_ray_job(write_run(tmp_path, global_batch_size=64), number=64).end()
    assert code == EXIT_USAGE
    assert "error: ray_num_workers: no place for 64 workers" in text
