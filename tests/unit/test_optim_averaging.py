"""Averages of weights: what they are, that training never sees them, and that they resume bit for bit."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eft.config.optim import OptimConfig
from eft.optim.averaging import AVERAGE, evaluation_state_dict, evaluation_weights, is_averaged
from eft.optim.in_backward import UpdatesInBackward
from eft.optim.optimizers import build_optimizer
from eft.optim.state_size import held_state_bytes, optimizer_state_bytes
from eft.runtime.optimizer_state import load_optimizer, save_optimizer
from tests.optimizer_names import AVERAGED, RUNNABLE, rate_of

NAMES = [name for name in RUNNABLE if name not in AVERAGED]


def config(name: str = "adamw_torch", **keys: Any) -> OptimConfig:
    keys = {"weight_average": "ema", "weight_average_decay": 0.8, **keys}
    return OptimConfig(learning_rate=rate_of(name), optimizer=name, **keys)  # type: ignore[arg-type]


def layer(dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(5, 4).to(dtype)


def step(model: nn.Linear, optimizer: torch.optim.Optimizer, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    optimizer.step()
    optimizer.zero_grad()


def history(model: nn.Linear, optimizer: torch.optim.Optimizer, steps: int) -> list[Tensor]:
    weights = []
    for number in range(steps):
        step(model, optimizer, number)
        weights.append(model.weight.detach().clone())
    return weights


@pytest.mark.parametrize("start", [0, 3])
def test_an_exponential_average(start: int) -> None:
    model = layer()
    optimizer = build_optimizer(config(weight_average_start=start), model)
    weights = history(model, optimizer, 7)
    expected = weights[start]
    for value in weights[start + 1 :]:
        expected = 0.8 * expected + 0.2 * value
    with evaluation_weights(optimizer):
        torch.testing.assert_close(model.weight.detach(), expected)
    assert torch.equal(model.weight, weights[-1])


@pytest.mark.parametrize("start", [0, 3])
def test_an_average_with_equal_shares(start: int) -> None:
    model = layer()
    optimizer = build_optimizer(config(weight_average="mean", weight_average_start=start), model)
    weights = history(model, optimizer, 7)
    torch.testing.assert_close(
        evaluation_state_dict(optimizer, model)["weight"], torch.stack(weights[start:]).mean(0), rtol=1e-5, atol=1e-6
    )


def test_before_it_begins_the_weights_themselves_count() -> None:
    model = layer()
    optimizer = build_optimizer(config(weight_average_start=5), model)
    weights = history(model, optimizer, 3)
    assert torch.equal(evaluation_state_dict(optimizer, model)["weight"], weights[-1])


@pytest.mark.parametrize("name", NAMES)
def test_training_never_sees_it(name: str) -> None:
    averaged, plain = layer(), layer()
    one = build_optimizer(config(name), averaged)
    other = build_optimizer(config(name, weight_average=None, weight_average_decay=0.999), plain)
    assert is_averaged(one)
    assert not is_averaged(other)
    for number in range(4):
        step(averaged, one, number)
        with evaluation_weights(one):
            pass
        step(plain, other, number)
        assert torch.equal(averaged.weight, plain.weight)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bf16_update", [None, "stochastic_rounding", "fp32_master"])
def test_resume_is_bit_equal(name: str, bf16_update: Any, tmp_path: Path) -> None:
    build = partial(build_optimizer, config(name), bf16_update=bf16_update)
    model = layer(torch.float32 if bf16_update is None else torch.bfloat16)
    optimizer = build(model)
    history(model, optimizer, 3)
    save_optimizer(tmp_path, optimizer, model)
    resumed = copy.deepcopy(model)
    again = build(resumed)
    load_optimizer(tmp_path, again, resumed)
    for number in range(3, 6):
        step(model, optimizer, number)
        step(resumed, again, number)
    assert torch.equal(resumed.weight, model.weight)
    for left, right in zip(model.parameters(), resumed.parameters(), strict=True):
        assert optimizer.state[left][AVERAGE].dtype == torch.float32
        assert torch.equal(optimizer.state[left][AVERAGE], again.state[right][AVERAGE])


@pytest.mark.parametrize("name", NAMES)
def test_its_memory_is_known_before_the_first_step(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.LayerNorm(128))
    build = partial(build_optimizer, config(name))
    expected = optimizer_state_bytes(build, model)
    optimizer = build(model)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.01)
    optimizer.step()
    assert held_state_bytes(optimizer) == expected


def test_updates_in_the_backward_pass_average_once() -> None:
    build = partial(build_optimizer, config())
    plain, fused = layer(), layer()
    optimizer, updates = build(plain), UpdatesInBackward(build)
    other = updates(fused)
    updates.attach()
    for number in range(4):
        rows = torch.randn(3, 5, generator=torch.Generator().manual_seed(number))
        for model, rule in ((plain, optimizer), (fused, other)):
            model(rows).square().sum().backward()
            rule.step()
            rule.zero_grad()
    assert torch.equal(evaluation_state_dict(other, fused)["weight"], evaluation_state_dict(optimizer, plain)["weight"])
