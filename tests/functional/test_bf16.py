"""`bfloat16: true` through whole runs: bf16 weights that learn, resume bit for bit, and are saved as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from eft import run
from eft.core.errors import ConfigError
from eft.optim.averaging import averaged_parameters
from eft.optim.bf16 import MASTER
from tests.functional.conftest import MakeConfig, MakeTrainer
from tests.functional.reference import token_rows
from tests.functional.test_resume import Train, assert_same, train  # noqa: F401  # pytest looks for the fixture here
from tests.tiny_models import tiny_model

UPDATES = ("stochastic_rounding", "fp32_master")
PURE: dict[str, Any] = {"bf16": "auto", "bfloat16": True}
ROWS = token_rows(14)
HELD_OUT = token_rows(3, seed=9)


def weights_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("update", UPDATES)
def test_a_run_is_bf16_from_end_to_end(update: str, make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(**PURE, bf16_update=update, num_epochs=3, save_steps=4, val_set_size=4)
    model, _, trainer = run.train(config)
    assert not trainer.args.bf16, "no autocast over weights that are bf16 already"
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0] - 0.5
    for folder in (tmp_path / "out", tmp_path / "out" / f"checkpoint-{trainer.state.global_step}"):
        saved = weights_of(folder)
        assert {value.dtype for value in saved.values()} == {torch.bfloat16}
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in saved.items())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    promises = json.loads((tmp_path / "out" / "promises.json").read_text())
    assert [promise for promise in promises if promise["status"] == "fail"] == []


@pytest.mark.parametrize("update", UPDATES)
def test_resume_is_bit_equal(update: str, train: Train) -> None:  # noqa: F811  # the fixture
    keys = {**PURE, "bf16_update": update, "max_steps": 6, "evals": HELD_OUT, "val_set_size": 0.1, "eval_steps": 2}
    straight = train("straight", **keys)
    for stop in (1, 4):
        train(f"stopped-{stop}", stop=stop, **keys)
        assert_same(train(f"stopped-{stop}", resume=stop, **keys), straight)


def test_small_learning_rates_train(make_trainer: MakeTrainer) -> None:
    """All weights start far above what a step moves them by; rounded to nearest they would stay where they are."""
    learned = {}
    for rate in (1e-5, 0.0):
        model = tiny_model("llama")
        for parameter in model.parameters():
            parameter.data += 0.5 * parameter.data.sign()
        start = {name: p.detach().bfloat16().double() for name, p in model.named_parameters()}
        keys = {**PURE, "learning_rate": rate or 1e-9, "optimizer": "adamw_torch", "max_steps": 2, "warmup_steps": 0}
        make_trainer(ROWS, model=model, save_strategy="no", **keys).train()
        learned[rate] = sum(
            float((p.detach().double() - start[name]).abs().sum()) for name, p in model.named_parameters()
        ) / sum(p.numel() for p in model.parameters())
    assert 0.5e-5 < learned[1e-5] < 4e-5, "on average a weight moves by the learning rate in each step"
    assert learned[0.0] < 1e-7


@pytest.mark.parametrize("accumulation", [1, 2])
def test_sums_over_micro_batches_are_fp32(accumulation: int, make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(ROWS, **PURE, gradient_accumulation_steps=accumulation, max_steps=1, save_strategy="no")
    seen = set()

    def look(parameter: Tensor) -> None:
        assert parameter.grad is not None
        seen.add(parameter.grad.dtype)

    for parameter in trainer.model.parameters():
        parameter.register_post_accumulate_grad_hook(look)
    trainer.train()
    assert seen == {torch.float32 if accumulation > 1 else torch.bfloat16}


def test_averages_are_evaluated_and_exported(make_config: MakeConfig, tmp_path: Path) -> None:
    keys = {"optimizer": "schedule_free_adamw", "bf16_update": "fp32_master", "warmup_steps": 1}
    model, _, trainer = run.train(make_config(**PURE, **keys, max_steps=8, val_set_size=4))
    optimizer: Any = trainer.plain_optimizer()
    averages = dict(averaged_parameters(optimizer))
    saved = weights_of(tmp_path / "out")
    for name, parameter in model.named_parameters():
        assert torch.equal(saved[name], averages[parameter]), name
        assert torch.equal(parameter, optimizer.state[parameter][MASTER].bfloat16()), "the training iterate is back"
    assert any(not torch.equal(saved[name], p) for name, p in model.named_parameters())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"bf16": False}, "`bfloat16: true` .* and `bf16: false` contradict"),
        ({"fp16": True}, "`bfloat16: true` .* and `fp16: true` contradict"),
        ({"adapter": "lora", "lora_target_linear": True}, "`bfloat16: true`: not with `adapter: lora`"),
        ({"optimizer": "schedule_free_sgd"}, "stochastic_rounding`: not with `optimizer: schedule_free_sgd`"),
    ],
)
def test_what_does_not_go_together(keys: dict[str, Any], message: str, make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(**{**PURE, **keys})


def test_the_way_of_updating_needs_its_switch(make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match="`bf16_update`: not used because `bfloat16` is not set"):
        make_config(bf16_update="fp32_master")
