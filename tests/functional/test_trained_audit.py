"""A run whose adapter is cut off from gradients stops by itself by step 5, with the names; a sound one goes on."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from eft.core.errors import PromiseBroken
from eft.models.adapters import apply_adapter, apply_freezing
from eft.models.load import load_model
from eft.trainer.trainer import EftTrainer

MakeConfig = Callable[..., Any]
MakeTrainer = Callable[..., EftTrainer]

SETTINGS: dict[str, dict[str, Any]] = {
    "packed": {"adapter": "lora", "lora_target_linear": True},
    "padded": {"adapter": "lora", "lora_target_linear": True, "sample_packing": False},
    "checkpointing": {"adapter": "lora", "lora_target_linear": True, "gradient_checkpointing": True},
    "reentrant": {
        "adapter": "lora",
        "lora_target_linear": True,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "warm-up": {"adapter": "lora", "lora_target_linear": True, "warmup_steps": 20, "max_steps": 40},
    "dora": {"adapter": "lora", "lora_target_linear": True, "peft_use_dora": True},
    "qlora": {"adapter": "qlora", "load_in_4bit": True, "lora_target_linear": True},
    "frozen layers": {"unfrozen_parameters": [r".*layers\.1\..*_proj"]},
}


def _trainer(make_config: MakeConfig, make_trainer: MakeTrainer, keys: dict[str, Any]) -> EftTrainer:
    config = make_config(**{"max_steps": 6, "save_strategy": "no", **keys})
    model = load_model(config, compute_dtype=torch.float32, seed=1)
    apply_freezing(model, config)
    return make_trainer(config=config, model=apply_adapter(model, config, seed=1))


def _cut(trainer: EftTrainer, kind: str) -> str:
    """Detach (or multiply by zero) what the trained part of the last layer's up_proj computes; returns its name."""
    name, module = next(
        (name, module) for name, module in reversed(list(trainer.model.named_modules())) if name.endswith("up_proj")
    )
    factor: nn.Module = module.lora_B["default"] if isinstance(module, BaseTunerLayer) else module

    def hook(_: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output.detach() if kind == "detached" else output * 0.0

    factor.register_forward_hook(hook)
    return f"{name}.lora_B.default.weight" if isinstance(module, BaseTunerLayer) else f"{name}.weight"


@pytest.mark.parametrize("kind", ["detached", "zero"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_cut_adapter_stops_the_run(
    make_config: MakeConfig, make_trainer: MakeTrainer, setting: str, kind: str
) -> None:
    if setting == "qlora":
        pytest.importorskip("bitsandbytes", reason="the extra `qlora` is not installed")
    trainer = _trainer(make_config, make_trainer, SETTINGS[setting])
    name = _cut(trainer, kind)
    with pytest.raises(PromiseBroken, match=f"did not change: .*{re.escape(name)}"):
        trainer.train()
    assert trainer.state.global_step <= 5


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_sound_run_goes_on(make_config: MakeConfig, make_trainer: MakeTrainer, setting: str) -> None:
    if setting == "qlora":
        pytest.importorskip("bitsandbytes", reason="the extra `qlora` is not installed")
    trainer = _trainer(make_config, make_trainer, {**SETTINGS[setting], "max_steps": 5, "warmup_steps": 0})
    trainer.train()
    audits = [promise for promise in trainer.outcome.promises if promise.promise == "trained tensors"]
    assert [promise.status for promise in audits] == ["pass"]


def test_a_run_with_no_gradient_at_all_says_so(make_config: MakeConfig, make_trainer: MakeTrainer) -> None:
    trainer = _trainer(make_config, make_trainer, SETTINGS["packed"])
    for module in trainer.model.modules():
        if isinstance(module, BaseTunerLayer):
            module.lora_B["default"].register_forward_hook(lambda _, args, output: output.detach())
    with pytest.raises(PromiseBroken, match="q_proj.lora_A"):
        trainer.train()
