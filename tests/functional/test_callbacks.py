"""Each callback of a run fires, and has the effect that it is there for."""

from __future__ import annotations

import io
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn
from transformers import TrainerCallback

from eft import run
from eft.core.errors import PromiseBroken
from eft.runtime.checkpoint import verify_manifest
from eft.runtime.stop import SIGNALS
from eft.trainer.trainer import EftTrainer
from tests.functional.conftest import MakeConfig, MakeTrainer
from tests.functional.reference import model_of, token_rows
from tests.tiny_models import tiny_model

HELD_OUT = token_rows(4, seed=9)
WATCHED = {"loss_watchdog_threshold": 100.0, "loss_watchdog_patience": 2}


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# ---- metrics.jsonl -------------------------------------------------------------------------------------------------


def test_metrics_file(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = make_trainer(evals=HELD_OUT, max_steps=4, val_set_size=0.1, eval_steps=2, save_steps=2)
    trainer.train()
    rows = metrics(tmp_path / "out")
    losses = [row for row in rows if "loss" in row]
    assert [row["step"] for row in losses] == [1, 2, 3, 4]
    for row, logged in zip(losses, [row for row in trainer.state.log_history if "loss" in row], strict=True):
        for name in ("loss", "grad_norm", "learning_rate", "epoch", "tokens", "trained_tokens", "tokens_per_second"):
            assert row[name] == logged[name], name
        assert row["tokens"] > row["trained_tokens"] > 0
        assert row["time"] >= 0
    assert [row["step"] for row in rows if "eval_loss" in row] == [2, 4]


def test_metrics_file_of_a_resumed_run_has_every_step_once(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    """The first call went on after the checkpoint, as a killed run does; its later rows are dropped."""
    make_trainer(max_steps=5, save_steps=2).train()
    straight = metrics(tmp_path / "out")
    assert [row["step"] for row in straight if "loss" in row] == [1, 2, 3, 4, 5]
    make_trainer(max_steps=5, save_steps=2).train(str(tmp_path / "out" / "checkpoint-2"))
    again = metrics(tmp_path / "out")
    assert [row["step"] for row in again if "loss" in row] == [1, 2, 3, 4, 5]
    assert [row["loss"] for row in again if "loss" in row] == [row["loss"] for row in straight if "loss" in row]


def test_metrics_without_rates(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    make_trainer(max_steps=1, include_tkps=False).train()
    assert not [name for row in metrics(tmp_path / "out") for name in row if "per_second" in name]


# ---- watchdog and early stopping -----------------------------------------------------------------------------------


def test_watchdog_stops_a_loss_that_stays_high(make_trainer: MakeTrainer) -> None:
    trainer: Any = make_trainer(max_steps=6, loss_watchdog_threshold=0.5, loss_watchdog_patience=2)
    assert trainer.train().global_step == 2
    assert "loss watchdog" in trainer.outcome.reason
    assert "above 0.5" in trainer.outcome.reason


def test_watchdog_counts_in_a_row_only(make_trainer: MakeTrainer) -> None:
    """The loss starts above the threshold and falls below it before the patience is over."""
    trainer: Any = make_trainer(max_steps=6, loss_watchdog_threshold=4.6, loss_watchdog_patience=4, learning_rate=0.03)
    assert trainer.train().global_step == 6
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[0] > 4.6 > losses[3]
    assert trainer.outcome.reason == "finished"


def test_watchdog_sees_nan(make_trainer: MakeTrainer) -> None:
    model = tiny_model("llama")
    trainer: Any = make_trainer(model=model, max_steps=6, nonfinite_action="ignore", **WATCHED)
    with torch.no_grad():
        model.lm_head.weight[5, 5] = float("nan")
    assert trainer.train().global_step == 2
    assert "nan" in trainer.outcome.reason


def test_early_stopping(make_config: MakeConfig, tmp_path: Path) -> None:
    """A whole run: it ends early, says why, exports all the same, and E7 does not call it a fault."""
    keys = {"val_set_size": 4, "eval_steps": 1, "learning_rate": 0.3, "lr_scheduler": "constant", "max_steps": 30}
    _, _, trainer = run.train(make_config(early_stopping_patience=2, save_steps=100, **keys))
    evaluations = {row["step"]: row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row}
    best = min(evaluations, key=evaluations.__getitem__)
    assert trainer.state.global_step == best + 2 < 30
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["exit_reason"] == "early stopping: eval_loss has not improved for 2 evaluations"
    promises = json.loads((tmp_path / "out" / "promises.json").read_text())
    assert [promise["status"] for promise in promises if promise["promise"] == "E7"] == ["not applicable"]
    assert (tmp_path / "out" / "model.safetensors").is_file()


# ---- profiler ------------------------------------------------------------------------------------------------------


def profiled_steps(folder: Path) -> int:
    events = json.loads((folder / "profile" / "trace.json").read_text())["traceEvents"]
    return sum(str(event.get("name")).startswith("Optimizer.step") for event in events)


def test_profiler(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    make_trainer(max_steps=4, profiler_steps=2, profiler_steps_start=1).train()
    assert profiled_steps(tmp_path / "out") == 2


def test_profiler_of_a_run_that_ends_before(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    make_trainer(max_steps=2, profiler_steps=10, profiler_steps_start=1).train()
    assert profiled_steps(tmp_path / "out") == 1


def test_profiler_of_a_run_that_never_comes_to_it(make_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture) -> None:
    make_trainer(max_steps=2, profiler_steps=1, profiler_steps_start=2).train()
    assert "profiler_steps_start: 2, but the run ended at step 2" in caplog.text


def test_an_interval_longer_than_the_run_still_evaluates_its_end(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(evals=HELD_OUT, max_steps=3, val_set_size=0.1, eval_steps=50)
    trainer.train()
    assert [row["step"] for row in trainer.state.log_history if "eval_loss" in row] == [3]


# ---- signals -------------------------------------------------------------------------------------------------------


class Sender(TrainerCallback):
    """Sends signals to this very process in the middle of a step."""

    def __init__(self, *numbers: int, step: int = 2) -> None:
        self.numbers = numbers
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step - 1:
            for number in self.numbers:
                os.kill(os.getpid(), number)


@pytest.fixture
def handlers() -> Iterator[dict[int, Any]]:
    """The handlers before the test, and after it whatever happened."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


def handlers_now() -> dict[int, Any]:
    return {number: signal.getsignal(number) for number in SIGNALS}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_finishes_the_step_and_saves(
    number: int, make_trainer: MakeTrainer, tmp_path: Path, handlers: dict[int, Any]
) -> None:
    trainer: Any = make_trainer(max_steps=5, save_strategy="no")
    trainer.add_callback(Sender(number))
    assert trainer.train().global_step == 2
    assert trainer.outcome.exit_code == 128 + number
    assert trainer.outcome.reason == f"stopped by {signal.Signals(number).name}"
    assert verify_manifest(tmp_path / "out" / "checkpoint-2")["resumable"] is True
    assert handlers_now() == handlers


def test_a_second_signal_stops_at_once(make_trainer: MakeTrainer, tmp_path: Path, handlers: dict[int, Any]) -> None:
    trainer = make_trainer(max_steps=5)
    trainer.add_callback(Sender(signal.SIGINT, signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.state.global_step == 1
    assert not list((tmp_path / "out").glob("checkpoint-*"))
    assert handlers_now() == handlers, "the caller gets its Ctrl-C back"


def test_an_error_gives_the_signals_back(make_trainer: MakeTrainer, handlers: dict[int, Any]) -> None:
    class Fails(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            raise RuntimeError("planted")

    trainer = make_trainer(max_steps=5)
    trainer.add_callback(Fails())
    with pytest.raises(RuntimeError, match="planted"):
        trainer.train()
    assert handlers_now() == handlers


def test_a_stopped_trainer_can_train_again(make_trainer: MakeTrainer, handlers: dict[int, Any]) -> None:
    trainer: Any = make_trainer(max_steps=4, save_strategy="no")
    sender = Sender(signal.SIGTERM)
    trainer.add_callback(sender)
    assert trainer.train().global_step == 2
    trainer.remove_callback(sender)
    assert trainer.train().global_step == 4
    assert trainer.outcome.reason == "finished"


def test_a_signal_at_the_last_step_changes_nothing(make_trainer: MakeTrainer, handlers: dict[int, Any]) -> None:
    trainer: Any = make_trainer(max_steps=2, save_strategy="no")
    trainer.add_callback(Sender(signal.SIGTERM))
    assert trainer.train().global_step == 2
    assert trainer.outcome.reason == "finished"


class Impatient(io.StringIO):
    """Sends Ctrl-C as soon as the first progress line is written."""

    def write(self, text: str) -> int:
        if "step 1/" in text:
            os.kill(os.getpid(), signal.SIGINT)
        return super().write(text)


def test_an_interrupted_run_is_continued_by_itself(
    make_config: MakeConfig, tmp_path: Path, handlers: dict[int, Any]
) -> None:
    """Ctrl-C in a whole run: no export; the same command again ends as the uninterrupted run does, bit for bit."""
    keys = {"max_steps": 5, "logging_steps": 3, "adapter": "lora", "lora_target_linear": True, "lora_dropout": 0.1}
    straight = make_config(output_dir=str(tmp_path / "straight"), **keys)
    interrupted = make_config(output_dir=str(tmp_path / "interrupted"), **keys)
    run.train(straight)

    run.train(interrupted, console=Console(file=Impatient(), width=200))
    folder = tmp_path / "interrupted"
    assert json.loads((folder / "run.json").read_text())["status"] == "interrupted"
    assert not (folder / "adapter_model.safetensors").exists()
    console = Console(file=io.StringIO(), width=200)
    run.train(interrupted, console=console)
    assert "from checkpoint-2" in console.file.getvalue()  # type: ignore[attr-defined]
    assert json.loads((folder / "run.json").read_text())["status"] == "finished"
    exports = [path / "adapter_model.safetensors" for path in (folder, tmp_path / "straight")]
    assert exports[0].read_bytes() == exports[1].read_bytes()
    compared = ("step", "loss", "grad_norm", "learning_rate", "epoch", "tokens")
    rows = [
        [{name: row[name] for name in compared} for row in metrics(path) if "loss" in row]
        for path in (folder, tmp_path / "straight")
    ]
    assert rows[0] == rows[1]
    summaries = [json.loads((path / "summary.json").read_text()) for path in (folder, tmp_path / "straight")]
    assert summaries[0]["training_loss"] == summaries[1]["training_loss"]


# ---- start checks --------------------------------------------------------------------------------------------------


def test_a_tensor_that_is_not_updated_ends_the_run(make_trainer: MakeTrainer) -> None:
    """An optimizer that forgot half of the adapter."""
    trainer: Any = make_trainer(model=model_of("foreign peft"), max_steps=5)
    build = trainer.parts.optimizer

    def forgetful(model: nn.Module) -> Any:
        optimizer = build(model)
        for group in optimizer.param_groups:
            group["params"] = group["params"][::2]
        return optimizer

    trainer.parts.optimizer = forgetful
    with pytest.raises(PromiseBroken, match=r"trained tensors .*lora_B"):
        trainer.train()
    assert trainer.state.global_step == 3


def test_a_frozen_tensor_that_changes_ends_the_run(make_trainer: MakeTrainer) -> None:
    class Spoils(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            with torch.no_grad():
                model.get_base_model().lm_head.weight[3, 3] += 1e-3

    trainer = make_trainer(model=model_of("foreign peft"), max_steps=5)
    trainer.add_callback(Spoils())
    with pytest.raises(PromiseBroken, match=r"frozen tensors changed: .*lm_head"):
        trainer.train()


def test_the_audit_of_a_sound_run_is_on_record(make_trainer: MakeTrainer) -> None:
    trainer: Any = make_trainer(model=model_of("foreign peft"), max_steps=3)
    trainer.train()
    (audit,) = [promise for promise in trainer.outcome.promises if promise.promise == "trained tensors"]
    assert audit.status == "pass"
    assert audit.numbers["trainable"] == 12
    assert audit.numbers["frozen"] == 21


@pytest.mark.parametrize("optimizer", ["schedule_free_radam", "adopt_adamw"])
def test_an_optimizer_that_starts_silently_is_no_fault(optimizer: str, make_trainer: MakeTrainer) -> None:
    trainer: Any = make_trainer(max_steps=9, optimizer=optimizer, warmup_steps=1, lr_scheduler="constant_with_warmup")
    trainer.train()
    (audit,) = [promise for promise in trainer.outcome.promises if promise.promise == "trained tensors"]
    assert audit.status == "pass"


def test_a_warm_up_too_small_for_large_weights_is_no_fault(make_trainer: MakeTrainer) -> None:
    """At 1e-7 a norm weight of 7 does not change in fp32: the audit looks again when the warm-up is over."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.norm.weight.fill_(7.0)
    keys = {"learning_rate": 1e-5, "lr_scheduler": "constant_with_warmup", "warmup_steps": 100}
    trainer: Any = make_trainer(model=model, max_steps=3, save_strategy="no", **keys)
    trainer.train()
    assert torch.equal(model.model.norm.weight, torch.full((32,), 7.0))
    assert not [promise for promise in trainer.outcome.promises if promise.promise == "trained tensors"]

    keys = {**keys, "learning_rate": 1e-3, "warmup_steps": 4}
    trainer = make_trainer(model=model, max_steps=8, save_strategy="no", **keys)
    trainer.train()
    (audit,) = [promise for promise in trainer.outcome.promises if promise.promise == "trained tensors"]
    assert audit.status == "pass"


def test_a_tensor_without_gradients_is_found_during_the_warm_up(make_trainer: MakeTrainer) -> None:
    trainer: Any = make_trainer(model=model_of("foreign peft"), max_steps=500, warmup_steps=100, save_strategy="no")
    switched_off = trainer.model.get_submodule("base_model.model.model.layers.1.self_attn.q_proj")
    switched_off.enable_adapters(False)
    for name, parameter in switched_off.named_parameters():
        parameter.requires_grad_("lora_" in name)
    with pytest.raises(PromiseBroken, match=r"did not change: .*layers\.1\.self_attn\.q_proj\.lora_A"):
        trainer.train()
    assert trainer.state.global_step == 3


# ---- progress line -------------------------------------------------------------------------------------------------


def printed(trainer_of: Any, *, terminal: bool) -> str:
    out = io.StringIO()
    trainer: EftTrainer = trainer_of(Console(file=out, force_terminal=terminal, width=200, color_system=None))
    trainer.train()
    return out.getvalue()


def test_progress_in_a_log_file(make_trainer: MakeTrainer) -> None:
    """Sparse whole lines: the first step, every evaluation, the last step."""
    keys = {"max_steps": 4, "val_set_size": 0.1, "eval_steps": 2}
    text = printed(lambda console: make_trainer(evals=HELD_OUT, console=console, **keys), terminal=False)
    assert "\r" not in text
    lines = text.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 1/4", "step 2", "step 4/4", "step 4"]
    for part in ("epoch 0.", "loss ", "lr 1.00e-02", "tokens/s", " left"):
        assert part in lines[0]
    assert "held-out loss " in lines[1]
    assert "0:00 left" in lines[2]


def test_progress_on_a_terminal(make_trainer: MakeTrainer) -> None:
    text = printed(lambda console: make_trainer(console=console, max_steps=3), terminal=True)
    drawn = text.split("\r\x1b[2K")[1:]
    assert [part.split("  ")[0] for part in drawn] == ["step 1/3", "step 2/3", "step 3/3"]
    assert text.count("\n") == 1, "redrawn in place, the last one stays"


def test_progress_of_a_run_that_stops_early_ends_its_line(make_trainer: MakeTrainer) -> None:
    keys = {"max_steps": 9, "loss_watchdog_threshold": 0.1, "loss_watchdog_patience": 1}
    assert printed(lambda console: make_trainer(console=console, **keys), terminal=True).endswith("left\n")


# ---- trackers ------------------------------------------------------------------------------------------------------


def test_tensorboard(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = make_trainer(evals=HELD_OUT, max_steps=3, val_set_size=0.1, eval_steps=3, use_tensorboard=True)
    trainer.train()
    (file,) = (tmp_path / "out" / "runs").rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file))
    events.Reload()
    losses = {row["step"]: row["loss"] for row in trainer.state.log_history if "loss" in row}
    assert {event.step: event.value for event in events.Scalars("train/loss")} == pytest.approx(losses)
    assert [event.step for event in events.Scalars("eval/loss")] == [3]
    assert "train/learning_rate" in events.Tags()["scalars"]


def test_mlflow(make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_ALLOW_FILE_STORE"):
        monkeypatch.setenv(name, "")  # so that what the run sets is taken back afterwards
    uri = (tmp_path / "mlruns").as_uri()
    keys = {"use_mlflow": True, "mlflow_tracking_uri": uri, "mlflow_experiment_name": "tiny", "mlflow_run_name": "one"}
    _, _, trainer = run.train(make_config(max_steps=3, **keys))
    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name("tiny")
    (record,) = client.search_runs([experiment.experiment_id])
    assert record.info.run_name == "one"
    history = {entry.step: entry.value for entry in client.get_metric_history(record.info.run_id, "loss")}
    assert history == {row["step"]: row["loss"] for row in trainer.state.log_history if "loss" in row}
