"""E4: every memory option gives the weights of a plain training, bit for bit, alone and in pairs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from eft.core.errors import ConfigError
from eft.runtime.offload import activation_offloading
from eft.trainer.trainer import EftTrainer
from tests.functional.conftest import MakeTrainer
from tests.functional.reference import token_rows
from tests.tiny_models import tiny_model

ROWS = token_rows(10, weighted=True)
MODELS = ("llama", "qwen3_moe", "gemma3_text", "lora")
RECOMPUTED: dict[str, dict[str, Any]] = {
    "every layer": {"gradient_checkpointing": True},
    "every second layer": {"gradient_checkpointing": True, "gradient_checkpointing_every": 2},
    "all but attention": {"gradient_checkpointing": True, "selective_checkpointing": True},
    "all but attention and products": {
        "gradient_checkpointing": True,
        "selective_checkpointing": ["attention", "matmul"],
    },
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
}
UPDATED = {"optimizer_in_backward": True, "max_grad_norm": 0.0, "gradient_accumulation_steps": 1}


def model_of(name: str) -> Any:
    """A tiny model with the same weights every time; the adapter has dropout, which recomputation must repeat."""
    if name != "lora":
        return tiny_model(name)
    torch.manual_seed(0)
    targets = ["q_proj", "v_proj", "down_proj"]
    return get_peft_model(tiny_model("llama"), LoraConfig(r=4, lora_alpha=8, lora_dropout=0.3, target_modules=targets))


def weights(trainer: EftTrainer) -> dict[str, Tensor]:
    """Copies of all trained weights."""
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def assert_same_bits(measured: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert measured.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(measured[name], expected[name])]
    assert different == []


@pytest.fixture(scope="module")
def plain_weights() -> dict[Any, dict[str, Tensor]]:
    """Weights of the plain trainings, by what they were trained with."""
    return {}


@pytest.fixture
def trained(make_trainer: MakeTrainer) -> Callable[..., dict[str, Tensor]]:
    """A model's name, options and keys to the weights after three steps. `moved`: offload, into other CPU memory."""

    def train(name: str, *, moved: bool = False, **keys: Any) -> dict[str, Tensor]:
        settings = {"max_steps": 3, "save_strategy": "no", **keys}
        trainer = make_trainer(ROWS, model=model_of(name), **settings)
        if moved:
            trainer.parts.offloading = partial(activation_offloading, True, exercise=True)
        before = weights(trainer)
        trainer.train()
        after = weights(trainer)
        assert all(not torch.equal(before[name], after[name]) for name in before)
        return after

    return train


@pytest.mark.parametrize("moved", [False, True], ids=["kept", "offloaded"])
@pytest.mark.parametrize("recomputed", [None, *RECOMPUTED])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "unpacked"])
@pytest.mark.parametrize("name", MODELS)
def test_recomputation_and_offloading(
    name: str,
    packed: bool,
    recomputed: str | None,
    moved: bool,
    trained: Callable[..., dict[str, Tensor]],
    plain_weights: dict[Any, dict[str, Tensor]],
) -> None:
    if (name, packed) not in plain_weights:
        plain_weights[name, packed] = trained(name, sample_packing=packed)
    if recomputed is None and not moved:
        return
    keys = RECOMPUTED[recomputed] if recomputed else {}
    assert_same_bits(trained(name, moved=moved, sample_packing=packed, **keys), plain_weights[name, packed])


@pytest.mark.parametrize("recomputed", RECOMPUTED)
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "lora"])
def test_recomputation_and_offloading_under_autocast(
    name: str,
    recomputed: str,
    trained: Callable[..., dict[str, Tensor]],
    plain_weights: dict[Any, dict[str, Tensor]],
) -> None:
    if (name, "bf16") not in plain_weights:
        plain_weights[name, "bf16"] = trained(name, bf16=True)
    assert_same_bits(trained(name, moved=True, bf16=True, **RECOMPUTED[recomputed]), plain_weights[name, "bf16"])


PAIRED = {
    "alone": ({}, False),
    "with recomputation": ({"gradient_checkpointing": True}, False),
    "with selective recomputation": (RECOMPUTED["all but attention and products"], False),
    "with offloading": ({}, True),
    "with both": ({"gradient_checkpointing": True}, True),
}


@pytest.mark.parametrize("pair", PAIRED)
@pytest.mark.parametrize("name", MODELS)
def test_updates_in_the_backward_pass(
    name: str, pair: str, trained: Callable[..., dict[str, Tensor]], plain_weights: dict[Any, dict[str, Tensor]]
) -> None:
    if (name, "one micro-batch") not in plain_weights:
        plain = {**UPDATED, "optimizer_in_backward": False}
        plain_weights[name, "one micro-batch"] = trained(name, **plain)
    keys, moved = PAIRED[pair]
    assert_same_bits(trained(name, moved=moved, **UPDATED, **keys), plain_weights[name, "one micro-batch"])


@pytest.mark.parametrize("optimizer", ["adamw_torch", "sgd", "adafactor", "lion_pytorch", "schedule_free_adamw"])
def test_updates_in_the_backward_pass_by_any_optimizer(
    optimizer: str, trained: Callable[..., dict[str, Tensor]]
) -> None:
    keys = {**UPDATED, "optimizer": optimizer, "weight_decay": 0.1, "lr_scheduler": "constant_with_warmup"}
    assert_same_bits(trained("llama", **keys), trained("llama", **{**keys, "optimizer_in_backward": False}))


@pytest.mark.parametrize("update", ["stochastic_rounding", "fp32_master"])
def test_updates_in_the_backward_pass_of_bf16_weights(update: str, trained: Callable[..., dict[str, Tensor]]) -> None:
    keys = {**UPDATED, "bf16": None, "bfloat16": True, "bf16_update": update, "learning_rate": 0.1}
    assert_same_bits(trained("llama", **keys), trained("llama", **{**keys, "optimizer_in_backward": False}))


def test_no_gradient_outlives_its_update(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(ROWS, max_steps=2, save_strategy="no", **UPDATED)
    alive: list[int] = []

    def count(parameter: Tensor) -> None:
        alive.append(sum(p.grad is not None for p in trainer.model.parameters()))

    trainer.model.get_input_embeddings().weight.register_post_accumulate_grad_hook(count)
    trainer.train()
    assert alive == [1, 1], "the embedding's gradient comes last, and is the only one"
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert len(rows) == 2
    assert not [row for row in rows if "grad_norm" in row], "there was never a norm of all gradients"


def test_updates_end_with_the_training(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(ROWS, max_steps=1, save_strategy="no", **UPDATED)
    trainer.train()
    after = weights(trainer)
    trainer.model(input_ids=torch.arange(6)[None], labels=torch.arange(6)[None]).loss.backward()
    assert_same_bits(weights(trainer), after)
    assert all(parameter.grad is not None for parameter in trainer.model.parameters())


def test_a_resumed_training_that_updates_in_the_backward_pass(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    """And its checkpoint may be continued in the ordinary way: it holds the same state."""
    keys: dict[str, Any] = {**UPDATED, "max_steps": 4, "save_steps": 2}
    straight = make_trainer(ROWS, **keys)
    straight.train()
    checkpoint = str(tmp_path / "out" / "checkpoint-2")
    for in_backward in (True, False):
        resumed = make_trainer(ROWS, **{**keys, "optimizer_in_backward": in_backward})
        resumed.train(resume_from_checkpoint=checkpoint)
        assert_same_bits(weights(resumed), weights(straight))


def test_updates_in_the_backward_pass_need_whole_gradients(make_trainer: MakeTrainer) -> None:
    with pytest.raises(ConfigError, match="`max_grad_norm: 1`.*set `max_grad_norm: 0`"):
        make_trainer(ROWS, optimizer_in_backward=True, gradient_accumulation_steps=1)
    with pytest.raises(ConfigError, match="accumulation.*`gradient_accumulation_steps: 1`"):
        make_trainer(ROWS, optimizer_in_backward=True, max_grad_norm=0)
