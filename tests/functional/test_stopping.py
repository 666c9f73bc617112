"""Asked to stop in any window of a training: no step is lost, and the continued run is the straight one."""

from __future__ import annotations

import io
import json
import logging
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import TrainerCallback

from eft import run
from eft.callbacks import CALLBACKS
from eft.core.constants import EXIT_STOP_FILE
from eft.core.errors import CheckpointError, RunFinished
from eft.runtime.stop import SIGNALS, StopRequest
from tests.functional.conftest import MakeConfig, MakeTrainer
from tests.functional.reference import token_rows

HELD_OUT = token_rows(4, seed=9)
COMPARED = ("step", "loss", "grad_norm", "learning_rate", "epoch", "tokens", "eval_loss", "eval_a_loss", "eval_b_loss")


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    """The handlers are given back, whatever happens."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    after = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in before.items():
        signal.signal(number, handler)
    assert after == before


class Ask(TrainerCallback):
    """Sends SIGTERM to this process at the `number`-th event of a kind; before everything else hears of it."""

    def __init__(self, event: str, number: int, act: Callable[[], None] | None = None) -> None:
        self.left = number
        self.act = act or (lambda: os.kill(os.getpid(), signal.SIGTERM))
        setattr(self, event, self._count)

    def _count(self, *arguments: Any, **keywords: Any) -> None:
        self.left -= 1
        if self.left == 0:
            self.act()


def asking(trainer: Any, event: str, number: int, act: Callable[[], None] | None = None) -> Any:
    trainer.callback_handler.callbacks.insert(0, Ask(event, number, act))
    return trainer


def rows(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: row[name] for name in COMPARED if name in row} for row in lines]


def assert_equal_runs(left: Any, right: Any) -> None:
    assert rows(Path(left.args.output_dir)) == rows(Path(right.args.output_dir))
    for (name, one), other in zip(left.model.named_parameters(), right.model.parameters(), strict=True):
        assert torch.equal(one, other), name
    for name in ("global_step", "best_metric", "best_global_step"):
        assert getattr(left.state, name) == getattr(right.state, name), name
    counters = [
        {name: state for name, state in trainer.callback_states().items() if name != "TrainerControl"}
        for trainer in (left, right)
    ]
    assert counters[0] == counters[1]
    assert left.progress.state() == right.progress.state()


EARLY = "early stopping"
EVALUATIONS: dict[str, dict[str, Any]] = {
    "one set": {},
    "best model": {"load_best_model_at_end": True, "save_steps": 2},
    EARLY: {"early_stopping_patience": 1, "learning_rate": 0.3, "lr_scheduler": "constant"},
    "two sets": {"evals": {"a": HELD_OUT, "b": token_rows(3, seed=4)}, "early_stopping_patience": 3},
    "one of two decides": {
        "evals": {"a": HELD_OUT, "b": token_rows(3, seed=4)},
        "early_stopping_patience": 3,
        "learning_rate": 0.3,
        "lr_scheduler": "constant",
        "metric_for_best_model": "eval_a_loss",
    },
}


GIVEN_UP_AT = {"one set": (1, 5), "best model": (2, 5), EARLY: (1, 3), "two sets": (3, 4), "one of two decides": (1, 6)}
"""Batches, counted over all evaluations."""


@pytest.mark.parametrize(("name", "batch"), [(name, batch) for name in EVALUATIONS for batch in GIVEN_UP_AT[name]])
def test_an_evaluation_is_given_up_and_made_again(
    name: str, batch: int, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    def trainer_of(folder: str) -> Any:
        keys = {"evals": HELD_OUT, "max_steps": 6, "eval_steps": 2, "save_steps": 3, "val_set_size": 0.1}
        return make_trainer(**{**keys, "eval_batch_size": 1, **EVALUATIONS[name]}, output_dir=str(tmp_path / folder))

    straight = trainer_of("straight")
    straight.train()
    stopped = asking(trainer_of("stopped"), "on_prediction_step", batch)
    stopped.train()
    assert stopped.outcome.exit_code == 128 + signal.SIGTERM
    step = stopped.state.global_step
    assert step in straight.flow.evaluate_at
    assert not any("eval_loss" in row for row in rows(tmp_path / "stopped") if row["step"] == step)
    again = trainer_of("stopped")
    again.train(True)
    assert again.outcome.exit_code == 0
    assert again.outcome.reason == straight.outcome.reason
    assert_equal_runs(again, straight)


def test_also_at_the_very_last_step(make_config: MakeConfig, tmp_path: Path) -> None:
    """Nothing is left to train then, but the evaluation and the export are."""
    keys = {"max_steps": 4, "eval_steps": 4, "val_set_size": 4, "save_steps": 2}
    run.train(make_config(**keys, output_dir=str(tmp_path / "straight")))
    config = make_config(**keys)
    asked: list[Any] = []

    class Once(Ask):
        def __init__(self, *arguments: Any) -> None:
            super().__init__("on_prediction_step", 1)
            asked.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("eft.callbacks.CALLBACKS", ((lambda *_: True, Once), *CALLBACKS))
        _, _, trainer = run.train(config)
    assert asked
    assert trainer.state.global_step == 4
    assert trainer.outcome.exit_code == 143
    folder = tmp_path / "out"
    assert json.loads((folder / "run.json").read_text())["status"] == "interrupted"
    assert not (folder / "model.safetensors").exists()
    run.train(config)
    assert rows(folder) == rows(tmp_path / "straight")
    assert (folder / "model.safetensors").read_bytes() == (tmp_path / "straight" / "model.safetensors").read_bytes()


def test_the_save_that_is_being_made_is_the_last(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = asking(make_trainer(max_steps=6, save_steps=2), "on_save", 2)
    assert trainer.train().global_step == 4
    assert sorted(path.name for path in tmp_path.glob("out/checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]


def test_a_save_without_optimizer_is_not_enough(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = asking(make_trainer(max_steps=6, save_steps=2, save_only_model=True), "on_save", 1)
    assert trainer.train().global_step == 3
    assert trainer.parts.checkpoint.newest_complete().path == tmp_path / "out" / "checkpoint-3"


@pytest.mark.parametrize("key", [None, "elsewhere/halt"])
def test_the_stop_file(key: str | None, make_trainer: MakeTrainer, tmp_path: Path) -> None:
    path = tmp_path / "out" / "STOP" if key is None else tmp_path / key
    path.parent.mkdir(parents=True)
    keys = {} if key is None else {"stop_file": str(path)}
    trainer = asking(make_trainer(max_steps=6, save_strategy="no", **keys), "on_step_begin", 1, path.touch)
    assert trainer.train().global_step == 1
    assert trainer.outcome.exit_code == EXIT_STOP_FILE
    assert not path.exists(), "the same command goes on"
    again: Any = make_trainer(max_steps=6, save_strategy="no", **keys)
    assert again.train(True).global_step == 6
    assert again.outcome.exit_code == 0


def test_what_a_second_signal_loses_is_said(make_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)

    trainer = asking(make_trainer(max_steps=6, save_steps=2), "on_step_begin", 4, twice)
    with caplog.at_level(logging.WARNING), pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert "1 steps since the last checkpoint are lost" in caplog.text


def test_what_a_kill_lost_is_said(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    make_trainer(max_steps=5, save_steps=2).train()
    console = Console(file=io.StringIO(), width=200)
    make_trainer(max_steps=5, save_steps=2, console=console).train(str(tmp_path / "out" / "checkpoint-2"))
    assert "3 steps after checkpoint-2 are trained again" in console.file.getvalue()  # type: ignore[attr-defined]


def test_all_processes_stop_at_the_same_point(tmp_path: Path) -> None:
    """What one is asked, all know one point later; nobody stops earlier."""

    def agreement() -> Callable[[int], int]:
        """The largest of the values of the call before."""
        calls: list[int] = []

        def agree(value: int) -> int:
            number = len(calls)
            calls.append(value)
            shared.setdefault(number, []).append(value)
            return max(shared.get(number - 1, [0]))

        return agree

    shared: dict[int, list[int]] = {}
    ranks = [StopRequest(tmp_path / "STOP", looks_for_file=rank == 0, agree=agreement()) for rank in range(2)]
    seen: list[list[bool]] = []
    for point in range(4):
        if point == 1:
            ranks[1].code = 143
        seen.append([rank.is_agreed() for rank in ranks])
    assert seen == [[False] * 2, [False] * 2, [True] * 2, [True] * 2]
    assert [rank.code for rank in ranks] == [143, 143]


def test_a_finished_run_is_left_alone(make_config: MakeConfig, tmp_path: Path) -> None:
    """What a supervisor that starts the same command for ever sees; with another config it is an error as before."""
    run.train(make_config(max_steps=2))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    for check in (lambda config: run.check_before_start(config, overwrite=False), run.train):
        with pytest.raises(RunFinished, match="nothing is left to do"):
            check(make_config(max_steps=2))
    with pytest.raises(CheckpointError, match="holds a finished run") as error:
        run.check_before_start(make_config(max_steps=2, learning_rate=0.5), overwrite=False)
    assert not isinstance(error.value, RunFinished)
    with pytest.raises(CheckpointError, match="holds a finished run"):
        run.check_before_start(make_config(max_steps=2, auto_resume_from_checkpoints=False), overwrite=False)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before
