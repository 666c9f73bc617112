"""LoRA that starts from the weights: trained as peft's PiSSA and OLoRA, saved as plain LoRA."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from eft.config.model import AdapterConfig
from eft.core.errors import ModelError
from eft.models.adapters import apply_adapter
from eft.models.export import export_model
from tests.tiny import tiny_tokenizer
from tests.tiny_models import tiny_model

IDS = torch.arange(12)[None] + 5
TARGETS = ["q_proj", "down_proj"]


def _started(start: str, **keys: Any) -> tuple[Any, PeftModel]:
    """A tiny model, and a copy of it with the adapter."""
    base = tiny_model("llama")
    cfg = AdapterConfig(
        adapter="lora", lora_r=4, lora_alpha=6, lora_target_modules=TARGETS, peft_init_lora_weights=start, **keys
    )
    adapted = apply_adapter(copy.deepcopy(base), cfg, seed=1)
    assert isinstance(adapted, PeftModel)
    return base, adapted


def _train(model: Any, steps: int = 5) -> list[float]:
    """Plain gradient descent, under which both parametrisations of a sum of factors move alike."""
    losses = []
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        losses.append(float(loss.detach()))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.5 * parameter.grad
                    parameter.grad = None
    return losses


def _logits(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model.eval()(input_ids=IDS, use_cache=False).logits
    return logits


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_trains_as_pefts_own(start: str, rslora: bool) -> None:
    base, ours = _started(start, peft_use_rslora=rslora)
    before = _logits(base)
    torch.testing.assert_close(_logits(ours), before, atol=1e-5, rtol=1e-5)
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=TARGETS, init_lora_weights=start, use_rslora=rslora, task_type="CAUSAL_LM"
    )
    theirs = get_peft_model(copy.deepcopy(base), config)
    losses = _train(theirs.train())
    assert losses[-1] < losses[0] - 0.05
    assert _train(ours.train()) == pytest.approx(losses, rel=1e-4)
    torch.testing.assert_close(_logits(ours), _logits(theirs), atol=2e-3, rtol=1e-3)
    assert (_logits(ours) - before).abs().max() > 0.1


def test_a_start_of_few_iterations_takes_as_much() -> None:
    _, exact = _started("pissa")
    _, fast = _started("pissa_niter_16")
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    layers: list[Any] = [model.get_submodule(name) for model in (exact, fast)]
    taken = [
        (layer.lora_B["default"].weight[:, :4] @ layer.lora_A["default"].weight[:4]).norm().item() for layer in layers
    ]
    assert 0.97 * taken[0] < taken[1] <= taken[0]


def test_the_base_and_the_second_halves_stay() -> None:
    base, model = _started("pissa")
    halves = {
        name: parameter.detach().clone().narrow(int("lora_B" in name), 4, 4)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    assert halves
    _train(model.train())
    for name, parameter in model.named_parameters():
        if name in halves:
            assert torch.equal(parameter.narrow(int("lora_B" in name), 4, 4), halves[name]), name
            assert not torch.equal(parameter.narrow(int("lora_B" in name), 0, 4).abs(), halves[name].abs()), name
    for name, parameter in base.named_parameters():
        live = model.get_base_model().state_dict()
        assert torch.equal(live.get(name, live.get(name.replace(".weight", ".base_layer.weight"))), parameter)


def test_what_is_saved_is_plain_lora_on_the_base(tmp_path: Path) -> None:
    base, model = _started("pissa", lora_rank_pattern={"down_proj": 2}, lora_alpha_pattern={"down_proj": 5})
    base.save_pretrained(tmp_path / "base")
    model.get_base_model().config.name_or_path = str(tmp_path / "base")
    _train(model.train())
    export_model(model, tiny_tokenizer(), tmp_path / "adapter", save_dtype=torch.float32)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    config = loaded.peft_config["default"]
    assert (config.init_lora_weights, config.r, config.rank_pattern) == (True, 8, {"down_proj": 4})
    assert torch.equal(_logits(loaded), _logits(model))


def test_refusals() -> None:
    with pytest.raises(ModelError, match=r"embed_tokens is none; exclude it"):
        apply_adapter(
            tiny_model("llama"),
            AdapterConfig(adapter="lora", lora_target_modules=["embed_tokens"], peft_init_lora_weights="pissa"),
            seed=1,
        )
    with pytest.raises(ModelError, match=r"has no 4096 components; lower `lora_r`"):
        apply_adapter(
            tiny_model("llama"),
            AdapterConfig(adapter="lora", lora_r=4096, lora_target_modules=["q_proj"], peft_init_lora_weights="olora"),
            seed=1,
        )
