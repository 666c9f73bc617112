"""The contract of every optimizer on CUDA, with kernels and paged state that a CPU does not have."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from eft.config.optim import OptimConfig
from eft.optim.optimizers import OPTIMIZERS, build_optimizer
from eft.runtime.optimizer_state import load_optimizer, save_optimizer
from tests.optimizer_names import ELSEWHERE, RUNNABLE, rate_of

pytestmark = pytest.mark.gpu
NAMES = sorted([*RUNNABLE, *ELSEWHERE])


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 2048), nn.LayerNorm(2048), nn.Linear(2048, 64)).cuda()


def step(network: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> float:
    generator = torch.Generator("cuda").manual_seed(number % 3)
    rows = torch.randn(16, 64, device="cuda", generator=generator)
    loss: Any = (network(rows) - rows.flip(1)).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss)


@pytest.mark.parametrize("name", NAMES)
def test_it_learns_and_resumes(name: str, tmp_path: Path) -> None:
    cfg = OptimConfig(learning_rate=rate_of(name) / 10, optimizer=name)
    network = model()
    optimizer = build_optimizer(cfg, network)
    losses = [step(network, optimizer, number) for number in range(20)]
    assert losses[-1] < losses[0]
    save_optimizer(tmp_path, optimizer, network)
    resumed = copy.deepcopy(network)
    again = build_optimizer(cfg, resumed)
    load_optimizer(tmp_path, again, resumed)
    for number in range(20, 24):
        step(network, optimizer, number)
        step(resumed, again, number)
    for left, right in zip(network.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("paged_")])
def test_state_is_paged_before_and_after_a_resume(name: str, tmp_path: Path) -> None:
    cfg = OptimConfig(learning_rate=1e-3, optimizer=name)
    network = model()
    optimizer = build_optimizer(cfg, network)
    assert type(optimizer).__name__ == OPTIMIZERS[name].attribute
    step(network, optimizer, 0)
    save_optimizer(tmp_path, optimizer, network)
    again = build_optimizer(cfg, network)
    load_optimizer(tmp_path, again, network)
    step(network, again, 1)
    for rule in (optimizer, again):
        state = rule.state[next(network.parameters())]
        assert getattr(state["state1"], "is_paged", False)
