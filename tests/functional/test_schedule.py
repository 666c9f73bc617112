"""E7 through real runs: the steps that were announced are executed, at the announced rates, saves and evaluations."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, TrainerCallback

from eft import run
from eft.config.optim import SchedulerName
from eft.optim.schedulers import learning_rates
from eft.runtime.checkpoint import CheckpointStore
from eft.trainer.flow import marks
from eft.trainer.trainer import EftTrainer
from tests.functional.conftest import MakeConfig, MakeTrainer
from tests.functional.reference import token_rows

ROWS = token_rows(10)
"""Two rows a step without packing: five steps an epoch."""
HELD_OUT = token_rows(4, seed=9)
ONE_BY_ONE: dict[str, Any] = {"sample_packing": False, "num_epochs": 2}


@dataclass
class Events(TrainerCallback):
    """The steps after which something happened, and the weights at every evaluation."""

    saves: list[int] = field(default_factory=list)
    evaluations: list[int] = field(default_factory=list)
    weights: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    rates: list[float] = field(default_factory=list)
    """The learning rate that each optimizer step runs with."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        (rate,) = {group["lr"] for group in optimizer.param_groups}
        self.rates.append(rate)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.saves.append(state.global_step)

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.evaluations.append(state.global_step)
        self.weights[state.global_step] = {name: value.clone() for name, value in model.state_dict().items()}


def events_of(trainer: EftTrainer) -> Events:
    events = Events()
    trainer.add_callback(events)
    trainer.train()
    return events


def logged(trainer: EftTrainer, name: str) -> dict[int, float]:
    """Step to the logged value."""
    return {row["step"]: row[name] for row in trainer.state.log_history if name in row}


# ---- steps (D8) ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "asked", "expected", "decided_by", "epochs"),
    [
        pytest.param({"num_epochs": 1}, None, 5, "num_epochs", [5], id="one epoch"),
        pytest.param({"num_epochs": 2}, None, 10, "num_epochs", [5, 10], id="two epochs"),
        pytest.param({"num_epochs": 1.5}, None, 8, "num_epochs", [5, 8], id="one and a half"),
        pytest.param({"num_epochs": 0.1}, None, 1, "num_epochs", [1], id="a tenth"),
        pytest.param({"num_epochs": 2}, 3, 3, "total_num_steps", [3], id="asked for fewer"),
        pytest.param({"num_epochs": 1}, 7, 7, "total_num_steps", [5, 7], id="asked for more"),
        pytest.param({"num_epochs": 1}, 0, 5, "num_epochs", [5], id="asked for nothing"),
        pytest.param({"num_epochs": 1, "max_steps": 6}, 3, 6, "max_steps", [5, 6], id="max_steps wins"),
    ],
)
def test_steps_announced_are_executed(
    keys: dict[str, Any],
    asked: int | None,
    expected: int,
    decided_by: str,
    epochs: list[int],
    make_trainer: MakeTrainer,
) -> None:
    trainer: Any = make_trainer(ROWS, total_num_steps=asked, sample_packing=False, save_strategy="no", **keys)
    plan = trainer.make_plan()
    announced = plan.summary()
    output = trainer.train()
    assert output.global_step == announced["total_steps"] == trainer.args.max_steps == expected
    assert announced["decided_by"] == decided_by
    assert plan.epoch_ends == epochs
    # The number that is executed is also the schedule's horizon.
    rates = learning_rates(trainer_config(trainer), expected)
    assert list(logged(trainer, "learning_rate").values()) == rates
    epoch = logged(trainer, "epoch")
    assert [step for step, value in epoch.items() if value == int(value)] == [end for end in epochs if end % 5 == 0]


def trainer_config(trainer: EftTrainer) -> Any:
    """The config that the builder kept."""
    return trainer.parts.scheduler.args[0]  # type: ignore[attr-defined]


def test_a_whole_run_prints_what_it_does(make_config: MakeConfig, tmp_path: Path) -> None:
    """`run.train`: the table before the first step, plan.json, metrics.jsonl, summary.json and E7 all agree."""
    tables: list[dict[str, str]] = []
    config = make_config(num_epochs=1.5, val_set_size=4, saves_per_epoch=2)
    _, _, trainer = run.train(config, on_start=lambda rows, meta: tables.append(dict(rows)))
    out = tmp_path / "out"
    plan = json.loads((out / "plan.json").read_text())
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [row for row in metrics if "loss" in row]
    steps = plan["total_steps"]
    assert trainer.state.global_step == steps == len(losses) == json.loads((out / "summary.json").read_text())["steps"]
    assert tables[0]["steps"] == str(steps)
    assert [row["learning_rate"] for row in losses] == learning_rates(config, steps)
    saved = sorted(int(path.name.split("-")[1]) for path in out.glob("checkpoint-*"))
    assert tables[0]["checkpoints"] == "after step " + ", ".join(map(str, saved))
    evaluated = [row["step"] for row in metrics if "eval_loss" in row]
    assert tables[0]["evaluations"] == "after step " + ", ".join(map(str, evaluated))
    promises = json.loads((out / "promises.json").read_text())
    assert [promise["status"] for promise in promises if promise["promise"] == "E7"] == ["pass"]


# ---- learning rates ------------------------------------------------------------------------------------------------

NEEDED: dict[str, dict[str, Any]] = {
    "cosine_with_min_lr": {"cosine_min_lr_ratio": 0.1},
    "cosine_warmup_with_min_lr": {"cosine_min_lr_ratio": 0.1},
    "warmup_stable_decay": {"lr_scheduler_kwargs": {"num_decay_steps": 2}},
}
VARIANTS = [(name, NEEDED.get(name, {})) for name in get_args(SchedulerName)] + [
    ("cosine", {"cosine_min_lr_ratio": 0.1, "cosine_constant_lr_ratio": 0.7}),
    ("cosine", {"lr_quadratic_warmup": True, "warmup_steps": 3}),
    ("rex", {"cosine_min_lr_ratio": 0.2}),
    ("one_cycle", {"lr_scheduler_kwargs": {"anneal_strategy": "linear"}, "warmup_ratio": 0.5}),
]


@pytest.mark.parametrize(("name", "keys"), VARIANTS, ids=[f"{name} {' '.join(keys)}" for name, keys in VARIANTS])
def test_learning_rates_are_the_closed_form(name: str, keys: dict[str, Any], make_trainer: MakeTrainer) -> None:
    if name != "constant" and "warmup_ratio" not in keys:
        keys = {"warmup_steps": 2, **keys}
    trainer = make_trainer(lr_scheduler=name, max_steps=6, save_strategy="no", weight_decay=0.1, **keys)
    events = events_of(trainer)
    expected = learning_rates(trainer_config(trainer), 6)
    assert events.rates == expected
    assert list(logged(trainer, "learning_rate").values()) == expected
    assert max(expected) == 1e-2
    assert name == "constant" or len(set(expected)) > 1


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("name", get_args(SchedulerName))
def test_accumulation_does_not_enter_the_schedule(name: str, accumulation: int, make_trainer: MakeTrainer) -> None:
    keys = {"jagged_restart_steps": 3, "jagged_restart_warmup_steps": 1, **NEEDED.get(name, {})}
    if name != "constant":
        keys["warmup_steps"] = 2
    trainer = make_trainer(
        lr_scheduler=name, max_steps=5, save_strategy="no", gradient_accumulation_steps=accumulation, **keys
    )
    assert events_of(trainer).rates == learning_rates(trainer_config(trainer), 5)


# ---- evaluations and saves -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "evaluations", "saves"),
    [
        pytest.param({}, [5, 10], [5, 10], id="defaults: every epoch"),
        pytest.param({"max_steps": 7}, [5, 7], [5, 7], id="the end of a run cut short"),
        pytest.param({"num_epochs": 1.5}, [5, 8], [5, 8], id="the end of part of an epoch"),
        pytest.param({"save_steps": 3}, [5, 10], [3, 6, 9, 10], id="save_steps"),
        pytest.param({"save_steps": 0.3}, [5, 10], [3, 6, 9, 10], id="save_steps as a share"),
        pytest.param({"saves_per_epoch": 2}, [5, 10], [3, 5, 8, 10], id="saves_per_epoch"),
        pytest.param({"save_strategy": "epoch"}, [5, 10], [5, 10], id="save_strategy epoch"),
        pytest.param({"save_strategy": "no"}, [5, 10], [], id="save_strategy no"),
        pytest.param({"save_first_step": True}, [5, 10], [1, 5, 10], id="save_first_step"),
        pytest.param({"eval_steps": 4}, [4, 8, 10], [5, 10], id="eval_steps"),
        pytest.param({"eval_steps": 0.5, "save_steps": 4}, [5, 10], [4, 8, 10], id="eval_steps as a share"),
        pytest.param({"evals_per_epoch": 2}, [3, 5, 8, 10], [5, 10], id="evals_per_epoch"),
        pytest.param({"eval_strategy": "no"}, [], [5, 10], id="eval_strategy no"),
        pytest.param({"eval_on_start": True}, [0, 5, 10], [5, 10], id="eval_on_start"),
        pytest.param({"logging_steps": 4}, [5, 10], [5, 10], id="logging_steps"),
    ],
)
def test_evaluations_and_saves(
    keys: dict[str, Any], evaluations: list[int], saves: list[int], make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    keys = {**ONE_BY_ONE, "save_total_limit": 0, "val_set_size": 0.1, **keys}
    trainer = make_trainer(ROWS, HELD_OUT, **keys)
    events = events_of(trainer)
    assert events.evaluations == evaluations
    assert list(logged(trainer, "eval_loss")) == evaluations
    assert events.saves == saves
    store = CheckpointStore(tmp_path / "out", save_total_limit=None)
    assert store.steps() == saves
    assert trainer.flow.save_at == set(saves)
    assert trainer.flow.evaluate_at == set(evaluations) - {0}
    every, last = keys.get("logging_steps", 1), trainer.args.max_steps
    assert list(logged(trainer, "loss")) == [s for s in range(1, last + 1) if s in (1, last) or s % every == 0]


def test_shares_of_the_steps_are_decimal() -> None:
    """0.07 × 100 is above 7 in binary."""
    assert min(marks(0.07, None, [100], 100)) == 7


def test_no_held_out_data_no_evaluation(make_trainer: MakeTrainer) -> None:
    assert events_of(make_trainer(ROWS, **ONE_BY_ONE)).evaluations == []


def test_several_held_out_sets(make_trainer: MakeTrainer) -> None:
    evals = {"near": token_rows(2, seed=1), "far": token_rows(3, seed=2)}
    keys = {"early_stopping_patience": 2, "eval_steps": 1, "lr_scheduler": "constant", "learning_rate": 0.1}
    trainer = make_trainer(ROWS, evals, sample_packing=False, max_steps=12, val_set_size=0.1, save_steps=12, **keys)
    trainer.train()
    near, far, both = (logged(trainer, name) for name in ("eval_near_loss", "eval_far_loss", "eval_loss"))
    weights = [sum(label >= 0 for row in rows for label in row["labels"][1:]) for rows in evals.values()]
    for step, loss in both.items():
        assert loss == pytest.approx((weights[0] * near[step] + weights[1] * far[step]) / sum(weights), rel=1e-12)
    best = min(both, key=both.__getitem__)
    assert trainer.state.best_global_step == best
    assert trainer.state.global_step == max(both) == best + 2 < 12, "early stopping goes by the loss over both"


# ---- the best model ------------------------------------------------------------------------------------------------

OVERFITTING: dict[str, Any] = {**ONE_BY_ONE, "eval_steps": 1, "val_set_size": 0.1, "lr_scheduler": "constant"}


def overfitting_run(make_trainer: MakeTrainer, **keys: Any) -> tuple[EftTrainer, Events, int]:
    """A run whose held-out loss falls and then rises; also the step where it is lowest."""
    trainer = make_trainer(ROWS, HELD_OUT, **{**OVERFITTING, **keys})
    events = events_of(trainer)
    losses = logged(trainer, "eval_loss")
    best = min(losses, key=losses.__getitem__)
    assert 1 < best < max(losses), losses
    assert trainer.state.best_global_step == best
    assert trainer.state.best_metric == losses[best]
    return trainer, events, best


def test_the_best_checkpoint_is_kept(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    """Beyond `save_total_limit: 1`, besides the newest."""
    _, events, best = overfitting_run(make_trainer, save_steps=1, save_total_limit=1)
    assert events.saves == list(range(1, 11))
    assert CheckpointStore(tmp_path / "out", save_total_limit=None).steps() == [best, 10]


def test_save_total_limit(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    events_of(make_trainer(ROWS, **ONE_BY_ONE, save_steps=2, save_total_limit=2))
    assert CheckpointStore(tmp_path / "out", save_total_limit=None).steps() == [8, 10]


def test_save_strategy_best(make_trainer: MakeTrainer) -> None:
    """A checkpoint wherever the metric is better than ever before, and at the end."""
    trainer, events, _ = overfitting_run(make_trainer, save_strategy="best", save_total_limit=0)
    assert trainer.flow.save_at == {10}
    losses = logged(trainer, "eval_loss")
    records = [step for step, loss in losses.items() if all(loss < losses[s] for s in losses if s < step)]
    assert events.saves == sorted({*records, 10})


@pytest.mark.parametrize("optimizer", ["adamw_torch", "schedule_free_adamw"])
def test_load_best_model_at_end(optimizer: str, make_trainer: MakeTrainer) -> None:
    """What is exported is what was evaluated at the best step, also where that is an average of what was trained."""
    keys = {} if optimizer == "adamw_torch" else {"lr_scheduler": "constant_with_warmup", "learning_rate": 0.03}
    trainer, events, best = overfitting_run(
        make_trainer, load_best_model_at_end=True, save_steps=5, optimizer=optimizer, **keys
    )
    assert set(events.saves) >= {best, 5, 10}
    with trainer.parts.evaluation_weights(trainer.plain_optimizer()):
        again = trainer.evaluate()
    assert again["eval_loss"] == logged(trainer, "eval_loss")[best]
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, events.weights[best][name]), name


def test_a_run_exports_the_best_weights(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(
        num_epochs=8, val_set_size=4, load_best_model_at_end=True, learning_rate=0.03, lr_scheduler="constant"
    )
    _, _, trainer = run.train(config)
    losses = logged(trainer, "eval_loss")
    best = min(losses, key=losses.__getitem__)
    assert best < max(losses), losses
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    checkpoint = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / f"checkpoint-{best}").state_dict()
    last = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / f"checkpoint-{max(losses)}").state_dict()
    assert all(torch.equal(exported[name], checkpoint[name]) for name in checkpoint)
    assert not all(torch.equal(exported[name], last[name]) for name in last)
