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
from eft.data.plan import Plan, build_eval_plan, build_plan


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
    st.sampled_from(["auto", "fit", "stream", "dense", "sequential", "single"]),
    st.booleans(),
    st.integers(1, 4),
    st.none() | st.integers(2, 4),
)
def test_every_epoch_has_every_sample_once(
    lengths: list[int], global_batch: int, kind: str, shuffle: bool, epochs: int, buffer: int | None
) -> None:
    packed, sequential = kind != "single", kind == "sequential"
    plan = plan_of(
        lengths,
        packed=packed,
        sequential=sequential,
        strategy="auto" if kind in ("sequential", "single") else kind,
        balance_buffer=buffer,
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
    if not shuffle and buffer is None and (sequential or not packed):
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
        {"strategy": "stream"},
        {"strategy": "dense"},
        {"bin_samples": 2},
        {"balance_buffer": 2},
        {"balance_buffer": 3},
    ]
    prints = [plan_of(lengths, **change).fingerprint for change in changes]
    assert len({base.fingerprint, *prints}) == len(changes) + 1
    assert plan_of(lengths, num_epochs=2, max_steps=1).fingerprint == base.fingerprint
    single = plan_of(lengths, packed=False)
    assert plan_of(lengths, packed=False, capacity=99, sequential=True, bin_samples=2).fingerprint == single.fingerprint
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


def test_auto_is_resolved_and_says_why() -> None:
    drawn = np.random.default_rng(0).lognormal(1.0, 0.7, 3000)
    lengths = np.clip(drawn, 1, 16).astype(int).tolist()
    plan = plan_of(lengths)
    summary = plan.summary()
    assert summary["strategy"] in ("fit", "stream")
    assert summary["strategy_reason"] == plan.reason
    assert "random draws" in plan.reason
    assert summary["fewest_bins"] <= summary["epochs"][0]["bins"]
    assert summary["fill_of_possible_percent"] == pytest.approx(
        100 * summary["fewest_bins"] / summary["epochs"][0]["bins"]
    )
    named = plan_of(lengths, strategy="dense")
    assert (named.options.strategy, named.reason) == ("dense", "asked for")
    assert named.summary()["likeness_in_bins"] > summary["likeness_in_bins"]
    assert plan_of(lengths, shuffle=False).reason == "follows the order of the samples where it can"
    single = plan_of(lengths, packed=False).summary()
    assert single["fill_of_possible_percent"] == 100.0
    assert single["strategy_reason"] == "one sample per bin"


def test_what_auto_chooses_is_the_same_plan_as_asking_for_it() -> None:
    lengths = [5, 3, 9, 12, 7, 1, 16, 4]
    auto, named = plan_of(lengths, num_epochs=3), plan_of(lengths, num_epochs=3, strategy="fit")
    assert auto.options == named.options
    assert auto.fingerprint == named.fingerprint
    assert steps_of(auto) == steps_of(named)


@settings(deadline=None, max_examples=60)
@given(some_lengths, st.integers(1, 4), st.integers(2, 5), st.integers(1, 3))
def test_a_buffer_reorders_bins_and_nothing_else(
    lengths: list[int], global_batch: int, buffer: int, epochs: int
) -> None:
    random = plan_of(lengths, global_batch_size=global_batch, num_epochs=epochs)
    alike = plan_of(
        lengths, global_batch_size=global_batch, num_epochs=epochs, balance_buffer=buffer, cost_ratio=0.12345
    )
    assert alike.options.cost_ratio == 0.12
    assert alike.steps_per_epoch == random.steps_per_epoch
    assert alike.fingerprint != random.fingerprint
    for epoch in range(epochs):
        first, stop = [0, *random.epoch_ends][epoch : epoch + 2]
        for start in range(first, stop, buffer):
            here = range(start, min(start + buffer, stop))
            bins = [sorted(bin for step in here for bin in steps_of(plan)[step]) for plan in (random, alike)]
            assert bins[0] == bins[1]
    assert steps_of(pickle.loads(pickle.dumps(alike))) == steps_of(alike)


def test_a_cost_ratio_without_a_buffer_is_no_part_of_the_plan() -> None:
    lengths = [5, 3, 9, 12, 7, 1, 16, 4]
    assert plan_of(lengths, cost_ratio=0.5).fingerprint == plan_of(lengths).fingerprint
    buffered = [plan_of(lengths, balance_buffer=2, cost_ratio=ratio).fingerprint for ratio in (0.5, 0.501, 0.6)]
    assert buffered[0] == buffered[1] != buffered[2]


def test_max_steps_runs_through_many_epochs() -> None:
    plan = plan_of([16] * 40, global_batch_size=1, max_steps=2000)
    assert plan.step(1999).epoch == 49
    assert plan.epoch_at(2000) == 50.0
