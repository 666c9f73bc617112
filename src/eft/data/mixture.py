"""Which samples are trained, which are held out, in which order: pure functions on index and digest arrays.

Orders come from the raw 64-bit output of PCG64, which NumPy guarantees to stay the same, ranked by a stable sort; the
methods of `numpy.random.Generator` carry no such guarantee. Equal seeds give equal splits on every version and machine.

Which rows are held out goes by the content of each row, ranked by a hash with the seed: rows that are added, changed,
moved or dropped elsewhere hardly move the split, and other templates, tokenizers or lengths do not move it at all. All
samples of a row are on the same side.

"Held-out duplicate" means equal input ids after tokenisation (and truncation), whatever the labels: the model would
otherwise be graded on text it was trained on. Samples that share only their prompt with a held-out one stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from eft.core.errors import ConfigError, DataError
from eft.core.records import Int32Array, Int64Array
from eft.data.sample_set import Digests
from eft.data.shares import SourceShare, draw

BoolArray = npt.NDArray[np.bool_]
UInt64Array = npt.NDArray[np.uint64]

# Streams of the seed: the split must not move when the order does, nor the other way round.
_SPLIT_STREAM = 1
_ORDER_STREAM = 2
_DRAW_STREAM = 3


def random_order(count: int, seed: int, stream: int) -> Int64Array:
    """A random permutation of 0..count-1, int64 [count]; other streams of a seed are independent of it."""
    keys = np.random.PCG64(np.random.SeedSequence([seed, stream])).random_raw(count)
    return np.argsort(keys, kind="stable")


def merged_order(count: int, seed: int, *, shuffle: bool) -> Int64Array:
    """Order of the samples of all data sets together, int64 [count]: random by `seed`, or as they came."""
    return random_order(count, seed, _ORDER_STREAM) if shuffle else np.arange(count, dtype=np.int64)


def held_out_count(count: int, val_set_size: float) -> int:
    """How many of `count` rows `val_set_size` holds out: 0, a share below 1 (rounded, at least one), or a number.

    Raises ConfigError when a size of 1 and more is not whole, DataError when nothing would be left to train on.
    """
    if val_set_size <= 0:
        return 0
    if val_set_size < 1:
        held_out = max(1, round(val_set_size * count))
    elif val_set_size == int(val_set_size):
        held_out = int(val_set_size)
    else:
        raise ConfigError(
            f"val_set_size: {val_set_size}: a share below 1, or a whole number of rows; did you mean "
            f"{int(val_set_size)}?"
        )
    if held_out >= count:
        raise DataError(
            f"val_set_size: {val_set_size:g} holds out {held_out} of {count} rows and leaves none to train on; give "
            "a smaller number or more rows"
        )
    return held_out


def first_of_each(digests: Digests) -> BoolArray:
    """True at the first of each group of equal digests, bool [samples]."""
    _, first = np.unique(digests, return_index=True)
    mask = np.zeros(len(digests), dtype=np.bool_)
    mask[first] = True
    return mask


def equal_to_any(digests: Digests, held_out: Digests) -> BoolArray:
    """True where a digest occurs in `held_out`, bool [samples]."""
    found = np.zeros(len(digests), dtype=np.bool_)
    if len(held_out):
        # Numbers are compared several times faster than byte strings, and few digests share their first half.
        candidates = np.flatnonzero(np.isin(_first_half(digests), _first_half(held_out)))
        found[candidates] = np.isin(digests[candidates], held_out)
    return found


def _first_half(digests: Digests) -> UInt64Array:
    return np.ascontiguousarray(digests).view(np.uint64).reshape(-1, 2)[:, 0]


def row_ranks(row_keys: UInt64Array, seed: int, stream: int = _SPLIT_STREAM) -> UInt64Array:
    """A random number per row, uint64 [rows], the same for equal rows; the lowest are held out first."""
    mixed = row_keys ^ np.random.PCG64(np.random.SeedSequence([seed, stream])).random_raw(1)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # the finaliser of SplitMix64
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))


def _held_out(candidates: Int64Array, rows: Int64Array, row_keys: UInt64Array, seed: int, size: float) -> Int64Array:
    """The samples among `candidates` of the rows that are held out, in the order of the draw."""
    starts_row = np.diff(rows[candidates], prepend=-1) != 0
    firsts = candidates[starts_row]
    count = held_out_count(len(firsts), size)
    if not count:
        return np.zeros(0, dtype=np.int64)
    ranks = np.empty(len(firsts), dtype=np.int64)
    ranks[np.argsort(row_ranks(row_keys[firsts], seed), kind="stable")] = np.arange(len(firsts))
    rank = ranks[np.cumsum(starts_row) - 1]
    chosen = rank < count
    held_out: Int64Array = candidates[chosen][np.argsort(rank[chosen], kind="stable")]
    return held_out


@dataclass(frozen=True)
class Mixture:
    """What becomes of each of `count` samples: every index 0..count-1 is in exactly one of the six arrays, and only in
    `train` possibly several times."""

    train: Int64Array
    """In the order of the epoch's sample list, before the plan's own shuffle."""
    held_out: Int64Array
    """In the order of the draw."""
    duplicates: Int64Array
    """Equal to an earlier sample (ids, labels, weights), ascending; empty without deduplication."""
    held_out_duplicates: Int64Array
    """Left out of training because their ids equal a held-out sample's, ascending."""
    over_cap: Int64Array
    """Of rows beyond `max_rows` or `max_tokens`."""
    not_drawn: Int64Array
    """Left out by a `weight` below 1 or a `token_share`."""


def mix(
    id_digests: Digests,
    sample_digests: Digests,
    rows: Int64Array,
    row_keys: UInt64Array,
    *,
    seed: int,
    shuffle: bool,
    deduplicate: bool,
    val_set_size: float,
    test_id_digests: Digests | None = None,
    lengths: Int32Array | None = None,
    sizes: Sequence[int] = (),
    shares: Sequence[SourceShare] = (),
    epoch_tokens: int | None = None,
) -> Mixture:
    """Deduplicate, then draw the held-out part, then remove its duplicates (and those of the test sets) from training,
    then repeat or leave out samples of each data set as it asks (`shares`; `sizes` has the samples of each).

    `id_digests`, `sample_digests`: S16 [samples], all data sets one after the other; `rows`: a number ≥ 0 per sample,
    int64, equal for neighbours of the same row; `row_keys`: a hash of each sample's row, uint64; `test_id_digests`: of
    all samples of `test_datasets`. Raises DataError when no sample would be left to train on.
    """
    count = len(id_digests)
    unique = first_of_each(sample_digests) if deduplicate else np.ones(count, dtype=np.bool_)
    candidates = np.flatnonzero(unique)
    held_out = _held_out(candidates, rows, row_keys, seed, val_set_size)
    is_held_out = np.zeros(count, dtype=np.bool_)
    is_held_out[held_out] = True
    forbidden = id_digests[held_out]
    if test_id_digests is not None:
        forbidden = np.concatenate([forbidden, test_id_digests])
    leaks = unique & ~is_held_out & equal_to_any(id_digests, forbidden)
    train = np.flatnonzero(unique & ~is_held_out & ~leaks)
    if not len(train):
        raise DataError(
            f"nothing is left to train on: of {count} samples {count - len(candidates)} are duplicates, "
            f"{len(held_out)} are held out and {int(leaks.sum())} equal a held-out one; hold out other rows, or fewer"
        )
    over_cap = not_drawn = np.zeros(0, dtype=np.int64)
    if lengths is not None and any(share != SourceShare() for share in shares):
        bounds = np.searchsorted(train, np.cumsum([0, *sizes])).tolist()
        parts = [train[first:last] for first, last in pairwise(bounds)]
        ranks = [row_ranks(row_keys[part], seed, _DRAW_STREAM).astype(np.int64) for part in parts]
        drawn = draw(parts, ranks, [rows[p] for p in parts], [lengths[p] for p in parts], shares, epoch_tokens)
        train = np.concatenate([one.taken for one in drawn])
        over_cap = np.concatenate([one.over_cap for one in drawn])
        not_drawn = np.concatenate([one.not_drawn for one in drawn])
        if not len(train):
            raise DataError("nothing is left to train on: `weight`, `token_share` and caps leave out every sample")
    return Mixture(
        train=train[merged_order(len(train), seed, shuffle=shuffle)],
        held_out=held_out,
        duplicates=np.flatnonzero(~unique),
        held_out_duplicates=np.flatnonzero(leaks),
        over_cap=over_cap,
        not_drawn=not_drawn,
    )
