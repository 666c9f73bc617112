"""E3 in one process: a run that was stopped at any step and continued by a new trainer is the uninterrupted run."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback

from eft.config.root import TrainConfig
from eft.core.errors import CheckpointError
from eft.models.adapters import apply_adapter
from eft.runtime.rng import capture_rng
from eft.trainer.trainer import EftTrainer
from tests.functional.conftest import MakeConfig, MakeTrainer
from tests.functional.reference import Row, record_samples, token_rows
from tests.tiny_models import tiny_model

LORA = {"adapter": "lora", "lora_r": 2, "lora_target_linear": True, "lora_dropout": 0.1}
ROWS = token_rows(14)
HELD_OUT = token_rows(4, seed=9)


class StopAt(TrainerCallback):
    """Saves and stops after a step, as a signal does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True
        return control


@dataclass
class Result:
    """All that two runs must agree in."""

    rows: list[dict[str, float]]
    training_loss: float
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor | float]
    generators: tuple[dict[str, Any], dict[str, Tensor]]
    samples: list[list[int]]
    """Rows of each step of this call, not of the one before it."""
    step: int
    reason: str


COMPARED = ("step", "epoch", "loss", "grad_norm", "learning_rate", "eval_loss", "tokens", "trained_tokens")


def result_of(trainer: EftTrainer, output: Any, samples: list[list[int]]) -> Result:
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    state = trainer.plain_optimizer().state
    generators = capture_rng()
    history = [row for row in trainer.state.log_history if "loss" in row or "eval_loss" in row]
    return Result(
        rows=[{name: row[name] for name in COMPARED if name in row} for row in history],
        training_loss=output.training_loss,
        weights={name: value.clone() for name, value in trainer.model.state_dict().items()},
        optimizer={f"{names[id(p)]} {key}": value for p, values in state.items() for key, value in values.items()},
        generators=(generators.plain, generators.tensors),
        samples=samples,
        step=output.global_step,
        reason=trainer.outcome.reason,
    )


def assert_same(resumed: Result, straight: Result) -> None:
    assert resumed.rows == straight.rows
    assert resumed.training_loss == straight.training_loss
    assert resumed.step == straight.step
    assert_same_tensors(resumed.weights, straight.weights)
    assert_same_tensors(resumed.optimizer, straight.optimizer)
    assert resumed.generators[0] == straight.generators[0]
    assert_same_tensors(resumed.generators[1], straight.generators[1])


def assert_same_tensors(measured: dict[str, Any], expected: dict[str, Any]) -> None:
    assert measured.keys() == expected.keys()
    for name, value in expected.items():
        same = torch.equal(measured[name], value) if isinstance(value, Tensor) else measured[name] == value
        assert same, name


Train = Callable[..., Result]


@pytest.fixture
def train(make_config: MakeConfig, make_trainer: MakeTrainer, tmp_path: Path) -> Train:
    """One call of `train()` by a new trainer over a new model.

    `stop`: save and stop after this step. `resume`: the step to continue from, out of the same folder.
    """

    def run(
        folder: str,
        *,
        stop: int | None = None,
        resume: int | None = None,
        rows: list[Row] = ROWS,
        evals: Any = None,
        prepare: Callable[[EftTrainer], None] | None = None,
        **keys: Any,
    ) -> Result:
        # What the caller's generators hold must not matter.
        torch.manual_seed(resume or 77)
        random.seed(resume)
        np.random.seed(resume)
        config = make_config(**{"output_dir": str(tmp_path / folder), "save_strategy": "no", **keys})
        if stop is not None and config.save_strategy == "no":
            config = replace_key(config, save_strategy="steps", save_steps=1000)
        trainer = make_trainer(rows, evals, model=adapted_model(config), config=config)
        if prepare is not None:
            prepare(trainer)
        if stop is not None:
            trainer.add_callback(StopAt(stop))
        recorder = record_samples(trainer, [*rows, *(evals or [])])
        checkpoint = None if resume is None else str(tmp_path / folder / f"checkpoint-{resume}")
        output = trainer.train(resume_from_checkpoint=checkpoint)
        steps = recorder.steps(trainer.args.gradient_accumulation_steps) if evals is None else []
        return result_of(trainer, output, steps)

    return run


def adapted_model(config: TrainConfig) -> Any:
    return apply_adapter(tiny_model("llama", attention_dropout=0.1), config, seed=config.seed)


def replace_key(config: TrainConfig, **keys: Any) -> TrainConfig:
    return config.model_copy(update=keys)


def check_every_stop(train: Train, *, steps: int, stops: Sequence[int] = (), **keys: Any) -> Result:
    """Interrupt at every step, or at `stops`; returns the straight run."""
    straight = train("straight", **keys)
    assert straight.step == steps
    for stop in stops or range(1, steps):
        first = train(f"stop-{stop}", stop=stop, **keys)
        assert first.step == stop
        second = train(f"stop-{stop}", resume=stop, **keys)
        assert first.samples + second.samples == straight.samples
        assert_same(second, straight)
    return straight


def test_packing_lora_and_dropout(train: Train) -> None:
    """Two epochs of an odd number of steps, every stop: in the middle of an epoch and at its end."""
    straight = check_every_stop(train, steps=6, num_epochs=2, max_grad_norm=0.5, **LORA)
    ends = [row["step"] for row in straight.rows if row["epoch"] in (1.0, 2.0)]
    assert ends == [3, 6]
    assert [sorted(sum(straight.samples[i : i + 3], [])) for i in (0, 3)] == [list(range(14))] * 2


def test_dropout_is_drawn_and_would_show(train: Train) -> None:
    """Without dropout the run differs, so equality above includes the generators."""
    with_dropout = train("with", max_steps=3, **LORA)
    without = train("without", max_steps=3, **{**LORA, "lora_dropout": 0.0})
    assert with_dropout.rows != without.rows


def test_full_fine_tuning_with_weight_decay(train: Train) -> None:
    check_every_stop(train, steps=3, max_steps=3, weight_decay=0.1, adam_beta2=0.95)


def test_open_logging_window(train: Train) -> None:
    """Logged at steps 1, 3, 6, 7: a stop in between keeps the losses of the window that is still open."""
    straight = check_every_stop(train, steps=7, stops=(1, 2, 4, 5), max_steps=7, logging_steps=3, **LORA)
    assert [row["step"] for row in straight.rows] == [1, 3, 6, 7]


@pytest.mark.parametrize(
    ("optimizer", "steps", "stops"), [("schedule_free_adamw", 5, ()), ("schedule_free_radam", 9, (4, 7, 8))]
)
def test_schedule_free(train: Train, optimizer: str, steps: int, stops: Sequence[int]) -> None:
    """With evaluations on averaged weights in between, which must leave the training iterate alone.

    RAdam's first five steps move nothing, which is no reason for the start checks to end the run.
    """
    keys = {"optimizer": optimizer, "evals": HELD_OUT, "val_set_size": 0.1, "eval_steps": 2, "eval_strategy": "steps"}
    straight = check_every_stop(train, steps=steps, stops=stops, max_steps=steps, warmup_steps=2, **keys)
    assert [row["step"] for row in straight.rows if "eval_loss" in row] == [*range(2, steps, 2), steps]
    never_evaluated = train("alone", max_steps=steps, warmup_steps=2, optimizer=optimizer)
    assert_same_tensors(straight.weights, never_evaluated.weights)
    assert_same_tensors(straight.optimizer, never_evaluated.optimizer)


def test_early_stopping_counts_on(train: Train) -> None:
    """Held-out random rows only get worse: the run ends after the same evaluation, wherever it was interrupted."""
    keys = {
        "evals": HELD_OUT,
        "val_set_size": 0.1,
        "eval_steps": 1,
        "early_stopping_patience": 3,
        "learning_rate": 0.1,
        "lr_scheduler": "constant",
        "max_steps": 20,
    }
    straight = train("straight", **keys, save_strategy="steps", save_steps=1000)
    assert 4 <= straight.step < 20
    assert "early stopping" in straight.reason
    for stop in range(straight.step - 2, straight.step):
        train(f"stop-{stop}", stop=stop, **keys)
        resumed = train(f"stop-{stop}", resume=stop, **keys, save_strategy="steps", save_steps=1000)
        assert_same(resumed, straight)
        assert resumed.reason == straight.reason


def test_other_micro_batches_of_the_same_global_batch(train: Train) -> None:
    """One bin at a time, four times, continued with four at once: the same samples a step, losses within E2."""
    keys = {"max_steps": 5, "num_epochs": 2, "learning_rate": 1e-3}
    four, one = {"gradient_accumulation_steps": 4}, {"micro_batch_size": 4, "gradient_accumulation_steps": 1}
    model_without_dropout = {"prepare": no_dropout}
    straight = train("straight", **keys, **four, **model_without_dropout)
    first = train("stop", stop=2, **keys, **four, **model_without_dropout)
    second = train("stop", resume=2, **keys, **one, **model_without_dropout)
    assert first.samples + second.samples == straight.samples
    assert second.rows[:2] == straight.rows[:2]
    for row, expected in zip(second.rows[2:], straight.rows[2:], strict=True):
        assert row["learning_rate"] == expected["learning_rate"]
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)


def no_dropout(trainer: EftTrainer) -> None:
    for module in trainer.model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0


def test_resuming_a_finished_run_trains_nothing(train: Train) -> None:
    straight = train("run", max_steps=3, save_strategy="steps", save_steps=3)
    again = train("run", resume=3, max_steps=3, save_strategy="steps", save_steps=3)
    assert again.samples == []
    assert again.training_loss == straight.training_loss
    assert_same_tensors(again.weights, straight.weights)


def test_a_checkpoint_of_other_data_is_refused(train: Train) -> None:
    train("run", stop=1, max_steps=3)
    with pytest.raises(CheckpointError, match="another plan"):
        train("run", resume=1, max_steps=3, rows=token_rows(14, seed=5))


def test_a_checkpoint_without_optimizer_is_refused(train: Train) -> None:
    train("run", max_steps=3, save_strategy="steps", save_steps=1, save_only_model=True)
    with pytest.raises(CheckpointError, match="cannot be resumed"):
        train("run", resume=1, max_steps=3)
