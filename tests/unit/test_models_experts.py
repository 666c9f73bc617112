"""Experts follow autocast, and are what they were without it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from eft.models.experts import GROUPED_EXPERTS, eager_experts, install_experts
from tests.tiny_models import tiny_model

FAMILIES = ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "phimoe", "olmoe"]
TOKENS = 24


class Operands(TorchDispatchMode):
    """Notes the dtypes of what grouped products multiply, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()
        self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "grouped_mm" in func.name():
            self.products += 1
            self.dtypes |= {entry.dtype for entry in args[:2]}
        return func(*args, **(kwargs or {}))


def step(model: PreTrainedModel, *, autocast: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and gradients of a seeded row."""
    ids = torch.randint(3, 100, (1, TOKENS), generator=torch.Generator().manual_seed(0)).to(model.device)
    model.zero_grad()
    with torch.autocast(model.device.type, torch.bfloat16, enabled=autocast):
        logits = model(input_ids=ids, use_cache=False).logits
    logits.float().square().mean().backward()
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return logits.detach().float(), found


def check_follows_autocast(model: PreTrainedModel) -> None:
    """Operands in bf16, gradients in the dtype of the weights (fp32), and the numbers of the family's own code."""
    install_experts(model)
    with Operands() as seen:
        logits, gradients = step(model, autocast=True)
    assert seen.products > 0
    assert seen.dtypes == {torch.bfloat16}
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}
    with eager_experts(model), Operands() as own:
        eager, expected = step(model, autocast=True)
    assert own.products == 0
    assert model.config._experts_implementation == GROUPED_EXPERTS
    assert torch.linalg.vector_norm(logits - eager) <= 0.01 * torch.linalg.vector_norm(eager)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert torch.linalg.vector_norm(gradient - expected[name]) <= 0.05 * torch.linalg.vector_norm(expected[name]), (
            name
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_products_are_in_the_dtype_of_autocast_and_gradients_in_that_of_the_weights(family: str) -> None:
    check_follows_autocast(tiny_model(family))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_without_autocast_they_are_those_of_transformers_bit_for_bit(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family).to(dtype)
    logits, gradients = step(model, autocast=False)
    gradients = {name: gradient.clone() for name, gradient in gradients.items()}
    install_experts(model)
    ours, mine = step(model, autocast=False)
    assert torch.equal(ours, logits)
    assert gradients.keys() == mine.keys()
    assert all(torch.equal(gradient, mine[name]) for name, gradient in gradients.items())


@pytest.mark.parametrize("chosen", ["eager", "batched_mm"])
def test_another_implementation_that_was_chosen_stays(chosen: str) -> None:
    model = tiny_model("qwen3_moe")
    model.set_experts_implementation(chosen)
    install_experts(model)
    assert model.config._experts_implementation == chosen
    with eager_experts(model):
        assert model.config._experts_implementation == chosen


def test_a_model_without_experts_stays_as_it_is() -> None:
    model = tiny_model("llama")
    logits, _ = step(model, autocast=True)
    install_experts(model)
    assert torch.equal(step(model, autocast=True)[0], logits)
    assert GROUPED_EXPERTS not in str(model.config.to_dict())


@pytest.mark.parametrize("family", FAMILIES)
def test_in_fp64_they_are_those_of_the_family(family: str) -> None:
    model = tiny_model(family).double()
    model.set_experts_implementation("eager")
    logits, gradients = step(model, autocast=False)
    gradients = {name: gradient.clone() for name, gradient in gradients.items()}
    model.set_experts_implementation("grouped_mm")
    install_experts(model)
    ours, mine = step(model, autocast=False)
    assert torch.equal(ours, logits)
    assert all(torch.equal(gradient, mine[name]) for name, gradient in gradients.items())
