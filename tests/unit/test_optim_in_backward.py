"""Updates in the backward pass: every optimizer of the table ends with the same bits, state and counters."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from eft.config.optim import OptimConfig
from eft.core.errors import ConfigError
from eft.optim.in_backward import UpdatesInBackward, check_updates_in_backward
from eft.optim.optimizers import build_optimizer
from eft.optim.state_size import optimizer_state_bytes
from tests.optimizer_names import RUNNABLE
from tests.tiny_models import tiny_model


class Network(nn.Sequential):
    """An embedding that is its own head, a norm, an expert that most rows do not use."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Embedding(20, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8))

    def loss(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self[2](self[1](self[0](ids)))
        if ids[0] % 2:
            hidden = hidden + self[3](hidden)
        return nn.functional.cross_entropy(hidden @ self[0].weight.T, ids)


def config(name: str) -> OptimConfig:
    options: Any = {"sgd": {"momentum": 0.9}}.get(name)
    return OptimConfig(learning_rate=1e-2, optimizer=name, weight_decay=0.1, optim_args=options)


def train(build: Any, updates: UpdatesInBackward | None) -> tuple[Network, Optimizer]:
    model = Network()
    optimizer: Optimizer = build(model)
    schedule = LambdaLR(optimizer, lambda step: 1 / (step + 1))
    if updates is not None:
        updates.attach()
    torch.manual_seed(1)
    for number in range(5):
        ids = torch.randint(0, 20, (6,))
        ids[0] = number
        model.loss(ids).backward()
        assert updates is None or all(parameter.grad is None for parameter in model.parameters())
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model, optimizer


@pytest.mark.parametrize("name", RUNNABLE)
def test_weights_state_and_counters_are_those_of_the_ordinary_step(name: str) -> None:
    build = partial(build_optimizer, config(name))
    plain_model, plain = train(build, None)
    updates = UpdatesInBackward(build)
    model, optimizer = train(updates, updates)
    for expected, measured in zip(plain_model.parameters(), model.parameters(), strict=True):
        assert torch.equal(measured, expected)
        before, after = plain.state[expected], optimizer.state[measured]
        assert before.keys() == after.keys()
        for key, value in before.items():
            same = torch.equal(after[key], value) if isinstance(value, torch.Tensor) else after[key] == value
            assert same, key
    for group, other in zip(plain.param_groups, optimizer.param_groups, strict=True):
        assert {key: group[key] for key in group if key != "params"} == {
            key: other[key] for key in other if key != "params"
        }


def test_paused_and_detached() -> None:
    updates = UpdatesInBackward(partial(build_optimizer, config("adamw_torch")))
    model = Network()
    updates(model)
    updates.attach()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with updates.paused():
        model.loss(torch.arange(1, 7)).backward()
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())
    updates.detach()
    model.loss(torch.arange(1, 7)).backward()
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    assert all(parameter.grad is not None for parameter in model.parameters())
    updates.attach()
    updates.attach()  # a second training
    model.loss(torch.arange(1, 7)).backward()
    assert not any(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_gradients_must_be_complete() -> None:
    check_updates_in_backward(1, 1)
    with pytest.raises(ConfigError, match="4 micro-batches"):
        check_updates_in_backward(4, 1)
    with pytest.raises(ConfigError, match="2 processes"):
        check_updates_in_backward(1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("name", RUNNABLE)
def test_state_size_is_known_before_the_first_step(name: str, family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family).to(dtype)
    model.get_input_embeddings().weight.requires_grad_(False)
    update = "fp32_master" if dtype == torch.bfloat16 else None
    build = partial(build_optimizer, config(name), bf16_update=update)
    expected = optimizer_state_bytes(build, model)
    optimizer = build(model)
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 0.01) if parameter.requires_grad else None
        optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values()]
    assert expected == sum(value.nbytes for value in states if isinstance(value, torch.Tensor)) > 0
