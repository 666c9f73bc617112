"""The watchdog in a training: updates left out, returns to a checkpoint, runs that end; each exact (D16)."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from eft import run
from eft.builder import HFCausalTrainerBuilder
from eft.core.errors import ConfigError
from eft.runtime.watchdog import LeftOut
from eft.trainer.trainer import EftTrainer
from tests.functional.conftest import MakeConfig, MakeTrainer
from tests.functional.reference import model_of

NAN, INF = math.nan, math.inf


class Planted(EftTrainer):
    """Multiplies the loss of some steps (1-based)."""

    factors: dict[int, float]

    def compute_loss(self, model: Any, inputs: Any, *arguments: Any, **keywords: Any) -> Any:
        return super().compute_loss(model, inputs, *arguments, **keywords) * self.factors.get(inputs["step"] + 1, 1.0)


def planted(*steps: int, factor: float = NAN) -> type[EftTrainer]:
    """A trainer whose loss is wrong at `steps`."""
    return type("Planted", (Planted,), {"factors": dict.fromkeys(steps, factor)})


class Watching(TrainerCallback):
    """Weights and optimizer state after every step."""

    def __init__(self) -> None:
        self.weights: dict[int, dict[str, torch.Tensor]] = {}
        self.states: dict[int, Any] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        self.weights[state.global_step] = {name: p.detach().clone() for name, p in model.named_parameters()}
        entries = [optimizer.state.get(p, {}) for group in optimizer.param_groups for p in group["params"]]
        groups = [{k: v for k, v in g.items() if k not in ("params", "lr")} for g in optimizer.param_groups]
        values = [{k: v.clone() if torch.is_tensor(v) else v for k, v in entry.items()} for entry in entries]
        self.states[state.global_step] = (values, groups)


def assert_same(left: Any, right: Any) -> None:
    """Equal to the last bit, through lists and dicts."""
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_same(one, other)
    elif torch.is_tensor(left):
        assert torch.equal(left, right)
    else:
        assert left == right


def watched(trainer: EftTrainer) -> Watching:
    watching = Watching()
    trainer.add_callback(watching)
    trainer.train()
    return watching


def passing_over(trainer: EftTrainer, *steps: int) -> EftTrainer:
    """A run that never sees the data of these steps."""
    trainer.parts.watchdog.left_out = [LeftOut(step, "rollback", "planted") for step in steps]
    return trainer


OPTIMIZERS = {
    "fused AdamW": {},
    "AdamW": {"optimizer": "adamw_torch", "weight_decay": 0.1},
    "SGD with momentum": {"optimizer": "sgd", "optim_args": {"momentum": 0.9}},
    "Adafactor": {"optimizer": "adafactor"},
    "Lion": {"optimizer": "lion_pytorch", "learning_rate": 1e-3},
    "ADOPT": {"optimizer": "adopt_adamw"},
    "schedule-free": {"optimizer": "schedule_free_adamw", "lr_scheduler": "constant"},
    "without clipping": {"max_grad_norm": 0.0},
    "pure bf16": {"bfloat16": True, "bf16_update": "fp32_master", "bf16": "auto"},
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_skipped_step_changes_nothing(name: str, make_trainer: MakeTrainer) -> None:
    """Neither a weight nor a state; the schedule goes on; the end is that of a run that never had the update."""
    keys = {"max_steps": 5, "save_strategy": "no", "nonfinite_action": "skip", **OPTIMIZERS[name]}
    trainer: Any = make_trainer(trainer_class=planted(3), **keys)
    seen = watched(trainer)
    assert_same(seen.weights[3], seen.weights[2])
    assert_same(seen.states[3], seen.states[2])
    assert any(not torch.equal(seen.weights[4][n], seen.weights[3][n]) for n in seen.weights[3])
    rows = [row for row in trainer.state.log_history if "loss" in row]

    other = passing_over(make_trainer(**keys), 3)
    reference = watched(other)
    assert_same(seen.weights[5], reference.weights[5])
    assert_same(seen.states[5], reference.states[5])
    expected = [row for row in other.state.log_history if "loss" in row]
    assert [row["learning_rate"] for row in rows] == [row["learning_rate"] for row in expected]
    assert [row["loss"] for row in rows if row["step"] != 3] == [row["loss"] for row in expected if row["step"] != 3]
    assert math.isnan(rows[2]["loss"])


def test_a_skip_in_a_window_of_the_log(make_trainer: MakeTrainer) -> None:
    """The mean loss of the window, and of the run, is that of the steps that were trained."""
    keys = {"max_steps": 4, "save_strategy": "no", "nonfinite_action": "skip"}
    each = make_trainer(trainer_class=planted(2, factor=INF), **keys)
    mean = each.train().training_loss
    losses = [row["loss"] for row in each.state.log_history if "loss" in row]
    assert mean == pytest.approx(sum(loss for loss in losses if math.isfinite(loss)) / 3, rel=1e-6)
    wide = make_trainer(trainer_class=planted(2, factor=INF), **keys, logging_steps=4)
    assert wide.train().training_loss == pytest.approx(mean, rel=1e-6)
    assert wide.state.log_history[-2]["loss"] == pytest.approx(sum(losses[i] for i in (2, 3)) / 2, rel=0.5)


ROLLBACKS = {
    "full": {},
    "LoRA with dropout": {"adapter": "lora", "lora_target_linear": True, "lora_dropout": 0.1},
    "schedule-free": {"optimizer": "schedule_free_adamw", "lr_scheduler": "constant"},
    "in the backward pass": {"optimizer_in_backward": True, "max_grad_norm": 0.0, "gradient_accumulation_steps": 1},
}


@pytest.mark.parametrize("name", ROLLBACKS)
def test_a_rollback_equals_a_run_that_never_saw_the_data(name: str, make_trainer: MakeTrainer, tmp_path: Path) -> None:
    def trainer_of(folder: str, **more: Any) -> Any:
        model = model_of("foreign peft") if "adapter" in ROLLBACKS[name] else None
        keys = {"max_steps": 7, "save_steps": 2, "nonfinite_action": "rollback", **ROLLBACKS[name]}
        return make_trainer(model=model, output_dir=str(tmp_path / folder), **keys, **more)

    trainer = trainer_of("rolled", trainer_class=planted(5))
    seen = watched(trainer)
    assert trainer.outcome.reason == "finished"
    assert [(entry.step, entry.how) for entry in trainer.parts.watchdog.left_out] == [(5, "rollback")]
    other = passing_over(trainer_of("reference"), 5)
    reference = watched(other)
    assert_same(seen.weights[7], reference.weights[7])
    assert_same(seen.states[7], reference.states[7])

    def rows(folder: str) -> list[Any]:
        lines = [json.loads(line) for line in (tmp_path / folder / "metrics.jsonl").read_text().splitlines()]
        names = ("step", "loss", "grad_norm", "learning_rate", "tokens")
        return [[row[name] for name in names if name in row] for row in lines]

    assert rows("rolled") == rows("reference")


def test_a_rollback_sets_the_checkpoints_of_a_spike_aside(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    keys = {"max_steps": 6, "save_steps": 1, "loss_watchdog_threshold": 100.0, "loss_watchdog_patience": 2}
    trainer: Any = make_trainer(
        trainer_class=planted(3, 4, factor=1000.0), **keys, loss_watchdog_action="rollback", save_total_limit=0
    )
    seen = watched(trainer)
    assert [entry.step for entry in trainer.parts.watchdog.left_out] == [3, 4]
    assert [path.name for path in tmp_path.glob("out/*.aside*")] == ["checkpoint-3.aside"]
    assert sorted(path.name for path in tmp_path.glob("out/checkpoint-?")) == [f"checkpoint-{n}" for n in range(1, 7)]
    reference = watched(passing_over(make_trainer(**keys, output_dir=str(tmp_path / "reference")), 3, 4))
    assert_same(seen.weights[6], reference.weights[6])


def test_a_rollback_without_a_checkpoint_ends_the_run(make_trainer: MakeTrainer) -> None:
    trainer: Any = make_trainer(trainer_class=planted(2), max_steps=5, save_steps=3, nonfinite_action="rollback")
    assert trainer.train().global_step == 2
    assert trainer.outcome.failed
    assert "no complete checkpoint lies before it" in trainer.outcome.reason


def test_by_default_the_run_stops_and_saves_nothing_bad(
    make_trainer: MakeTrainer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer: Any = make_trainer(trainer_class=planted(3), max_steps=6, save_steps=1)
    assert trainer.train().global_step == 3
    assert trainer.outcome.failed
    assert "step 3 is not finite: loss nan" in trainer.outcome.reason
    assert "Its samples: row " in caplog.text
    assert sorted(path.name for path in tmp_path.glob("out/checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]


def test_who_wants_to_may_go_on_all_the_same(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(trainer_class=planted(3), max_steps=5, save_strategy="no", nonfinite_action="ignore")
    assert trainer.train().global_step == 5


def test_skipping_does_not_go_on_for_ever(make_trainer: MakeTrainer) -> None:
    keys = {"loss_watchdog_threshold": 100.0, "loss_watchdog_patience": 2, "loss_watchdog_action": "skip"}
    trainer: Any = make_trainer(trainer_class=planted(2, 4, 5, factor=1e6), max_steps=9, save_strategy="no", **keys)
    assert trainer.train().global_step == 5
    assert [entry.step for entry in trainer.parts.watchdog.left_out] == [2, 4, 5]
    assert "2 updates in a row were left out" in trainer.outcome.reason


def test_a_resumed_run_remembers_what_was_left_out(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    keys = {"max_steps": 6, "save_steps": 4, "nonfinite_action": "skip"}
    straight: Any = make_trainer(trainer_class=planted(3, 5), **keys)
    seen = watched(straight)
    again: Any = make_trainer(trainer_class=planted(3, 5), **keys, output_dir=str(tmp_path / "again"))
    again.train(str(tmp_path / "out" / "checkpoint-4"))
    assert again.parts.watchdog.state() == straight.parts.watchdog.state()
    assert again.progress.state() == straight.progress.state()
    assert_same(dict(again.model.named_parameters()), seen.weights[6])


@pytest.mark.parametrize("action", ["skip", "rollback"])
def test_the_ledger_has_the_steps(
    action: str, make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HFCausalTrainerBuilder, "trainer_class", planted(3))
    run.train(make_config(max_steps=5, save_steps=2, nonfinite_action=action))
    ledger = json.loads((tmp_path / "out" / "ledger.json").read_text())
    (entry,) = ledger["steps_left_out"]
    assert (entry["step"], entry["how"]) == (3, action)
    assert entry["tokens"] > 0
    assert len(entry["rows"]) == len(entry["samples"]) > 0
    assert all("rows.jsonl" in row for row in entry["rows"])
    assert ledger["sources"]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["exit_reason"] == "finished"
    assert math.isfinite(summary["training_loss"])


def test_torch_masks_a_fused_update_on_the_device() -> None:
    """What `StepGuard` relies on where the host does not look: with `found_inf` set a fused step writes nothing."""
    parameter = torch.nn.Parameter(torch.ones(8))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=True)
    parameter.grad = torch.full((8,), 0.5)
    optimizer.step()
    before, state = parameter.detach().clone(), {k: v.clone() for k, v in optimizer.state[parameter].items()}
    parameter.grad = torch.full((8,), NAN)
    optimizer.grad_scale, optimizer.found_inf = None, torch.ones(())  # type: ignore[attr-defined]
    assert getattr(optimizer, "_step_supports_amp_scaling", False)
    optimizer.step()
    assert torch.equal(parameter, before)
    assert_same(optimizer.state[parameter], state)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"nonfinite_action": "skip", "optimizer_in_backward": True, "max_grad_norm": 0}, "tensor by tensor"),
        ({"nonfinite_action": "rollback", "save_strategy": "no"}, "goes back to a checkpoint"),
        (
            {"loss_watchdog_action": "rollback", "loss_watchdog_threshold": 5, "save_only_model": True},
            "with optimizer state",
        ),
        ({"nonfinite_action": "skip", "fp16": True}, "loss scaler"),
    ],
)
def test_what_cannot_be_is_refused_by_name(keys: dict[str, Any], message: str, make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(**{"gradient_accumulation_steps": 1, **keys})
