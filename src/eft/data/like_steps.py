"""Steps of bins of like cost: an option for many ranks, at the price of steps that are no longer random draws."""

from __future__ import annotations

import numpy as np
from numba import njit

from eft.core.records import Float64Array, Int32Array, Int64Array
from eft.data.packing import Packing, random_key
from eft.data.packing_kernels import shuffle_in_place


def like_steps(
    packing: Packing,
    lengths: Int32Array,
    *,
    step_bins: int,
    buffer_steps: int,
    cost_ratio: float,
    seed: int,
    epoch: int,
) -> Packing:
    """The same bins with those of like cost (tokens + `cost_ratio` · Σ len²) in the same step.

    Within every `buffer_steps` steps of `step_bins` bins, bins are sorted by cost and cut into steps, and the steps
    shuffled. The last steps make a smaller buffer; bins that fill no step stay the epoch's last ones.
    """
    bin_order = np.arange(packing.num_bins, dtype=np.int32)
    costs = _costs_of_bins(lengths, packing.order, packing.offsets, cost_ratio)
    num_steps = packing.num_bins // step_bins
    for number, first in enumerate(range(0, num_steps, buffer_steps)):
        here = slice(first * step_bins, min(first + buffer_steps, num_steps) * step_bins)
        steps = bin_order[here][np.argsort(costs[here], kind="stable")].reshape(-1, step_bins)
        places = np.arange(len(steps), dtype=np.int32)
        shuffle_in_place(places, random_key(seed, epoch, stage=2 + number))
        bin_order[here] = np.sort(steps, axis=1)[places].reshape(-1)
    sizes = np.diff(packing.offsets)[bin_order]
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    return Packing(_copy_bins(packing.order, packing.offsets, bin_order), offsets)


@njit(cache=True)
def _costs_of_bins(lengths: Int32Array, order: Int32Array, offsets: Int64Array, cost_ratio: float) -> Float64Array:
    """tokens + `cost_ratio` · Σ len² of each bin, float64 [bins]; `order` without marks."""
    costs = np.empty(len(offsets) - 1)
    for b in range(len(costs)):
        tokens = squares = np.int64(0)
        for i in range(offsets[b], offsets[b + 1]):
            length = np.int64(lengths[order[i]])
            tokens += length
            squares += length * length
        costs[b] = tokens + cost_ratio * squares
    return costs


@njit(cache=True)
def _copy_bins(order: Int32Array, offsets: Int64Array, bin_order: Int32Array) -> Int32Array:
    """The samples of the bins in `bin_order`, one bin after another."""
    out = np.empty_like(order)
    placed = 0
    for b in bin_order:
        for i in range(offsets[b], offsets[b + 1]):
            out[placed] = order[i]
            placed += 1
    return out
