"""The plan: every sample once an epoch, steps known before the run, ranks share a step without changing it."""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eft.core.errors import DataError
from eft.core.records import Float64Array, Int32Array, TokenSample
from eft.data.plan import Plan, StepPlan, bin_costs, build_eval_plan, build_plan, share_step


@dataclass
class Lengths:
    """A data set as far as the plan looks: no tokens."""

    lengths: Int32Array
    weight_sums: Float64Array
    trainable_counts: Int32Array
    fingerprint: str = "f"

    def __len__(self) -> int:
        return len(self.lengths)

    def sample(self, index: int) -> TokenSample:
        raise AssertionError("the plan reads no tokens")


def dataset_of(lengths: list[int], fingerprint: str = "f") -> Lengths:
    array = np.array(lengths, np.int32)
    weight_sums = array.astype(np.float64) / 2 + np.arange(len(array))
    return Lengths(array, weight_sums, array // 2, fingerprint)


def plan_of(lengths: list[int], fingerprint: str = "f", **changes: Any) -> Plan:
    options: dict[str, Any] = {
        "capacity": 16,
        "packed": True,
        "sequential": False,
        "shuffle": True,
        "global_batch_size": 3,
        "num_epochs": 1.0,
        "max_steps": None,
        "seed": 1,
    }
    return build_plan(dataset_of(lengths, fingerprint), **{**options, **changes})


def steps_of(plan: Plan) -> list[list[list[int]]]:
    return [[ids.tolist() for ids in plan.step(k).bins] for k in range(plan.total_steps)]


some_lengths = st.lists(st.integers(1, 16), min_size=1, max_size=120)


@settings(deadline=None, max_examples=150)
@given(
    some_lengths,
    st.integers(1, 9),
    st.sampled_from([(True, False), (True, True), (False, False)]),
    st.booleans(),
    st.integers(1, 4),
)
def test_every_epoch_has_every_sample_once(
    lengths: list[int], global_batch: int, kind: tuple[bool, bool], shuffle: bool, epochs: int
) -> None:
    packed, sequential = kind
    plan = plan_of(
        lengths,
        packed=packed,
        sequential=sequential,
        shuffle=shuffle,
        global_batch_size=global_batch,
        num_epochs=epochs,
    )
    assert plan.total_steps == plan.plan_steps == sum(plan.steps_per_epoch) == plan.epoch_ends[-1]
    assert len(plan.steps_per_epoch) == epochs
    seen: list[list[int]] = [[] for _ in range(epochs)]
    bins_of_step = []
    for k in range(plan.total_steps):
        step = plan.step(k)
        ids = np.concatenate(step.bins)
        seen[step.epoch] += ids.tolist()
        bins_of_step.append(len(step.bins))
        assert step.step == k
        assert k < plan.epoch_ends[step.epoch]
        assert step.epoch == 0 or k >= plan.epoch_ends[step.epoch - 1]
        assert step.weight == pytest.approx(plan.dataset.weight_sums[ids].sum(), rel=1e-12)
        assert step.tokens == plan.dataset.lengths[ids].sum()
        for one in step.bins:
            assert plan.dataset.lengths[one].sum() <= 16
            assert packed or len(one) == 1
        last_of_epoch = k + 1 in plan.epoch_ends
        assert len(step.bins) == global_batch or (last_of_epoch and 0 < len(step.bins) < global_batch)
    assert all(sorted(ids) == list(range(len(lengths))) for ids in seen)
    if not shuffle and (sequential or not packed):
        assert seen[0] == list(range(len(lengths)))


@settings(deadline=None, max_examples=60)
@given(some_lengths, st.integers(1, 5), st.integers(0, 300))
def test_the_same_inputs_give_the_same_plan_in_any_order_of_asking(lengths: list[int], epochs: int, start: int) -> None:
    one, other = (plan_of(lengths, num_epochs=epochs) for _ in range(2))
    straight = steps_of(one)
    order = np.roll(np.arange(one.total_steps), start)  # across the two cached epochs and back
    asked = {int(k): [ids.tolist() for ids in other.step(int(k)).bins] for k in order}
    assert [asked[k] for k in range(one.total_steps)] == straight
    assert one.fingerprint == other.fingerprint
    revived = pickle.loads(pickle.dumps(one))
    assert steps_of(revived) == straight


@settings(deadline=None, max_examples=60)
@given(some_lengths, st.integers(1, 6), st.integers(1, 40), st.floats(0.05, 4.0).map(lambda x: round(x, 2)))
def test_fractions_of_epochs_and_max_steps(
    lengths: list[int], global_batch: int, max_steps: int, epochs: float
) -> None:
    long = plan_of(lengths, global_batch_size=global_batch, num_epochs=45)
    plan = plan_of(lengths, global_batch_size=global_batch, num_epochs=epochs)
    whole = int(epochs)
    hundredths = round(100 * epochs) - 100 * whole
    expected = long.steps_per_epoch[:whole]
    if hundredths:
        expected = [*expected, -(-hundredths * long.steps_per_epoch[whole] // 100)]
    assert plan.steps_per_epoch == expected
    assert plan.decided_by == "num_epochs"
    assert steps_of(plan) == steps_of(long)[: plan.total_steps]

    limited = plan_of(
        lengths, global_batch_size=global_batch, num_epochs=epochs, max_steps=max_steps, total_num_steps=max_steps + 7
    )
    assert limited.total_steps == max_steps
    assert limited.plan_steps == plan.total_steps
    assert limited.decided_by == "max_steps"
    assert steps_of(limited)[: long.total_steps] == steps_of(long)[:max_steps]
    assert limited.fingerprint == plan.fingerprint == long.fingerprint


def test_a_fraction_counts_in_decimals() -> None:
    """10 × (1.1 - 1) is above 1 in binary, and 30 × 0.1 too; ten steps and a tenth are eleven."""
    ten = plan_of([16] * 10, global_batch_size=1, num_epochs=1.1)
    assert ten.steps_per_epoch == [10, 1]
    assert plan_of([16] * 30, global_batch_size=1, num_epochs=0.1).total_steps == 3
    assert plan_of([16] * 30, global_batch_size=1, num_epochs=0.001).total_steps == 1


def test_total_num_steps_is_second_to_max_steps_and_ignored_below_one() -> None:
    assert plan_of([16] * 9, total_num_steps=5).steps_per_epoch == [3, 2]
    assert plan_of([16] * 9, total_num_steps=5).plan_steps == 3
    assert plan_of([16] * 9, total_num_steps=5).decided_by == "total_num_steps"
    assert plan_of([16] * 9, total_num_steps=0).total_steps == 3
    assert plan_of([16] * 9, total_num_steps=-1).decided_by == "num_epochs"


def test_epoch_at() -> None:
    plan = plan_of([16] * 10, global_batch_size=3, num_epochs=2.5)
    assert plan.epoch_ends == [4, 8, 10]
    assert [plan.epoch_at(k) for k in (0, 1, 4, 6, 8, 10)] == [0.0, 0.25, 1.0, 1.5, 2.0, 2.5]


def test_fingerprint_changes_with_what_a_step_holds_and_with_nothing_else() -> None:
    lengths = [5, 3, 9, 12, 7, 1, 16, 4]
    base = plan_of(lengths)
    changes: list[dict[str, Any]] = [
        {"fingerprint": "g"},
        {"capacity": 17},
        {"packed": False},
        {"sequential": True},
        {"shuffle": False},
        {"global_batch_size": 4},
        {"seed": 2},
    ]
    prints = [plan_of(lengths, **change).fingerprint for change in changes]
    assert len({base.fingerprint, *prints}) == len(changes) + 1
    assert plan_of(lengths, num_epochs=2, max_steps=1).fingerprint == base.fingerprint
    single = plan_of(lengths, packed=False)
    assert plan_of(lengths, packed=False, capacity=99, sequential=True).fingerprint == single.fingerprint
    assert plan_of(lengths, shuffle=False, seed=9).fingerprint == plan_of(lengths, shuffle=False).fingerprint


def test_summary_is_json_and_adds_up() -> None:
    plan = plan_of([16, 16, 8, 8, 16, 4], global_batch_size=2, num_epochs=1.5)
    summary = json.loads(json.dumps(plan.summary()))
    tokens = [plan.step(k).tokens for k in range(plan.total_steps)]
    assert summary["total_steps"] == summary["plan_steps"] == 5
    assert summary["tokens_per_epoch"] == 68
    assert summary["trainable_tokens_per_epoch"] == 34
    assert summary["samples_per_epoch"] == 6
    assert summary["fill_percent"] == pytest.approx(100 * 68 / (5 * 16))
    assert summary["total_tokens"] == sum(tokens)
    assert summary["tokens_per_step"] == {"min": min(tokens), "median": float(np.median(tokens)), "max": max(tokens)}
    assert [epoch["steps_executed"] for epoch in summary["epochs"]] == [3, 2]
    assert [epoch["steps"] for epoch in summary["epochs"]] == [3, 3]
    assert [epoch["tokens_executed"] for epoch in summary["epochs"]] == [sum(tokens[:3]), sum(tokens[3:])]
    assert summary["fingerprint"] == plan.fingerprint


def test_only_two_epochs_are_held_and_none_travels() -> None:
    plan = plan_of([1] * 50, num_epochs=6)
    steps_of(plan)
    assert len(plan._packings) == 2
    assert pickle.loads(pickle.dumps(plan))._packings == {}


def test_bad_data_is_an_error_of_one_message() -> None:
    with pytest.raises(DataError, match="training data set is empty"):
        plan_of([])
    with pytest.raises(DataError, match="sample 1 has 17 tokens"):
        plan_of([3, 17], packed=False)
    masked = dataset_of([0, 0])
    masked.lengths[:], masked.weight_sums[:] = 4, 0
    with pytest.raises(DataError, match="none of the 2 training samples has a trainable token"):
        build_plan(
            masked,
            capacity=8,
            packed=True,
            sequential=False,
            shuffle=True,
            global_batch_size=1,
            num_epochs=1,
            max_steps=None,
            seed=0,
        )
    with pytest.raises(DataError, match="evaluation data set is empty"):
        build_eval_plan(dataset_of([]), capacity=8, packed=True)


@settings(deadline=None, max_examples=50)
@given(some_lengths, st.booleans())
def test_eval_plan_is_in_order_and_complete(lengths: list[int], packed: bool) -> None:
    dataset = dataset_of(lengths)
    plan = build_eval_plan(dataset, capacity=16, packed=packed)
    assert np.concatenate(plan.bins).tolist() == list(range(len(lengths)))
    assert all(dataset.lengths[ids].sum() <= 16 and (packed or len(ids) == 1) for ids in plan.bins)
    assert plan.weight == dataset.weight_sums.sum()
    assert plan.tokens == sum(lengths)


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
    assert ranks.max() / ranks.mean() < 1.02
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
    assert bin_costs(lengths, bins, 0.0) == [7.0, 40000.0]
    assert bin_costs(lengths, bins, 0.5) == [7 + 12.5, 40000 + 0.5 * 40000.0**2]


def test_max_steps_runs_through_many_epochs() -> None:
    plan = plan_of([16] * 40, global_batch_size=1, max_steps=2000)
    assert plan.step(1999).epoch == 49
    assert plan.epoch_at(2000) == 50.0
