"""E2 through the real trainer: the loss and gradients of an optimizer step do not depend on how the step is cut up."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from torch import Tensor
from transformers import TrainerCallback

from eft.core.constants import IGNORE_INDEX
from eft.trainer.trainer import EftTrainer
from tests.functional.conftest import MakeTrainer
from tests.functional.reference import (
    MODELS,
    Row,
    assert_gradients_equal,
    gradients_of,
    masked,
    model_of,
    plain_step,
    record_samples,
    token_rows,
)

GLOBAL_BATCH = 8


@dataclass
class GradientTap(TrainerCallback):
    """Copies the gradients that the optimizer is about to use."""

    steps: list[dict[str, Tensor]] = field(default_factory=list)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.steps.append(gradients_of(model))


def train_one_step(trainer: EftTrainer) -> tuple[float, dict[str, Tensor]]:
    """The logged loss and the gradients of a run of one step."""
    tap = GradientTap()
    trainer.add_callback(tap)
    trainer.train()
    (row,) = [row for row in trainer.state.log_history if "loss" in row]
    (gradients,) = tap.steps
    return row["loss"], gradients


def cut(micro_batch_size: int, accumulation: int, *, packed: bool) -> dict[str, Any]:
    """Config keys for one step of up to eight bins."""
    assert micro_batch_size * accumulation == GLOBAL_BATCH
    return {
        "micro_batch_size": micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "sample_packing": packed,
        "sequence_len": 40,
        "max_steps": 1,
        "max_grad_norm": 0.0,
        "save_strategy": "no",
    }


CUTS = [
    pytest.param(cut(micro, GLOBAL_BATCH // micro, packed=packed), id=f"micro {micro}, {'packed' if packed else 'one'}")
    for micro in (1, 2, 4, 8)
    for packed in (True, False)
]


def check(make_trainer: MakeTrainer, name: str, rows: list[Row], keys: dict[str, Any]) -> list[list[int]]:
    """Train one step over all rows and compare; returns the rows of each micro-batch."""
    trainer = make_trainer(rows, model=model_of(name), **keys)
    recorder = record_samples(trainer, rows)
    loss, gradients = train_one_step(trainer)
    assert recorder.steps(keys["gradient_accumulation_steps"]) == [list(range(len(rows)))]
    expected_loss, expected = plain_step(model_of(name), rows)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert_gradients_equal(gradients, expected)
    return recorder.micro_batches


@pytest.mark.parametrize("keys", CUTS)
def test_step_is_the_same_however_it_is_cut(keys: dict[str, Any], make_trainer: MakeTrainer) -> None:
    """Accumulation 8, 4, 2, 1 of the same eight uneven rows, packed and not."""
    rows = token_rows(8, longest=38, seed=2)
    micro_batches = check(make_trainer, "llama", rows, keys)
    counts = [sum(label != IGNORE_INDEX for label in row["labels"]) for row in rows]
    trained = [sum(counts[number] for number in ids) for ids in micro_batches]
    assert len(set(trained)) > 1 or len(trained) == 1, "of equal micro-batches a wrong mean would be right"


@pytest.mark.parametrize("keys", CUTS[2:4])
@pytest.mark.parametrize("name", MODELS[1:])
def test_step_is_the_same_in_every_family(name: str, keys: dict[str, Any], make_trainer: MakeTrainer) -> None:
    check(make_trainer, name, token_rows(8, longest=38), keys)


@pytest.mark.parametrize("keys", [CUTS[1], CUTS[2]])
@pytest.mark.parametrize("name", MODELS)
def test_a_fully_masked_micro_batch_counts_nothing(name: str, keys: dict[str, Any], make_trainer: MakeTrainer) -> None:
    rows = token_rows(8, longest=38)
    rows[3] = masked(rows[3])
    micro_batches = check(make_trainer, name, rows, keys)
    assert keys["sample_packing"] or [3] in micro_batches


@pytest.mark.parametrize("keys", [CUTS[1], CUTS[4], CUTS[5]])
def test_token_weights(keys: dict[str, Any], make_trainer: MakeTrainer) -> None:
    check(make_trainer, "llama", token_rows(8, longest=38, weighted=True), keys)


@pytest.mark.parametrize("name", ["bloom", "mamba2"])
def test_padded_rows_of_a_family_without_boundaries(name: str, make_trainer: MakeTrainer) -> None:
    """A model that cannot be told where a document ends: its rows are padded, and the loss is the same."""
    for keys in (cut(1, 8, packed=False), cut(4, 2, packed=False)):
        rows = token_rows(8, longest=38)
        trainer = make_trainer(rows, model=model_of(name), **keys)
        assert trainer.parts.forward.support.mode == "refused"
        loss, gradients = train_one_step(trainer)
        expected_loss, expected = plain_step(model_of(name), rows)
        assert loss == pytest.approx(expected_loss, rel=1e-6)
        assert_gradients_equal(gradients, expected)


def test_short_last_step_of_an_epoch(make_trainer: MakeTrainer) -> None:
    """Ten rows, eight a step: the second step has two rows and six dummies, and its loss is the mean of the two."""
    rows = token_rows(10, longest=38)
    keys = {**cut(2, 4, packed=False), "max_steps": 2, "learning_rate": 1e-30}
    trainer = make_trainer(rows, model=model_of("llama"), **keys)
    recorder, tap = record_samples(trainer, rows), GradientTap()
    trainer.add_callback(tap)
    trainer.train()
    logged = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    steps = recorder.steps(4)
    assert [len(step) for step in steps] == [8, 2]
    assert sorted(steps[0] + steps[1]) == list(range(10))
    for ids, loss, gradients in zip(steps, logged, tap.steps, strict=True):
        expected_loss, expected = plain_step(model_of("llama"), [rows[number] for number in ids])
        assert loss == pytest.approx(expected_loss, rel=1e-6)
        assert_gradients_equal(gradients, expected)
