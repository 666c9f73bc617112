"""Schedules: transformers' and torch's values, bit for bit where they are theirs; closed form = what is executed."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.lr_scheduler import OneCycleLR
from transformers import get_scheduler

from eft.config.optim import OptimConfig, SchedulerName
from eft.core.errors import ConfigError
from eft.optim.schedulers import SCHEDULES, build_scheduler, learning_rates, schedule_name, warmup_of
from eft.runtime.optimizer_state import load_scheduler, save_scheduler

PEAK = 3e-4
NEEDED: dict[str, dict[str, Any]] = {
    "cosine_with_min_lr": {"cosine_min_lr_ratio": 0.1},
    "cosine_warmup_with_min_lr": {"cosine_min_lr_ratio": 0.1},
    "warmup_stable_decay": {"lr_scheduler_kwargs": {"num_decay_steps": 5}},
}
NO_WARMUP = ("constant",)


def config(name: str, **keys: Any) -> OptimConfig:
    settings = {"learning_rate": PEAK, "lr_scheduler": name, **NEEDED.get(name, {}), **keys}
    if name in NO_WARMUP:
        settings.pop("warmup_steps", None)
    return OptimConfig(**settings)


def optimizer_of(*rates: float) -> torch.optim.Optimizer:
    groups = [{"params": [torch.nn.Parameter(torch.ones(1))], "lr": rate} for rate in rates]
    return torch.optim.AdamW(groups, lr=rates[0])


def executed(cfg: OptimConfig, total: int, *rates: float) -> list[list[float]]:
    """Learning rates per group that each of `total` optimizer steps ran with."""
    optimizer = optimizer_of(*(rates or (cfg.learning_rate,)))
    scheduler = build_scheduler(cfg, optimizer, total)
    seen = []
    for _ in range(total):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return seen


def test_the_table_has_exactly_the_names_of_the_config() -> None:
    assert set(SCHEDULES) == set(get_args(SchedulerName))


@pytest.mark.parametrize("name", SCHEDULES)
def test_executed_rates_equal_the_closed_form(name: str) -> None:
    for total, warmup in itertools.product((1, 2, 7, 40), (0, 1, 3, 40)):
        if name == "warmup_stable_decay" and warmup + 5 > total:
            continue
        cfg = config(name, warmup_steps=warmup)
        assert [rates[0] for rates in executed(cfg, total)] == learning_rates(cfg, total)


@pytest.mark.parametrize("name", SCHEDULES)
def test_groups_keep_their_own_peaks(name: str) -> None:
    cfg = config(name, warmup_steps=4)
    seen = executed(cfg, 20, PEAK, PEAK / 8)  # a power of two, so that the ratio is exact
    assert all(first == 8 * second for first, second in seen)
    assert max(second for _, second in seen) == pytest.approx(PEAK / 8)


HF_CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("cosine", {}, {}),
    ("cosine", {"lr_scheduler_kwargs": {"num_cycles": 1.5}}, {"num_cycles": 1.5}),
    ("linear", {}, {}),
    ("constant", {}, {}),
    ("constant_with_warmup", {}, {}),
    ("inverse_sqrt", {}, {}),
    ("inverse_sqrt", {"lr_scheduler_kwargs": {"timescale": 50}}, {"timescale": 50}),
    ("polynomial", {}, {}),
    ("polynomial", {"lr_scheduler_kwargs": {"lr_end": 1e-5, "power": 2}}, {"lr_end": 1e-5, "power": 2.0}),
    ("cosine_with_min_lr", {"cosine_min_lr_ratio": 0.1}, {"min_lr_rate": 0.1}),
    (
        "cosine_with_min_lr",
        {"cosine_min_lr_ratio": None, "lr_scheduler_kwargs": {"min_lr": 1e-5, "num_cycles": 0.5}},
        {"min_lr": 1e-5},
    ),
    ("cosine_with_restarts", {}, {"num_cycles": 1}),
    ("cosine_with_restarts", {"lr_scheduler_kwargs": {"num_cycles": 3}}, {"num_cycles": 3}),
    ("cosine_warmup_with_min_lr", {}, {"min_lr_rate": 0.1}),
    (
        "cosine_warmup_with_min_lr",
        {"lr_scheduler_kwargs": {"warmup_lr_rate": 0.2, "num_cycles": 1}},
        {"min_lr_rate": 0.1, "warmup_lr_rate": 0.2, "num_cycles": 1.0},
    ),
    *(
        (
            "warmup_stable_decay",
            {
                "lr_scheduler_kwargs": {
                    "num_decay_steps": 5,
                    "warmup_type": rise,
                    "decay_type": fall,
                    "min_lr_ratio": floor,
                }
            },
            {"num_decay_steps": 5, "warmup_type": rise, "decay_type": fall, "min_lr_ratio": floor},
        )
        for rise, fall, floor in (("linear", "cosine", 0.0), ("cosine", "1-sqrt", 0.1), ("1-sqrt", "linear", 0.2))
    ),
]


@pytest.mark.parametrize(("name", "keys", "theirs"), HF_CASES)
def test_transformers_values_bit_for_bit(name: str, keys: dict[str, Any], theirs: dict[str, Any]) -> None:
    for total, warmup in ((20, 0), (20, 4), (33, 11)):
        optimizer = optimizer_of(PEAK)
        scheduler = get_scheduler(
            name, optimizer, num_warmup_steps=warmup, num_training_steps=total, scheduler_specific_kwargs=theirs
        )
        expected = []
        for _ in range(total):
            expected.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        assert learning_rates(config(name, warmup_steps=warmup, **keys), total) == expected


@pytest.mark.parametrize("strategy", ["cos", "linear"])
@pytest.mark.parametrize(("total", "warmup"), [(20, 0), (20, 4), (33, 2), (50, 50)])
def test_one_cycle_has_torchs_values(strategy: str, total: int, warmup: int) -> None:
    optimizer = optimizer_of(PEAK)
    kwargs = {"div_factor": 10.0, "final_div_factor": 100.0, "anneal_strategy": strategy}
    theirs = OneCycleLR(optimizer, PEAK, total_steps=total, pct_start=warmup / total, cycle_momentum=False, **kwargs)
    expected = []
    for step in range(total):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if step < total - 1:
            theirs.step()
    ours = learning_rates(config("one_cycle", warmup_steps=warmup, lr_scheduler_kwargs=kwargs), total)
    assert ours == pytest.approx(expected, rel=1e-12)


def test_one_cycle_leaves_momentum_alone() -> None:
    optimizer = optimizer_of(PEAK)
    scheduler = build_scheduler(config("one_cycle"), optimizer, 10)
    for _ in range(10):
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)


def test_cosine_with_floor_plateau_and_quadratic_warmup() -> None:
    cfg = config(
        "cosine", warmup_steps=4, cosine_min_lr_ratio=0.2, cosine_constant_lr_ratio=0.5, lr_quadratic_warmup=True
    )
    factors = [rate / PEAK for rate in learning_rates(cfg, 40)]
    assert factors[:5] == pytest.approx([0, 1 / 16, 4 / 16, 9 / 16, 1])
    for step in range(4, 20):
        expected = 0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * (step - 4) / 16))
        assert factors[step] == pytest.approx(expected, rel=1e-12)
    assert factors[20:] == pytest.approx([0.2] * 20)


def test_rex_values() -> None:
    factors = [rate / PEAK for rate in learning_rates(config("rex", warmup_steps=5, cosine_min_lr_ratio=0.1), 25)]
    assert factors[:6] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[15] == pytest.approx(0.1 + 0.9 * 0.5 / (0.1 + 0.45))
    assert factors[24] == pytest.approx(0.1 + 0.9 * 0.05 / (0.1 + 0.045))


@given(
    name=st.sampled_from(sorted(SCHEDULES)),
    total=st.integers(1, 300),
    warmup=st.integers(0, 320),
    floor=st.one_of(st.none(), st.floats(0, 1)),
)
def test_every_factor_is_between_zero_and_one(name: str, total: int, warmup: int, floor: float | None) -> None:
    keys: dict[str, Any] = {"warmup_steps": warmup}
    if floor is not None and "cosine_min_lr_ratio" in SCHEDULES[name].keys:
        keys["cosine_min_lr_ratio"] = floor
    if name == "warmup_stable_decay" and warmup + 5 > total:
        return
    cfg = config(name, **keys)
    rates = learning_rates(cfg, total)
    assert len(rates) == total
    assert all(0.0 <= rate <= PEAK * (1 + 1e-12) for rate in rates)
    peak_step = warmup if name in SCHEDULES and "warmup_steps" in SCHEDULES[name].keys else 0
    if name in ("one_cycle", "cosine_warmup_with_min_lr"):
        peak_step = max(0, warmup - 1)
        if warmup == 0:
            return  # these then start below the peak
    if peak_step < total:
        assert rates[peak_step] == pytest.approx(PEAK, rel=1e-9)
        after = rates[peak_step:]
        assert all(later <= earlier * (1 + 1e-9) for earlier, later in itertools.pairwise(after))


def test_warmup_rule() -> None:
    assert warmup_of(config("cosine"), 1000) == 30
    assert warmup_of(config("cosine"), 100_000) == 100
    assert warmup_of(config("cosine"), 20) == 0
    assert warmup_of(config("cosine", warmup_ratio=0.1), 55) == 5
    assert warmup_of(config("cosine", warmup_steps=7), 55) == 7
    assert warmup_of(config("constant"), 1000) == 0
    with pytest.raises(ConfigError, match=r"warmup_ratio.*warmup_steps: 3"):
        warmup_of(config("cosine", warmup_steps=3, warmup_ratio=0.1), 10)


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("linear", {"cosine_min_lr_ratio": 0.1}, r"cosine_min_lr_ratio: not used by lr_scheduler linear.*rex"),
        ("constant", {"warmup_ratio": 0.1}, r"warmup_ratio: not used by lr_scheduler constant"),
        ("rex", {"lr_quadratic_warmup": True}, r"lr_quadratic_warmup: not used.*cosine"),
        ("linear", {"lr_scheduler_kwargs": {"power": 2}}, r"power: lr_scheduler linear has no such option.*no options"),
        ("cosine", {"lr_scheduler_kwargs": {"num_cycle": 2}}, r"Did you mean 'num_cycles'"),
        ("cosine", {"lr_scheduler_kwargs": {"num_cycles": "2"}}, r"expected a number, got '2'.*without quotes"),
        ("cosine", {"cosine_constant_lr_ratio": 0.5}, r"set `cosine_min_lr_ratio` too"),
        ("cosine_with_min_lr", {"cosine_min_lr_ratio": None}, r"needs its floor"),
        ("cosine_with_min_lr", {"lr_scheduler_kwargs": {"min_lr": 1e-5}}, r"min_lr: cosine_min_lr_ratio sets the same"),
        ("cosine_with_min_lr", {"cosine_min_lr_ratio": None, "lr_scheduler_kwargs": {"min_lr": 1}}, r"at most 1"),
        ("warmup_stable_decay", {"lr_scheduler_kwargs": {}}, r"needs `num_decay_steps`"),
        ("warmup_stable_decay", {"lr_scheduler_kwargs": {"num_decay_steps": 99}}, r"99 steps, but the run has 20"),
        ("polynomial", {"lr_scheduler_kwargs": {"lr_end": 0.1}}, r"must be below the learning_rate"),
        ("one_cycle", {"lr_scheduler_kwargs": {"pct_start": 0.3}}, r"set `warmup_ratio` instead"),
        ("warmup_stable_decay", {"lr_scheduler_kwargs": {"decay_type": "cosin"}}, r"expected one of linear, cosine"),
    ],
)
def test_what_a_schedule_does_not_use_is_an_error(name: str, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        learning_rates(config(name, **keys), 20)


def test_schedule_free_optimizers_do_not_decay() -> None:
    cfg = OptimConfig(learning_rate=PEAK, optimizer="schedule_free_adamw")
    assert schedule_name(cfg).value == "constant_with_warmup"
    assert "not the default cosine" in schedule_name(cfg).origin
    assert learning_rates(cfg, 1000)[30:] == [PEAK] * 970
    with pytest.raises(ConfigError, match=r"lr_scheduler: schedule_free_adamw averages.*constant_with_warmup"):
        schedule_name(OptimConfig(learning_rate=PEAK, optimizer="schedule_free_adamw", lr_scheduler="linear"))
    assert schedule_name(
        OptimConfig(learning_rate=PEAK, optimizer="schedule_free_sgd", lr_scheduler="constant")
    ).value == ("constant")


# Landmarks: step 0, the end of the warm-up, the middle, the last step ------------------------------------------------

TOTAL, WARMUP = 101, 20
MIDDLE = (WARMUP + TOTAL) // 2  # p = 40 / 81
P, LAST = 40 / 81, 80 / 81


def cosine(share: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * share))


LANDMARKS: dict[str, tuple[float, float, float, float]] = {
    "cosine": (0, 1, cosine(P), cosine(LAST)),
    "linear": (0, 1, 1 - P, 1 / 81),
    "constant": (1, 1, 1, 1),
    "constant_with_warmup": (0, 1, 1, 1),
    "inverse_sqrt": (0, 1, (20 / 60) ** 0.5, (20 / 100) ** 0.5),
    "polynomial": (0, 1, (1 - P) * (1 - 1e-7 / PEAK) + 1e-7 / PEAK, (1 / 81) * (1 - 1e-7 / PEAK) + 1e-7 / PEAK),
    "cosine_with_restarts": (0, 1, cosine(P), cosine(LAST)),
    "cosine_with_min_lr": (0, 1, 0.1 + 0.9 * cosine(P), 0.1 + 0.9 * cosine(LAST)),
    "cosine_warmup_with_min_lr": (1 / 20, 0.1 + 0.9 * cosine(1 / 81), 0.1 + 0.9 * cosine(41 / 81), 0.1),
    "warmup_stable_decay": (0, 1, 1, cosine(4 / 5)),
    "rex": (0, 1, (1 - P) / (0.1 + 0.9 * (1 - P)), (1 / 81) / (0.1 + 0.9 / 81)),
    "one_cycle": (
        1 / 25,
        1 / 25e4 + (1 - 1 / 25e4) * cosine(1 / 81),
        1 / 25e4 + (1 - 1 / 25e4) * cosine(41 / 81),
        1 / 25e4,
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_closed_forms_at_their_landmarks(name: str) -> None:
    found = learning_rates(config(name, warmup_steps=WARMUP), TOTAL)
    at = [found[step] / PEAK for step in (0, WARMUP, MIDDLE, TOTAL - 1)]
    assert at == pytest.approx(LANDMARKS[name], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("restarts", [False, True])
def test_a_resumed_schedule_goes_on_where_it_was(name: str, restarts: bool, tmp_path: Path) -> None:
    keys = {"jagged_restart_steps": 15, "jagged_restart_warmup_steps": 3} if restarts else {}
    cfg, total = config(name, warmup_steps=5, **keys), 40
    expected = learning_rates(cfg, total)
    for cut in (0, 5, 16, 39):
        first = optimizer_of(PEAK)
        scheduler = build_scheduler(cfg, first, total)
        for _ in range(cut):
            first.step()
            scheduler.step()
        save_scheduler(tmp_path, scheduler)
        second = optimizer_of(PEAK)
        resumed = build_scheduler(cfg, second, total)
        load_scheduler(tmp_path, resumed)
        seen = []
        for _ in range(cut, total):
            seen.append(second.param_groups[0]["lr"])
            second.step()
            resumed.step()
        assert seen == expected[cut:]


@pytest.mark.parametrize("name", SCHEDULES)
def test_jagged_restarts_multiply_any_schedule(name: str) -> None:
    keys = {"jagged_restart_steps": 10, "jagged_restart_warmup_steps": 3, "jagged_restart_anneal_steps": 2}
    plain, jagged = (learning_rates(config(name, warmup_steps=4, **more), 33) for more in ({}, keys))
    low = 0.1 if "cosine_min_lr_ratio" in NEEDED.get(name, {}) else 0.001
    rise, fall = {0: 0.25, 1: 0.5, 2: 0.75}, {8: 0.5, 9: 0.0}
    for step, (before, after) in enumerate(zip(plain, jagged, strict=True)):
        share = fall.get(step % 10, 1.0 if step < 10 else rise.get(step % 10, 1.0))
        assert after == pytest.approx(before * (share * (1 - low) + low), rel=1e-12), step


def test_jagged_restarts_take_their_floor_from_the_schedules_key() -> None:
    cfg = config("linear", jagged_restart_steps=12, cosine_min_lr_ratio=0.2, warmup_steps=0)
    assert learning_rates(cfg, 24)[11] == pytest.approx(0.2 * PEAK * 13 / 24)
    with pytest.raises(ConfigError, match="cosine_min_lr_ratio: not used by lr_scheduler linear"):
        learning_rates(config("linear", cosine_min_lr_ratio=0.2), 24)
