"""Loaders: the plan's samples, all of them, on every world size, from any step on, without touching a random state."""

from __future__ import annotations

import pickle
import random
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from eft.core.constants import IGNORE_INDEX
from eft.core.errors import DataError
from eft.core.records import TokenSample
from eft.data.balance import RankShare, bin_costs, share_step
from eft.data.collators import Batch, PackedCollator, PaddedCollator
from eft.data.loader import _one_ahead, build_eval_loader, build_train_loader
from eft.data.plan import Plan, build_eval_plan, build_plan

CAPACITY = 16


class FakeDataset:
    """Sample i is its own number, over and over, all trained: a batch tells which samples it holds."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = np.array(lengths, np.int32)
        self.trainable_counts = self.lengths - 1
        self.weight_sums = self.trainable_counts.astype(np.float64)
        self.fingerprint = "fake"

    def __len__(self) -> int:
        return len(self.lengths)

    def sample(self, index: int) -> TokenSample:
        assert type(index) is int
        ids = np.full(self.lengths[index], index, np.int32)
        return TokenSample(ids, ids)


def plan_of(dataset: FakeDataset, global_batch_size: int, **changes: Any) -> Plan:
    options: dict[str, Any] = {"packed": True, "num_epochs": 2.0, "max_steps": None, **changes}
    return build_plan(
        dataset,
        capacity=CAPACITY,
        sequential=False,
        shuffle=True,
        global_batch_size=global_batch_size,
        seed=5,
        **options,
    )


def loader_of(dataset: FakeDataset, plan: Plan, shape: tuple[int, int, int], **changes: Any) -> DataLoader[Batch]:
    """`shape`: ranks, accumulation, micro-batch size."""
    options: dict[str, Any] = {"cursor": lambda: 0, **changes}
    share = RankShare(options.pop("rank", 0), *shape, options.pop("cost_ratio", 0.0))
    return build_train_loader(
        dataset,
        plan,
        options.pop("collator", PackedCollator()),
        share=share,
        **options,
    )


def ids_in(batch: Batch) -> list[int]:
    """The samples of a packed batch, in order."""
    if not batch["num_tokens"]:
        return []
    starts = batch["cu_seq_lens_q"][:-1].long()
    return [int(i) for i in batch["input_ids"][0, starts]]


lengths_lists = st.lists(st.integers(2, CAPACITY), min_size=1, max_size=60)
shapes = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))


@settings(deadline=None, max_examples=80)
@given(lengths_lists, shapes, st.booleans(), st.sampled_from([0.0, 0.1]))
def test_the_ranks_together_train_every_sample_once_an_epoch(
    lengths: list[int], shape: tuple[int, int, int], packed: bool, cost_ratio: float
) -> None:
    dataset = FakeDataset(lengths)
    world_size, accumulation, micro_batch_size = shape
    plan = plan_of(dataset, world_size * accumulation * micro_batch_size, packed=packed)
    ranks = [list(loader_of(dataset, plan, shape, rank=rank, cost_ratio=cost_ratio)) for rank in range(world_size)]
    seen: list[list[int]] = [[], []]
    for number in range(plan.total_steps):
        step = plan.step(number)
        mine = slice(number * accumulation, (number + 1) * accumulation)
        batches = [batch for rank in ranks for batch in rank[mine]]
        found = sorted(i for batch in batches for i in ids_in(batch))
        assert found == sorted(np.concatenate(step.bins).tolist())
        assert all(batch["step"] == number and batch["step_weight"] == step.weight for batch in batches)
        # E2's divisor: the plan's Σ weight is what the batches of all ranks train.
        assert sum(batch["num_trained"] for batch in batches) == step.weight
        assert sum(batch["num_tokens"] for batch in batches) == step.tokens
        seen[step.epoch] += found
    assert [sorted(epoch) for epoch in seen] == [list(range(len(lengths)))] * 2
    assert all(len(batches) == plan.total_steps * accumulation for batches in ranks)


@settings(deadline=None, max_examples=40)
@given(lengths_lists, shapes, st.integers(0, 200))
def test_from_any_step_on_it_is_the_tail_of_the_straight_run(
    lengths: list[int], shape: tuple[int, int, int], at: int
) -> None:
    dataset = FakeDataset(lengths)
    world_size, accumulation, micro_batch_size = shape
    plan = plan_of(dataset, world_size * accumulation * micro_batch_size, max_steps=9)
    cursor = at % (plan.total_steps + 1)
    position = [0]
    # The loader is built before the trainer has restored its state: the cursor counts when iteration starts.
    loader = loader_of(dataset, plan, shape, rank=world_size - 1, cursor=lambda: position[0])
    straight = list(loader)
    position[0] = cursor
    resumed = list(loader)
    assert len(loader) == plan.total_steps * accumulation == len(straight)
    assert len(resumed) == (plan.total_steps - cursor) * accumulation
    for one, other in zip(straight[cursor * accumulation :], resumed, strict=True):
        assert one["step"] == other["step"]
        assert one["step_weight"] == other["step_weight"]
        assert torch.equal(one["input_ids"], other["input_ids"])
        assert torch.equal(one["cu_seq_lens_q"], other["cu_seq_lens_q"])


def test_other_ranks_and_micro_batches_see_the_same_steps() -> None:
    dataset = FakeDataset([2 + i % 15 for i in range(100)])
    plan = plan_of(dataset, 12)

    def samples_of_steps(shape: tuple[int, int, int]) -> list[set[int]]:
        steps: list[set[int]] = [set() for _ in range(plan.total_steps)]
        for rank in range(shape[0]):
            for batch in loader_of(dataset, plan, shape, rank=rank):
                steps[batch["step"]] |= set(ids_in(batch))
        return steps

    alone = samples_of_steps((1, 12, 1))
    assert samples_of_steps((4, 3, 1)) == samples_of_steps((2, 2, 3)) == samples_of_steps((5, 1, 3)) == alone


def random_states() -> list[Any]:
    return [torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()]


# Python 3.12 and later warn of any fork in a process with threads; torch's workers do only what torch makes safe.
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_no_global_random_state_is_touched(num_workers: int) -> None:
    dataset = FakeDataset([3, 9, 16, 4, 8, 8, 2])
    plan = plan_of(dataset, 2, packed=num_workers == 0)
    before = random_states()
    batches = list(loader_of(dataset, plan, (1, 2, 1), num_workers=num_workers))
    eval_plan = build_eval_plan(dataset, capacity=CAPACITY, packed=True)
    evaluated = list(
        build_eval_loader(
            dataset, eval_plan, PackedCollator(), rank=0, world_size=1, batch_size=2, num_workers=num_workers
        )
    )
    assert random_states() == before
    # Workers deliver in plan order and leave numbers as they are.
    assert [batch["step"] for batch in batches] == [k for k in range(plan.total_steps) for _ in range(2)]
    assert sorted(i for batch in batches for i in ids_in(batch)) == sorted([*range(7), *range(7)])
    assert [i for batch in evaluated for i in ids_in(batch)] == list(range(7))
    assert all(type(batch["step_weight"]) is float and type(batch["max_length_q"]) is int for batch in batches)


def test_a_short_step_is_filled_with_dummies() -> None:
    dataset = FakeDataset([16] * 5)
    plan = plan_of(dataset, 4, num_epochs=1.0)
    ranks = [list(loader_of(dataset, plan, (2, 2, 1), rank=rank)) for rank in range(2)]
    assert [[len(ids_in(batch)) for batch in rank] for rank in ranks] == [[1, 1, 1, 0], [1, 1, 0, 0]]
    dummy = ranks[1][-1]
    assert dummy["step"] == 1
    assert dummy["step_weight"] == 15.0
    assert (dummy["shift_labels"] == IGNORE_INDEX).all()


def test_padded_rows_and_a_global_batch_that_does_not_divide() -> None:
    dataset = FakeDataset([5, 9, 3])
    plan = plan_of(dataset, 3, packed=False, num_epochs=1.0)
    (first, second) = loader_of(dataset, plan, (1, 2, 2), collator=PaddedCollator(pad_token_id=77))
    assert first["input_ids"].shape[0] + second["input_ids"].shape[0] == 3
    with pytest.raises(AssertionError):
        loader_of(dataset, plan, (1, 1, 2))


@settings(deadline=None, max_examples=60)
@given(lengths_lists, st.integers(1, 4), st.integers(1, 3), st.booleans())
def test_evaluation_covers_the_split_with_equally_many_batches_a_rank(
    lengths: list[int], world_size: int, batch_size: int, packed: bool
) -> None:
    dataset = FakeDataset(lengths)
    plan = build_eval_plan(dataset, capacity=CAPACITY, packed=packed)
    ranks = []
    for rank in range(world_size):
        loader = build_eval_loader(
            dataset, plan, PackedCollator(), rank=rank, world_size=world_size, batch_size=batch_size
        )
        ranks.append(list(loader))
        assert len(loader) == len(ranks[-1]) == len(ranks[0])
    turns = [batch for turn in zip(*ranks, strict=True) for batch in turn]
    assert [i for batch in turns for i in ids_in(batch)] == list(range(len(lengths)))
    assert {batch["step_weight"] for batch in turns} == {dataset.weight_sums.sum()}
    assert sum(batch["num_trained"] for batch in turns) == dataset.weight_sums.sum()
    assert all(len(batch["cu_seq_lens_q"]) - 1 <= batch_size or packed for batch in turns)


def test_what_travels_to_a_worker_is_small() -> None:
    """The data set and the collator, never the plan."""
    dataset = FakeDataset([8] * 1000)
    loader = loader_of(dataset, plan_of(dataset, 4), (1, 4, 1))
    assert len(pickle.dumps(loader.dataset)) < len(pickle.dumps(dataset)) + 500


@given(lengths_lists, st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_alone_a_rank_shares_as_the_balance_says(lengths: list[int], accumulation: int) -> None:
    dataset = FakeDataset(lengths)
    plan = plan_of(dataset, accumulation)
    batches = iter(loader_of(dataset, plan, (1, accumulation, 1)))
    for number in range(plan.total_steps):
        step = plan.step(number)
        shares = share_step(step, bin_costs(dataset.lengths, step.bins, 0.5), 1, accumulation, 1)
        expected = [[int(i) for ids in bins for i in ids] for bins in shares[0]]
        assert [ids_in(next(batches)) for _ in expected] == expected


def test_one_batch_is_fetched_ahead_and_no_more() -> None:
    fetched: list[int] = []

    def numbers() -> Iterator[Batch]:
        for number in range(4):
            fetched.append(number)
            yield {"number": number}

    batches = _one_ahead(numbers())
    assert fetched == []
    assert next(batches) == {"number": 0}
    assert next(batches) == {"number": 1}
    assert len(fetched) <= 3
    assert [batch["number"] for batch in batches] == [2, 3]
    assert fetched == [0, 1, 2, 3]


def test_what_fails_ahead_fails_where_its_batch_is_asked_for() -> None:
    def numbers() -> Iterator[Batch]:
        yield {"number": 0}
        raise DataError("row 7: damaged")

    batches = _one_ahead(numbers())
    assert next(batches) == {"number": 0}
    with pytest.raises(DataError, match="row 7"):
        next(batches)


def test_an_early_end_leaves_no_thread() -> None:
    batches = _one_ahead(iter([{"number": number} for number in range(9)]))
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert [thread for thread in threading.enumerate() if thread.name.startswith("eft-batches")] == []
