"""E3 where it is easily lost: other folders, stopped runs, weights-only checkpoints, what lies around from before."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback

from eft import inputs, run
from eft.config.load import config_from_mapping
from eft.core.errors import CheckpointError, ConfigError, DataError
from eft.runtime.checkpoint import verify_manifest
from eft.trainer.trainer import EftTrainer
from tests.functional.conftest import MakeConfig, MakeTrainer
from tests.functional.reference import token_rows

ROWS = token_rows(14)
HELD_OUT = token_rows(4, seed=9)
WORSE = {"val_set_size": 0.1, "eval_steps": 1, "learning_rate": 0.1, "lr_scheduler": "constant", "max_steps": 12}
"""Held-out random rows only get worse."""


def weights(trainer: EftTrainer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert all(torch.equal(left[name], right[name]) for name in right)


class Signal(TrainerCallback):
    """SIGTERM in the middle of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            signal.raise_signal(signal.SIGTERM)


def test_a_run_that_had_stopped_early_is_over(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    """Killed after its last checkpoint, before its export: the next start must export the same weights."""
    keys = {**WORSE, "early_stopping_patience": 3, "save_steps": 1}
    straight = make_trainer(ROWS, HELD_OUT, **keys)
    first = straight.train()
    assert first.global_step < 12
    again = make_trainer(ROWS, HELD_OUT, **keys)
    output = again.train(resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{first.global_step}"))
    assert output.global_step == first.global_step
    assert output.training_loss == first.training_loss
    assert again.outcome.reason == straight.outcome.reason
    assert "early stopping" in again.outcome.reason
    assert_equal(weights(again), weights(straight))
    assert straight.train().global_step == first.global_step, "a second training counts its patience anew"


def test_the_best_model_is_found_beside_the_resumed_checkpoint(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    keys = {**WORSE, "max_steps": 4, "save_steps": 1, "load_best_model_at_end": True}
    straight = make_trainer(ROWS, HELD_OUT, output_dir=str(tmp_path / "straight"), **keys)
    straight.train()
    assert straight.state.best_global_step == 1
    moved = tmp_path / "moved"
    (tmp_path / "straight").rename(moved)
    resumed = make_trainer(ROWS, HELD_OUT, output_dir=str(tmp_path / "other"), **keys)
    resumed.train(resume_from_checkpoint=str(moved / "checkpoint-2"))
    assert resumed.state.best_model_checkpoint == str(moved / "checkpoint-1")
    assert_equal(weights(resumed), weights(straight))
    (moved / "checkpoint-1").rename(tmp_path / "gone")
    with pytest.raises(CheckpointError, match="checkpoint-1: missing"):
        make_trainer(ROWS, HELD_OUT, output_dir=str(tmp_path / "third"), **keys).train(
            resume_from_checkpoint=str(moved / "checkpoint-2")
        )


@pytest.mark.parametrize("keys", [{"max_steps": 5}, {"max_steps": 3}])
def test_another_number_of_steps_is_refused(make_trainer: MakeTrainer, tmp_path: Path, keys: dict[str, Any]) -> None:
    make_trainer(ROWS, max_steps=4, save_steps=2).train()
    with pytest.raises(CheckpointError, match="a run of 4 steps, this one has"):
        make_trainer(ROWS, **keys).train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))


def test_resume_true_passes_over_what_cannot_be_resumed(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    out = tmp_path / "out"
    straight = make_trainer(ROWS, max_steps=4, save_steps=1)
    straight.train()
    (out / "checkpoint-4" / "optimizer.safetensors").write_bytes(b"")
    manifest = json.loads((out / "checkpoint-3" / "manifest.json").read_text())
    (out / "checkpoint-3" / "manifest.json").write_text(json.dumps({**manifest, "resumable": False}))
    again = make_trainer(ROWS, max_steps=4, save_steps=1)
    again.train(resume_from_checkpoint=True)
    assert again._initial_global_step == 2
    assert_equal(weights(again), weights(straight))
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        make_trainer(ROWS, max_steps=4, output_dir=str(tmp_path / "new")).train(resume_from_checkpoint=True)


def test_a_signal_leaves_a_full_checkpoint_also_with_save_only_model(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    keys = {"max_steps": 4, "save_steps": 1, "save_only_model": True}
    straight = make_trainer(ROWS, output_dir=str(tmp_path / "straight"), **keys)
    straight.train()
    trainer = make_trainer(ROWS, **keys)
    trainer.add_callback(Signal(2))
    assert trainer.train().global_step == 2
    resumable = [verify_manifest(tmp_path / "out" / f"checkpoint-{step}")["resumable"] for step in (1, 2)]
    assert resumable == [False, True]
    resumed = make_trainer(ROWS, **keys)
    resumed.train(resume_from_checkpoint=True)
    assert_equal(weights(resumed), weights(straight))


def test_an_earlier_trainings_checkpoint_is_not_taken_for_this_ones(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    """The same config and data, but weights that have been trained on."""
    trainer = make_trainer(ROWS, max_steps=2, save_steps=2)
    trainer.train()
    before = (tmp_path / "out" / "checkpoint-2" / "model.safetensors").read_bytes()
    trainer.train()
    assert (tmp_path / "out" / "checkpoint-2" / "model.safetensors").read_bytes() != before
    assert (tmp_path / "out" / "checkpoint-2.aside" / "model.safetensors").read_bytes() == before


def test_evaluation_at_the_start_is_of_a_fresh_start(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    keys = {"val_set_size": 0.1, "eval_on_start": True, "max_steps": 3, "eval_steps": 2, "save_steps": 1}
    make_trainer(ROWS, HELD_OUT, **keys).train()
    metrics = tmp_path / "out" / "metrics.jsonl"
    steps = [row["step"] for row in map(json.loads, metrics.read_text().splitlines()) if "eval_loss" in row]
    assert steps == [0, 2, 3]
    make_trainer(ROWS, HELD_OUT, **keys).train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
    assert [row["step"] for row in map(json.loads, metrics.read_text().splitlines()) if "eval_loss" in row] == steps
    trainer = make_trainer(ROWS, **keys)
    assert trainer.train().global_step == 3, "without held-out data nothing is evaluated"


def test_one_loss_that_is_not_finite_does_not_spoil_the_next(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(ROWS, max_steps=4, save_strategy="no", max_grad_norm=0, nonfinite_action="ignore")
    loss = trainer.parts.loss
    calls = iter(range(100))

    def once_infinite(*arguments: Any) -> Tensor:
        value = loss(*arguments)
        return value + float("inf") if next(calls) == 2 else value

    trainer.parts.loss = once_infinite
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert [math.isfinite(loss) for loss in losses] == [True, False, True, True]
    assert all("grad_norm" in row for row in trainer.state.log_history if "loss" in row)


def test_evaluating_predicting_and_saving_without_training(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = make_trainer(ROWS, HELD_OUT, max_steps=2, val_set_size=0.1)
    before = trainer.evaluate()
    assert trainer.predict(HELD_OUT).metrics["test_loss"] == before["eval_loss"]
    trainer.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "model.safetensors").is_file()
    assert trainer.train().global_step == 2
    assert trainer.evaluate()["eval_loss"] < before["eval_loss"] + 1
    with pytest.raises(DataError, match="needs held-out data"):
        make_trainer(ROWS).evaluate()


def test_schedule_free_weights_are_saved_and_answer(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    """`save_model` writes what evaluation sees, and leaves the training iterate alone (D12)."""
    trainer = make_trainer(ROWS, optimizer="schedule_free_adamw", max_steps=3, save_strategy="no")
    trainer.train()
    iterate = weights(trainer)
    with trainer.parts.evaluation_weights(trainer.optimizer):
        average = weights(trainer)
    assert not torch.equal(iterate["lm_head.weight"], average["lm_head.weight"])
    trainer.save_model(str(tmp_path / "saved"))
    saved = type(trainer.model).from_pretrained(tmp_path / "saved").state_dict()
    assert torch.equal(saved["lm_head.weight"].to(torch.float32), average["lm_head.weight"])
    assert_equal(weights(trainer), iterate)


def rerun(config: Any, **keys: Any) -> Any:
    return config_from_mapping({**config.model_dump(mode="json", exclude_unset=True), **keys})


def test_a_run_with_other_settings_is_not_resumed_by_path(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(max_steps=4, save_steps=2, lr_scheduler="cosine")
    run.train(config)
    checkpoint = str(tmp_path / "out" / "checkpoint-2")
    elsewhere = {"output_dir": str(tmp_path / "other"), "resume_from_checkpoint": checkpoint}
    with pytest.raises(CheckpointError, match=r"another config\n  lr_scheduler: 'cosine' → 'linear'"):
        run.train(rerun(config, lr_scheduler="linear", **elsewhere))
    _, _, trainer = run.train(rerun(config, **elsewhere))
    assert trainer._initial_global_step == 2
    weights_of = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "other")]
    assert weights_of[0] == weights_of[1]


def test_overwrite_does_not_delete_the_base_model(make_config: MakeConfig, tmp_path: Path) -> None:
    """Nor its own resumed checkpoint; prepared data in the folder stay, and are no stranger to it."""
    out = tmp_path / "out"
    config = make_config(max_steps=1, dataset_prepared_path=str(out / "prepared"))
    run.check_before_start(config, overwrite=False)
    run.train(config, inputs.load_datasets(config))
    keys = {"base_model": str(out), "resume_from_checkpoint": str(out / "checkpoint-1")}
    for key, value in keys.items():
        with pytest.raises(ConfigError, match=f"{key} .*lies in output_dir"):
            run.check_before_start(rerun(config, **{key: value}), overwrite=True)
        with pytest.raises(ConfigError, match=f"{key} .*lies in output_dir"):
            run.train(rerun(config, **{key: value}), overwrite=True)
    assert (out / "model.safetensors").is_file()
    stores = sorted(path.name for path in (out / "prepared").iterdir())
    run.train(config, overwrite=True)
    assert sorted(path.name for path in (out / "prepared").iterdir()) == stores


def test_samples_of_other_prompts_are_answered_again(make_config: MakeConfig, tmp_path: Path) -> None:
    """`num_generation_samples` may change between a run and its continuation; the answers are not mixed up."""
    config = make_config(
        val_set_size=4, generate_samples=True, num_generation_samples=1, generation_max_new_tokens=2, max_steps=2,
        save_steps=1, sequence_len=96,
    )  # fmt: skip
    run.train(config)
    record = tmp_path / "out" / "run.json"
    record.write_text(record.read_text().replace('"finished"', '"running"'))
    before = json.loads((tmp_path / "out" / "samples.jsonl").read_text())["before"]
    run.train(rerun(config, num_generation_samples=3))
    rows = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    assert rows[0]["before"] == before


def test_a_watchdog_at_the_last_step_exports_nothing(make_config: MakeConfig, tmp_path: Path) -> None:
    keys = {"loss_watchdog_threshold": 0.01, "loss_watchdog_patience": 3}
    _, _, trainer = run.train(make_config(max_steps=3, save_strategy="no", **keys))
    assert trainer.outcome.failed
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert json.loads((tmp_path / "out" / "run.json").read_text())["status"] == "interrupted"
