"""Optimizers, groups, averages, noise and the dtype ledger through real trainings."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerCallback

from eft import run
from eft.core.errors import PromiseBroken
from eft.models.adapters import apply_adapter
from eft.optim.averaging import AVERAGE
from eft.optim.schedulers import learning_rates
from tests.functional.conftest import MakeConfig, MakeTrainer
from tests.functional.reference import token_rows
from tests.functional.test_resume import Train, assert_same, train  # noqa: F401  # pytest looks for the fixture here
from tests.optimizer_names import RUNNABLE
from tests.tiny_models import tiny_model
from tests.unit.test_models_experts import Operands

HELD_OUT = token_rows(3, seed=9)
SHORT: dict[str, Any] = {"max_steps": 3, "save_strategy": "no"}


def ledger_of(trainer: Any) -> Any:
    (found,) = [promise for promise in trainer.outcome.promises if promise.promise == "dtypes"]
    return found


# ---- the dtype ledger ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({}, ["trained weights float32", "gradients float32", "optimizer state float32", "loss sum float32"]),
        ({"bf16": True}, ["trained weights float32", "gradients float32", "buffers float32", "products bfloat16"]),
        ({"bfloat16": True, "bf16": "auto", "gradient_accumulation_steps": 1}, ["gradients bfloat16", "state float32"]),
        ({"bfloat16": True, "bf16": "auto"}, ["trained weights bfloat16", "gradients float32", "products bfloat16"]),
        ({"optimizer": "sgd"}, ["trained weights float32", "gradients float32"]),
        ({"gradient_accumulation_steps": 1, "optimizer_in_backward": True, "max_grad_norm": 0.0}, ["state float32"]),
        ({"optimizer": "muon", "weight_average": "ema"}, ["optimizer state float32"]),
    ],
)
def test_every_dtype_is_the_announced_one(keys: dict[str, Any], words: list[str], make_trainer: MakeTrainer) -> None:
    trainer: Any = make_trainer(**{**SHORT, **keys})
    trainer.train()
    ledger = ledger_of(trainer)
    assert ledger.status == "pass"
    assert all(word in ledger.detail for word in words), ledger.detail


EXPERTS = {"adapter": "lora", "lora_target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}


@pytest.mark.parametrize("keys", [{}, {"gradient_checkpointing": True}, EXPERTS])
def test_products_of_experts_are_in_bf16_too(
    keys: dict[str, Any], make_config: MakeConfig, make_trainer: MakeTrainer
) -> None:
    config = make_config(bf16=True, **{**SHORT, **keys})
    model: Any = tiny_model("qwen3_moe")
    trainer: Any = make_trainer(model=apply_adapter(model, config, seed=0), config=config)
    with Operands() as seen:
        trainer.train()
    assert seen.products > 0
    assert seen.dtypes == {torch.bfloat16}


@pytest.mark.skipif("adamw_8bit" not in RUNNABLE, reason="bitsandbytes is not installed")
def test_an_eight_bit_state_is_in_the_ledger(make_trainer: MakeTrainer) -> None:
    model = tiny_model("llama", intermediate_size=256, vocab_size=320)
    trainer: Any = make_trainer(model=model, optimizer="adamw_8bit", **SHORT)
    trainer.train()
    assert "uint8" in ledger_of(trainer).detail


@pytest.mark.parametrize("planted", ["buffer", "state", "no autocast"])
def test_a_surprise_stops_the_run_by_name(planted: str, make_trainer: MakeTrainer) -> None:
    model = tiny_model("llama")
    trainer: Any = make_trainer(model=model, bf16=planted == "no autocast", **SHORT)

    class Plant(TrainerCallback):
        """Comes before the ledger."""

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            trainer.plain_optimizer().state[model.model.norm.weight]["extra"] = torch.zeros(3, dtype=torch.bfloat16)

    if planted == "buffer":
        model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq.bfloat16()
    elif planted == "no autocast":
        trainer.accelerator.native_amp = False  # which is what wraps the forward pass
    else:
        trainer.callback_handler.callbacks.insert(0, Plant())
    what = {
        "buffer": "buffers of model.rotary_emb.inv_freq: bfloat16, announced float32 or float64",
        "state": "optimizer state of model.norm.weight/extra: bfloat16, announced float32",
        "no autocast": "products of the output head: float32, announced bfloat16",
    }
    with pytest.raises(PromiseBroken, match=f"dtypes .*{what[planted]}"):
        trainer.train()
    assert trainer.state.global_step <= 1
    assert ledger_of(trainer).numbers["surprises"] == 1


# ---- groups --------------------------------------------------------------------------------------------------------


def test_every_group_follows_the_schedule_at_its_own_rate(make_trainer: MakeTrainer) -> None:
    trainer: Any = make_trainer(
        max_steps=5,
        save_strategy="no",
        weight_decay=0.1,
        embedding_lr=4e-3,
        layerwise_lr_decay=0.5,
        lr_groups=[{"name": "queries", "modules": ["q_proj"], "lr": 1e-3}],
    )
    seen: list[dict[str, float]] = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
            seen.append({group["name"]: group["lr"] for group in optimizer.param_groups})

    trainer.add_callback(Watch())
    trainer.train()
    factors = [rate / 1e-2 for rate in learning_rates(trainer.parts.scheduler.args[0], 5)]
    peaks = {"matrices": 1e-2, "matrices · layer 0": 5e-3, "matrices · queries": 1e-3}
    for rates, factor in zip(seen, factors, strict=True):
        for name, peak in peaks.items():
            assert rates[name] == pytest.approx(peak * factor)
        assert rates["norms, biases, embeddings · embeddings and head"] == pytest.approx(4e-3 * factor)


def test_the_start_table_lists_the_groups(make_config: MakeConfig) -> None:
    tables: list[list[tuple[str, str]]] = []
    config = make_config(**SHORT, optimizer="muon", weight_decay=0.1)
    run.train(config, on_start=lambda rows, meta: tables.append(list(rows)))
    lines = [value for name, value in tables[0] if name == "updated"]
    assert [line.partition(":")[0] for line in lines] == [
        "matrices · muon",
        "matrices · adamw",
        "norms, biases, embeddings · adamw",
    ]
    assert all("learning rate 0.01" in line for line in lines)


# ---- averages ------------------------------------------------------------------------------------------------------


def test_averages_are_evaluated_exported_and_resumed(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(
        num_epochs=2, weight_average="ema", weight_average_decay=0.7, val_set_size=4, learning_rate=0.03
    )
    _, _, trainer = run.train(config)
    optimizer: Any = trainer.plain_optimizer()
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    moved = 0
    for name, parameter in trainer.model.named_parameters():
        average = optimizer.state[parameter][AVERAGE]
        assert torch.equal(exported[name], average), name
        moved += not torch.equal(average, parameter)
    assert moved > 5
    last = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row][-1]
    assert trainer.evaluate()["eval_loss"] == last
    trainer.optimizer = None
    assert trainer.evaluate()["eval_loss"] != last


@pytest.mark.parametrize(
    "keys",
    [
        {"weight_average": "mean", "weight_average_start": 2, "eval_steps": 2},
        {"optimizer": "muon", "embedding_lr_scale": 0.5, "jagged_restart_steps": 4, "jagged_restart_warmup_steps": 2},
        {"neftune_noise_alpha": 5.0, "use_eaft": True, "eaft_alpha": 0.5, "layerwise_lr_decay": 0.9},
        *([{"optimizer": "paged_adamw_8bit", "weight_average": "ema"}] if "paged_adamw_8bit" in RUNNABLE else []),
        *([{"optimizer": "adamw_torch_4bit"}] if "adamw_torch_4bit" in RUNNABLE else []),
    ],
    ids=lambda keys: " ".join(keys),
)
def test_resume_is_bit_equal(keys: dict[str, Any], train: Train) -> None:  # noqa: F811  # the fixture
    keys = {"max_steps": 6, "evals": HELD_OUT, "val_set_size": 0.1, **keys}
    straight = train("straight", **keys)
    for stop in (1, 4):
        train(f"stopped-{stop}", stop=stop, **keys)
        assert_same(train(f"stopped-{stop}", resume=stop, **keys), straight)


# ---- noise and entropy ---------------------------------------------------------------------------------------------


def losses_of(trainer: Any) -> tuple[list[float], float]:
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return losses, trainer.evaluate()["eval_loss"]


def test_noise_is_in_training_and_not_in_evaluation(make_trainer: MakeTrainer) -> None:
    """At learning rates near 0 the weights stay, so whatever differs is the noise."""
    keys = {**SHORT, "max_steps": 2, "learning_rate": 1e-12, "val_set_size": 0.1}
    plain, held_out = losses_of(make_trainer(None, HELD_OUT, **keys))
    noisy, noisy_held_out = losses_of(make_trainer(None, HELD_OUT, neftune_noise_alpha=50.0, **keys))
    assert all(abs(left - right) > 1e-4 for left, right in zip(plain, noisy, strict=True))
    assert held_out == pytest.approx(noisy_held_out, abs=1e-9)


def test_entropy_weights_make_the_training_loss_smaller(make_trainer: MakeTrainer) -> None:
    keys = {**SHORT, "max_steps": 2, "learning_rate": 1e-12, "val_set_size": 0.1}
    plain, held_out = losses_of(make_trainer(None, HELD_OUT, **keys))
    weighted, weighted_held_out = losses_of(make_trainer(None, HELD_OUT, use_eaft=True, **keys))
    assert all(0 < right < left for left, right in zip(plain, weighted, strict=True))
    assert held_out == pytest.approx(weighted_held_out, abs=1e-9)
    assert math.isfinite(held_out)


def test_a_whole_run_records_the_ledger(make_config: MakeConfig, tmp_path: Path) -> None:
    run.train(make_config(max_steps=3))
    promises = json.loads((tmp_path / "out" / "promises.json").read_text())
    assert [promise["status"] for promise in promises if promise["promise"] == "dtypes"] == ["pass"]
