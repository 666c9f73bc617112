"""A step's bins shared out to ranks so that none waits long for another, and how long they will wait.

Ranks wait for each other once per optimizer step, so what counts is the cost of a rank's whole share. The cost of a bin
is tokens + k·Σ len² (attention is quadratic within a document); k comes from the model's shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numba import njit

from eft.core.records import Float64Array, Int32Array, Int64Array
from eft.data.plan import Plan, StepPlan

_CLOSE_ENOUGH = 1.0005
"""Costliest share ÷ lower bound at which no better share is looked for."""
_RESTARTS_OF_ONE = 1024
"""Restarts × costs of a step: 32 restarts for 8 ranks at accumulation 4, 4 for 64 ranks."""
_MEASURED_STEPS = 512

_FIRST_STATE = np.uint64(1)
_MULTIPLIER, _INCREMENT = np.uint64(6364136223846793005), np.uint64(1442695040888963407)
_HIGH_BITS = np.uint64(20)


def bin_costs(lengths: Int32Array, bins: Sequence[Int32Array], cost_ratio: float) -> Float64Array:
    """Relative compute of each bin, float64 [bins]: tokens + `cost_ratio` · Σ len².

    Sums are of integers, so every machine of a job comes to the same number and so to the same shares.
    """
    documents = lengths[np.concatenate(bins)].astype(np.int64)
    starts = np.concatenate([[0], np.cumsum([len(ids) for ids in bins[:-1]], dtype=np.int64)])
    tokens, squares = np.add.reduceat(documents, starts), np.add.reduceat(documents * documents, starts)
    return tokens + cost_ratio * squares


def share_step(
    step: StepPlan, costs: Sequence[float] | Float64Array, world_size: int, accumulation: int, micro_batch_size: int
) -> list[list[list[Int32Array]]]:
    """The step's bins as [rank][micro-batch] lists, balanced by `costs` (one per bin), the same on every rank.

    Each rank has exactly `accumulation` micro-batches of at most `micro_batch_size` bins; an empty one stands for the
    dummy document. Alone, a rank keeps the plan's order of bins as far as balance allows; several ranks go from their
    heaviest micro-batch to their lightest, so that they wait less for each other where every micro-batch synchronises.
    """
    costs = np.asarray(costs, np.float64)
    assert len(costs) == len(step.bins) <= world_size * accumulation * micro_batch_size
    shares = []
    for members in groups_of(costs, world_size, accumulation * micro_batch_size):
        groups = [members[group] for group in groups_of(costs[members], accumulation, micro_batch_size)]
        if world_size == 1:
            groups.sort(key=lambda group: (not len(group), group.tolist()))
        else:
            groups.sort(key=lambda group: -float(costs[group].sum()))
        shares.append([[step.bins[member] for member in group] for group in groups])
    return shares


@dataclass(frozen=True)
class RankShare:
    """Which part of every optimizer step one rank trains, in how many micro-batches."""

    rank: int = 0
    world_size: int = 1
    accumulation: int = 1
    """Micro-batches of a step on each rank."""
    micro_batch_size: int = 1
    """Most bins of a micro-batch."""
    cost_ratio: float = 0.0
    """k in the cost of a bin, tokens + k·Σ len², by which ranks are balanced."""

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.world_size

    @property
    def step_bins(self) -> int:
        """Most bins of a step, over all ranks."""
        return self.world_size * self.accumulation * self.micro_batch_size

    def of(self, step: StepPlan, lengths: Int32Array) -> list[list[Int32Array]]:
        """This rank's bins by micro-batch, as `share_step` deals them; `lengths` are those of the bins' samples."""
        if self.world_size == self.micro_batch_size == 1:
            # Nothing to balance: what `share_step` says, too, only that it works out costs first.
            return [[ids] for ids in step.bins] + [[] for _ in range(self.accumulation - len(step.bins))]
        costs = bin_costs(lengths, step.bins, self.cost_ratio)
        return share_step(step, costs, self.world_size, self.accumulation, self.micro_batch_size)[self.rank]


def groups_of(costs: Float64Array, num_groups: int, limit: int) -> list[Int64Array]:
    """Indices of `costs`, ascending, in `num_groups` groups of at most `limit`, the costliest as cheap as can be."""
    if num_groups == 1:
        return [np.arange(len(costs))]
    if limit == 1 or len(costs) == 0:
        return [*np.arange(len(costs)).reshape(-1, 1), *([np.arange(0)] * (num_groups - len(costs)))]
    groups = np.empty(len(costs), np.int64)
    descending = np.argsort(-costs, kind="stable")
    groups[descending] = _spread(costs[descending], num_groups, limit, share_bound(costs, num_groups, limit))
    by_group = np.argsort(groups, kind="stable")
    return np.split(by_group, np.cumsum(np.bincount(groups, minlength=num_groups))[:-1])


def share_bound(costs: Float64Array, num_groups: int, limit: int) -> float:
    """A lower bound on the costliest of `num_groups` groups of at most `limit` costs each, which is at least 1.

    The largest of: the mean; for the i costliest, either two of them share a group, or i groups hold one of them each
    and `limit` - 1 others, at least the cheapest ones (groups that are not full hold costs of 0); of the j·groups + 1
    costliest, j + 1 that share a group; for pairs, costs i and 2·groups + 1 - i in descending order.
    """
    places = num_groups * limit
    assert len(costs) <= places
    ascending = np.zeros(places)
    ascending[places - len(costs) :] = np.sort(costs)
    descending = ascending[::-1]
    mean = float(costs.sum()) / num_groups
    if limit == 1:
        return max(mean, float(descending[0]))
    if limit == 2:
        return max(mean, float((descending[:num_groups] + ascending[:num_groups]).max()))
    count = np.arange(1, num_groups + 1)
    cheapest = np.concatenate([[0.0], np.cumsum(ascending)])
    together = np.concatenate([[np.inf], descending[: num_groups - 1] + descending[1:num_groups]]) + cheapest[limit - 2]
    apart = (np.cumsum(descending[:num_groups]) + cheapest[count * (limit - 1)]) / count
    crowded = [
        float(descending[j * num_groups - j : j * num_groups + 1].sum() + cheapest[limit - j - 1])
        for j in range(1, limit)
    ]
    return max(mean, float(np.minimum(together, apart).max()), *crowded)


@njit(cache=True)
def _swap(
    members: Int64Array, loads: Float64Array, costs: Float64Array, one: int, place: int, two: int, there: int
) -> None:
    """Exchanges two places of two groups, and adds up their loads anew."""
    members[one, place], members[two, there] = members[two, there], members[one, place]
    for group in (one, two):
        loads[group] = 0.0
        for at in range(members.shape[1]):
            if members[group, at] >= 0:
                loads[group] += costs[members[group, at]]


@njit(cache=True)
def _exchange(members: Int64Array, loads: Float64Array, costs: Float64Array, enough: float) -> None:
    """Improves groups in place until the heaviest load is at most `enough` or no exchange lowers it.

    An exchange takes a cost of the heaviest group against a smaller one, or a free place, of another group, so that the
    heavier of the two becomes as light as it can.
    """
    num_groups, limit = members.shape
    for _ in range(4 * len(costs)):
        heaviest = int(np.argmax(loads))
        if loads[heaviest] <= enough:
            return
        best, mine, other, theirs = loads[heaviest], -1, -1, -1
        for place in range(limit):
            for group in range(num_groups):
                if members[heaviest, place] < 0 or loads[group] >= best:
                    continue
                for there in range(limit):
                    given = costs[members[heaviest, place]]
                    taken = costs[members[group, there]] if members[group, there] >= 0 else 0.0
                    after = max(loads[heaviest] - given + taken, loads[group] + given - taken)
                    if after < best:
                        best, mine, other, theirs = after, place, group, there
        if mine < 0 or best > loads[heaviest] * (1.0 - 1e-9):
            return
        _swap(members, loads, costs, heaviest, mine, other, theirs)


@njit(cache=True)
def _spread(costs: Float64Array, num_groups: int, limit: int, bound: float) -> Int64Array:
    """The group of each of `costs`, which descend: each to the lightest group with room, then exchanges.

    Where exchanges end above the bound, two random ones are made and it goes on from there, if that leads to something
    better: a fixed number of times, less often for many costs, by a generator of fixed seed.
    """
    members = np.full((num_groups, limit), -1, np.int64)
    held = np.zeros(num_groups, np.int64)
    loads = np.zeros(num_groups)
    for i in range(len(costs)):
        lightest = 0
        for group in range(1, num_groups):
            if held[group] < limit and (held[lightest] == limit or loads[group] < loads[lightest]):
                lightest = group
        members[lightest, held[lightest]] = i
        held[lightest] += 1
        loads[lightest] += costs[i]
    _exchange(members, loads, costs, _CLOSE_ENOUGH * bound)
    state = _FIRST_STATE
    for _ in range(_RESTARTS_OF_ONE // len(costs)):
        if loads.max() <= _CLOSE_ENOUGH * bound:
            break
        other, other_loads = members.copy(), loads.copy()
        for move in range(2):
            state = state * _MULTIPLIER + _INCREMENT
            draw = np.int64(state >> _HIGH_BITS)
            one = np.int64(np.argmax(other_loads)) if move == 0 else draw % num_groups
            two = (draw // num_groups) % num_groups
            place, there = (draw // num_groups**2) % limit, (draw // (num_groups**2 * limit)) % limit
            if other[one, place] >= 0 and other[two, there] >= 0:
                _swap(other, other_loads, costs, one, place, two, there)
        _exchange(other, other_loads, costs, _CLOSE_ENOUGH * bound)
        if other_loads.max() < loads.max():
            members, loads = other, other_loads
    groups = np.empty(len(costs), np.int64)
    for group in range(num_groups):
        for at in range(limit):
            if members[group, at] >= 0:
                groups[members[group, at]] = group
    return groups


@dataclass(frozen=True)
class Balance:
    """How evenly the steps of a plan are shared out; shares of time, as the cost model has it."""

    world_size: int
    idle: float
    """Time that ranks wait for the slowest one ÷ time of all ranks, over all steps."""
    least_idle: float
    """The same if every step were at its lower bound: less is not possible for these steps."""
    worst_step: float
    """Largest costliest share ÷ lower bound of a step."""
    steps: int
    """Steps that were measured, evenly spaced over the first epoch."""


def expected_balance(plan: Plan, cost_ratio: float, world_size: int, bins_per_rank: int) -> Balance:
    """What `share_step` makes of the plan's steps on `world_size` ranks of at most `bins_per_rank` bins each."""
    steps = plan.steps_per_epoch[0]
    measured = np.unique(np.linspace(0, steps - 1, min(steps, _MEASURED_STEPS), dtype=np.int64))
    slowest, bounds, means = (np.empty(len(measured)) for _ in range(3))
    for at, number in enumerate(measured):
        costs = bin_costs(plan.dataset.lengths, plan.step(int(number)).bins, cost_ratio)
        slowest[at] = max(costs[group].sum() for group in groups_of(costs, world_size, bins_per_rank))
        bounds[at], means[at] = share_bound(costs, world_size, bins_per_rank), costs.sum() / world_size
    return Balance(
        world_size,
        idle=1.0 - float(means.sum() / slowest.sum()),
        least_idle=1.0 - float(means.sum() / bounds.sum()),
        worst_step=float((slowest / bounds).max()),
        steps=len(measured),
    )
