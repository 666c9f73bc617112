"""bf16 weights: stochastic rounding is right on average, master weights are fp32 training, and both resume exactly."""

from __future__ import annotations

import copy
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from eft.config.optim import OptimConfig
from eft.optim.averaging import averaged_parameters, evaluation_weights
from eft.optim.bf16 import COUNT, MASTER, Bf16Update, mixed_seed, round_stochastically
from eft.optim.in_backward import UpdatesInBackward
from eft.optim.optimizers import OPTIMIZERS, build_optimizer
from eft.optim.schedulers import build_scheduler
from eft.runtime.optimizer_state import load_optimizer, save_optimizer
from tests.optimizer_names import AVERAGED, RUNNABLE

ROUNDED = [name for name in RUNNABLE if name not in AVERAGED]
STEP = 2.0**-7
"""Between neighbours of bf16 at 1."""


def rounded(value: Tensor, seed: int) -> Tensor:
    out = torch.empty_like(value, dtype=torch.bfloat16)
    round_stochastically(value, out=out, seed=seed)
    return out


class Small(nn.Module):
    """Two matrices and a norm; the last one stays fp32, as families keep some weights."""

    def __init__(self, *, bf16: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)
        for parameter in [*self.first.parameters(), *self.norm.parameters()]:
            value = parameter.data.bfloat16()
            parameter.data = value if bf16 else value.float()


def config(name: str, rate: float = 1e-2, **keys: Any) -> OptimConfig:
    return OptimConfig(learning_rate=rate, optimizer=name, weight_decay=0.1, **keys)


def give_gradients(model: nn.Module, step: int) -> None:
    """The same for every dtype of the parameters, and small numbers that bf16 holds exactly."""
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = (torch.randint(-8, 9, parameter.shape, generator=generator) / 64).to(parameter.dtype)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, numbers: range) -> None:
    for number in numbers:
        give_gradients(model, number)
        optimizer.step()
        optimizer.zero_grad()


# ---- rounding ------------------------------------------------------------------------------------------------------


@given(st.floats(width=32, allow_nan=False), st.integers(0, 2**63 - 1))
def test_a_neighbour_comes_out(number: float, seed: int) -> None:
    value = torch.tensor([number])
    out = rounded(value, seed).double()
    below = torch.tensor(number).view(torch.int32) & ~0xFFFF
    above = below + 0x10000
    neighbours = {float(bits.view(torch.float32)) for bits in (below, above)}
    assert float(out) in neighbours
    if float(value) == float(value.bfloat16()):
        assert float(out) == number


def test_it_is_right_on_average() -> None:
    """40,000 draws of each of 9 places between two neighbours: the mean is off by 4 standard errors at most."""
    shares = torch.arange(0, 9) / 8
    for sign in (1.0, -1.0):
        values = sign * (1 + shares * STEP)
        draws = rounded(values.repeat(40_000, 1), seed=3).double()
        error = (draws.mean(0) - values.double()).abs()
        spread = STEP * (shares * (1 - shares) / 40_000).sqrt()
        assert bool((error <= 4 * spread.double()).all()), error / STEP


def test_the_mean_over_seeds_is_right() -> None:
    value = torch.full((16,), 1 + 0.3 * STEP)
    mean = torch.stack([rounded(value, mixed_seed(0, 0, seed)) for seed in range(2000)]).double().mean()
    assert float(mean) == pytest.approx(1 + 0.3 * STEP, abs=4 * STEP * (0.21 / 32_000) ** 0.5)


def test_special_values_and_shapes() -> None:
    special = torch.tensor([float("inf"), -float("inf"), 0.0, -0.0, 1.5])
    assert torch.equal(rounded(special, 1), special.bfloat16())
    for bits in (0x7FFFFFFF, 0x7F800001, 0x7FC00000):
        nan = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
        assert bool(rounded(nan, 5).isnan().all())
    assert rounded(torch.empty(0, 3), 1).shape == (0, 3)
    assert rounded(torch.tensor(1.0), 1).shape == ()
    value = torch.randn(5, 7)
    strided = torch.empty(7, 5, dtype=torch.bfloat16).t()
    round_stochastically(value, out=strided, seed=9)
    assert torch.equal(strided, rounded(value, 9))


def test_long_tensors_are_rounded_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    value = torch.randn(1001, 3)
    whole = rounded(value, 4)
    monkeypatch.setattr("eft.optim.bf16._CHUNK_CPU", 256)
    assert torch.equal(rounded(value, 4), whole)


def test_seeds_do_not_repeat() -> None:
    seeds = {mixed_seed(seed, step, index) for seed in range(8) for step in range(40) for index in range(40)}
    assert len(seeds) == 8 * 40 * 40


# ---- optimizers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNNABLE)
def test_master_weights_are_fp32_training(name: str) -> None:
    """The same bits as fp32 training from the same start with the same gradients; the model holds them rounded."""
    cfg = config(name, warmup_steps=2)
    half, full = Small(bf16=True), Small(bf16=False)
    one, other = build_optimizer(cfg, half, bf16_update="fp32_master"), build_optimizer(cfg, full)
    schedules = [build_scheduler(cfg, optimizer, 9) for optimizer in (one, other)]
    for number in range(6):
        steps(half, one, range(number, number + 1))
        steps(full, other, range(number, number + 1))
        for schedule in schedules:
            schedule.step()
    for (label, low), high in zip(half.named_parameters(), full.parameters(), strict=True):
        in_fp32 = one.state[low].get(MASTER, low)
        assert in_fp32.dtype == torch.float32
        assert torch.equal(in_fp32, high), label
        assert torch.equal(low, high.to(low.dtype)), label
        assert (MASTER in one.state[low]) == (low.dtype == torch.bfloat16)
    for left, right in zip(one.param_groups, other.param_groups, strict=True):
        assert {k: v for k, v in left.items() if k != "params"} == {k: v for k, v in right.items() if k != "params"}


@pytest.mark.parametrize("name", ROUNDED)
def test_small_updates_are_not_lost(name: str) -> None:
    """Every update is below half a step of bf16: rounded to nearest nothing ever moves; here the mean does."""
    cfg = OptimConfig(learning_rate=2e-4, optimizer=name)  # at 1, half a step is 3.9e-3
    moved = {}
    for update in (None, "stochastic_rounding"):
        layer = nn.Linear(64, 64, bias=False).bfloat16()
        nn.init.ones_(layer.weight)
        optimizer = build_optimizer(cfg, layer, bf16_update=update, seed=1)
        for _ in range(20):
            layer.weight.grad = torch.ones_like(layer.weight)
            optimizer.step()
        moved[update] = float((1 - layer.weight.detach().double()).mean())
    exact = nn.Linear(64, 64, bias=False)
    nn.init.ones_(exact.weight)
    optimizer = build_optimizer(cfg, exact)
    for _ in range(20):
        exact.weight.grad = torch.ones_like(exact.weight)
        optimizer.step()
    expected = float((1 - exact.weight.detach().double()).mean())
    assert moved["stochastic_rounding"] == pytest.approx(expected, rel=0.1)
    # Adafactor and bitsandbytes compute in fp32 and round afterwards; the other two take larger steps at first.
    if name not in ("adafactor", "came_pytorch", "rmsprop") and OPTIMIZERS[name].package != "bitsandbytes":
        assert moved[None] == 0.0


@pytest.mark.parametrize("name", ROUNDED)
def test_state_is_fp32_and_counts_updates(name: str) -> None:
    model = Small(bf16=True)
    optimizer = build_optimizer(config(name), model, bf16_update="stochastic_rounding")
    steps(model, optimizer, range(3))
    for parameter in model.parameters():
        state = optimizer.state[parameter]
        assert {v.dtype for v in state.values() if isinstance(v, Tensor)} <= {torch.float32}
        assert state.get(COUNT) == (3 if parameter.dtype == torch.bfloat16 else None)
    assert all(id(parameter) in {id(p) for p in model.parameters()} for parameter in optimizer.state)


RESUMED: list[tuple[str, Bf16Update]] = [
    *((name, "stochastic_rounding") for name in ROUNDED),
    *((name, "fp32_master") for name in RUNNABLE),
]


@pytest.mark.parametrize(("name", "update"), RESUMED)
def test_resume_is_bit_equal(name: str, update: Bf16Update, tmp_path: Path) -> None:
    cfg = config(name)
    straight = Small(bf16=True)
    optimizer = build_optimizer(cfg, straight, bf16_update=update, seed=5)
    steps(straight, optimizer, range(3))
    save_optimizer(tmp_path, optimizer, straight)
    resumed = copy.deepcopy(straight)
    steps(straight, optimizer, range(3, 7))
    torch.manual_seed(99)  # whatever the process has drawn
    torch.rand(7)
    again = build_optimizer(cfg, resumed, bf16_update=update, seed=5)
    load_optimizer(tmp_path, again, resumed)
    steps(resumed, again, range(3, 7))
    for (label, left), right in zip(straight.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(left, right), label


def test_seeds_give_other_runs() -> None:
    models = [Small(bf16=True) for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        steps(model, build_optimizer(config("sgd"), model, bf16_update="stochastic_rounding", seed=seed), range(4))
    first, same, other = (model.first.weight for model in models)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_bits_differ_between_steps_and_between_tensors() -> None:
    """The same bits again would move the same weights again, and never the others."""
    model = nn.ModuleList(nn.Linear(32, 32, bias=False) for _ in range(2)).bfloat16()
    optimizer = build_optimizer(config("sgd"), model, bf16_update="stochastic_rounding", seed=1)
    moved = []
    for _ in range(2):
        for parameter in model.parameters():
            nn.init.ones_(parameter)
            parameter.grad = torch.full_like(parameter, 0.125)  # with the decay about half a step of bf16
        optimizer.step()
        moved += [parameter.detach() != 1 for parameter in model.parameters()]
    assert all(0.1 < float(each.float().mean()) < 0.9 for each in moved)
    for first, second in combinations(moved, 2):
        assert 0.2 < float((first != second).float().mean()) < 0.7


def test_a_parameter_without_gradient_stays() -> None:
    model = Small(bf16=True)
    before = model.first.weight.clone()
    optimizer = build_optimizer(config("adamw_torch_fused"), model, bf16_update="stochastic_rounding")
    give_gradients(model, 0)
    model.first.weight.grad = None
    optimizer.step()
    assert torch.equal(model.first.weight, before)
    assert model.first.weight not in optimizer.state
    assert len(optimizer.param_groups) == 2, "the groups are whole again"


@pytest.mark.parametrize("update", ["stochastic_rounding", "fp32_master"])
def test_updates_in_the_backward_pass_are_the_same_bits(update: Bf16Update) -> None:
    weights = []
    for in_backward in (False, True):
        model = Small(bf16=True)
        updates = UpdatesInBackward(
            lambda module: build_optimizer(config("adamw_torch"), module, bf16_update=update, seed=3)
        )
        optimizer = updates(model)
        if in_backward:
            updates.attach()
        for number in range(4):
            generator = torch.Generator().manual_seed(number)
            sum(
                (p * torch.randn(p.shape, generator=generator).to(p.dtype)).sum() for p in model.parameters()
            ).backward()
            optimizer.step()
            optimizer.zero_grad()
        weights.append([parameter.detach() for parameter in model.parameters()])
    assert all(torch.equal(left, right) for left, right in zip(*weights, strict=True))


@pytest.mark.parametrize("name", AVERAGED)
def test_averages_come_from_the_master_weights(name: str) -> None:
    cfg = config(name)
    half, full = Small(bf16=True), Small(bf16=False)
    one, other = build_optimizer(cfg, half, bf16_update="fp32_master"), build_optimizer(cfg, full)
    for model, optimizer in ((half, one), (full, other)):
        steps(model, optimizer, range(12))
    expected = {label: dict(averaged_parameters(other))[p] for label, p in full.named_parameters()}
    before = [parameter.clone() for parameter in half.parameters()]
    with evaluation_weights(one):
        for label, parameter in half.named_parameters():
            assert parameter.dtype == (torch.bfloat16 if "last" not in label else torch.float32)
            assert torch.equal(parameter, expected[label].to(parameter.dtype)), label
    assert all(torch.equal(left, right) for left, right in zip(before, half.parameters(), strict=True))
