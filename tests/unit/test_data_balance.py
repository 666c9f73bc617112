"""Ranks share a step without changing it, and nobody could share it much better."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eft.core.records import Float64Array, Int32Array, TokenSample
from eft.data.balance import bin_costs, expected_balance, groups_of, share_bound, share_step
from eft.data.plan import Plan, StepPlan, build_plan


def step_of(costs: list[float]) -> StepPlan:
    return StepPlan(0, 0, [np.array([i], np.int32) for i in range(len(costs))], 1.0, 1)


@settings(deadline=None, max_examples=300)
@given(st.data(), st.integers(1, 5), st.integers(1, 4), st.integers(1, 3))
def test_shares_are_the_step(data: st.DataObject, world: int, accumulation: int, micro: int) -> None:
    room = world * accumulation * micro
    costs = data.draw(st.lists(st.floats(0.5, 1e6), min_size=1, max_size=room))
    shares = share_step(step_of(costs), costs, world, accumulation, micro)
    assert len(shares) == world
    assert all(len(rank) == accumulation for rank in shares)
    assert all(len(bins) <= micro for rank in shares for bins in rank)
    assert sorted(int(b[0]) for rank in shares for bins in rank for b in bins) == list(range(len(costs)))
    for rank in shares:  # dummies come last, and only where there are fewer bins than micro-batches
        assert [not bins for bins in rank] == sorted(not bins for bins in rank)
        assert any(rank) or len(costs) < world
        assert all(rank) or sum(len(bins) for bins in rank) < accumulation
    again = share_step(step_of(costs), costs, world, accumulation, micro)
    assert str(again) == str(shares)
    # Greedy's bound where no rank is full: nobody is above the mean by more than the largest bin.
    if all(sum(map(len, rank)) < accumulation * micro for rank in shares):
        loads = [sum(costs[int(b[0])] for bins in rank for b in bins) for rank in shares]
        assert max(loads) <= sum(costs) / world + max(costs) * (1 + 1e-9)


def test_shares_are_balanced_and_ranks_go_from_heavy_to_light() -> None:
    rng = np.random.default_rng(0)
    costs = rng.lognormal(0, 0.5, 64).tolist()
    shares = share_step(step_of(costs), costs, 4, 8, 2)
    micro = np.array([[sum(costs[int(b[0])] for b in bins) for bins in rank] for rank in shares])
    ranks = micro.sum(1)
    assert ranks.max() / ranks.mean() < 1.001
    assert micro.max() / micro.mean() < 1.6
    assert np.all(np.diff(micro, axis=1) <= 0)


def test_one_rank_keeps_the_order_of_the_plan() -> None:
    costs = [3.0, 9.0, 1.0, 4.0, 5.0]
    (alone,) = share_step(step_of(costs), costs, 1, 6, 1)
    assert [[int(b[0]) for b in bins] for bins in alone] == [[0], [1], [2], [3], [4], []]
    (pairs,) = share_step(step_of(costs), costs, 1, 3, 2)
    assert [[int(b[0]) for b in bins] for bins in pairs] == [[0, 3], [1], [2, 4]]


def test_bin_costs() -> None:
    lengths = np.array([3, 4, 40000], np.int32)
    bins = [np.array([0, 1], np.int32), np.array([2], np.int32)]
    assert bin_costs(lengths, bins, 0.0).tolist() == [7.0, 40000.0]
    assert bin_costs(lengths, bins, 0.5).tolist() == [7 + 12.5, 40000 + 0.5 * 40000.0**2]


def best_of_all(costs: list[float], num_groups: int, limit: int) -> float:
    """The costliest group of the best of all sharings."""
    best = np.inf
    for groups in product(range(num_groups), repeat=len(costs)):
        if max(np.bincount(groups)) <= limit:
            best = min(best, np.bincount(groups, weights=costs).max())
    return float(best)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(1, 20).map(float), min_size=1, max_size=7), st.integers(2, 3), st.integers(1, 4))
def test_the_bound_holds_and_is_nearly_reached(costs: list[float], num_groups: int, limit: int) -> None:
    costs = costs[: num_groups * limit]
    bound = share_bound(np.array(costs), num_groups, limit)
    best = best_of_all(costs, num_groups, limit)
    assert bound <= best + 1e-9
    if limit == 1 or (limit == 2 and len(costs) == 2 * num_groups):
        assert bound == pytest.approx(best)
    found = max(sum(costs[i] for i in group) for group in groups_of(np.array(costs), num_groups, limit))
    assert best - 1e-9 <= found <= 4 / 3 * best + 1e-9


def test_the_bound_knows_that_the_costliest_go_apart_or_together() -> None:
    # Three groups of three: each of the three 10s with two others, or two of them together.
    costs = np.array([10.0, 10, 10, 4, 4, 4, 4, 4, 4])
    assert share_bound(costs, 3, 3) == 18.0
    costs = np.array([10.0, 6, 6, 3, 3, 3, 3, 3, 3])
    assert share_bound(costs, 3, 3) == 16.0
    # Five bins for four ranks: two of them share a rank, at best the two cheapest.
    assert share_bound(np.array([9.0, 9, 8, 7, 6]), 4, 3) == 13.0


class Lengths:
    """A data set as far as the plan looks."""

    def __init__(self, lengths: Int32Array) -> None:
        self.lengths = lengths
        self.weight_sums: Float64Array = np.ones(len(lengths))
        self.trainable_counts = lengths
        self.fingerprint = "f"

    def __len__(self) -> int:
        return len(self.lengths)

    def sample(self, index: int) -> TokenSample:
        raise AssertionError("the plan reads no tokens")


COST_RATIO = 2 * 32 * 4096 / 8e9
"""Of a model of 8B parameters: 32 layers, 4,096 wide."""


def plan_of(global_batch_size: int, capacity: int = 8192, **changes: Any) -> Plan:
    drawn = np.random.default_rng(0).lognormal(np.log(250), 1.0, 200_000)
    lengths = drawn[(drawn >= 2) & (drawn <= capacity)].astype(np.int32)
    options: dict[str, Any] = {"packed": True, "sequential": False, "shuffle": True, "num_epochs": 1, "max_steps": None}
    return build_plan(
        Lengths(lengths), capacity=capacity, global_batch_size=global_batch_size, seed=0, **{**options, **changes}
    )


@pytest.mark.parametrize("capacity", [8192, 32768])
@pytest.mark.parametrize("world_size", [8, 64])
def test_ranks_wait_hardly_longer_than_they_must(world_size: int, capacity: int) -> None:
    balance = expected_balance(plan_of(4 * world_size, capacity), COST_RATIO, world_size, 4)
    assert balance.idle <= balance.least_idle + 0.005
    assert world_size != 8 or balance.idle <= 0.02
    assert balance.steps > 9


def test_a_buffer_brings_idle_below_one_percent_without_accumulation() -> None:
    def idle(**changes: Any) -> float:
        return expected_balance(plan_of(8, cost_ratio=COST_RATIO, **changes), COST_RATIO, 8, 1).idle

    assert idle() > 0.03
    assert idle(balance_buffer=16) < 0.01
    assert idle(balance_buffer=64) < 0.003


def test_balance_of_steps_that_come_out_even() -> None:
    plan = build_plan(
        Lengths(np.full(64, 8, np.int32)),
        capacity=8,
        packed=False,
        sequential=False,
        shuffle=True,
        global_batch_size=8,
        num_epochs=1,
        max_steps=None,
        seed=0,
    )
    balance = expected_balance(plan, 0.0, 4, 2)
    assert (balance.idle, balance.least_idle, balance.worst_step, balance.steps) == (0.0, 0.0, 1.0, 8)
