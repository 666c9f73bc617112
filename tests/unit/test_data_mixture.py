"""Split, order and duplicates: every sample goes to exactly one place, the same one for the same seed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eft.core.errors import ConfigError, DataError
from eft.data.mixture import (
    Mixture,
    equal_to_any,
    first_of_each,
    held_out_count,
    merged_order,
    mix,
    random_order,
)
from eft.data.sample_set import Digests
from eft.data.shares import SourceShare


def digests(values: list[int]) -> Digests:
    # A trailing zero byte is what NumPy strips from S16: equal only where all 16 bytes are.
    return np.array([value.to_bytes(16, "little") for value in values], dtype="S16")


def mixed(ids: list[int], wholes: list[int] | None = None, **options: Any) -> Mixture:
    given_options: dict[str, Any] = {"seed": 1, "shuffle": True, "deduplicate": False, "val_set_size": 0.0} | options
    rows = np.array(given_options.pop("rows", range(len(ids))), dtype=np.int64)
    keys = np.array(given_options.pop("keys", range(len(ids))), dtype=np.uint64)
    return mix(digests(ids), digests(ids if wholes is None else wholes), rows, keys, **given_options)


@given(
    ids=st.lists(st.integers(0, 12), min_size=1, max_size=30),
    labels=st.lists(st.integers(0, 1), min_size=30, max_size=30),
    test_ids=st.lists(st.integers(0, 20), max_size=4),
    seed=st.integers(0, 2**32),
    size=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0, 3.0]),
    deduplicate=st.booleans(),
    shuffle=st.booleans(),
)
def test_every_sample_is_in_exactly_one_place(
    ids: list[int], labels: list[int], test_ids: list[int], seed: int, size: float, deduplicate: bool, shuffle: bool
) -> None:
    wholes = [2 * value + label for value, label in zip(ids, labels, strict=False)]
    options = {"seed": seed, "val_set_size": size, "deduplicate": deduplicate, "shuffle": shuffle}
    tests = digests(test_ids) if test_ids else None
    try:
        mixture = mixed(ids, wholes, test_id_digests=tests, **options)
    except DataError:
        return
    parts = (mixture.train, mixture.held_out, mixture.duplicates, mixture.held_out_duplicates)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(ids)))
    held_out_ids = {ids[index] for index in mixture.held_out} | set(test_ids)
    assert not held_out_ids & {ids[index] for index in mixture.train}
    assert all(ids[index] in held_out_ids for index in mixture.held_out_duplicates)
    kept = [wholes[index] for part in (mixture.train, mixture.held_out, mixture.held_out_duplicates) for index in part]
    if deduplicate:
        assert len(set(kept)) == len(kept)
        assert all(wholes[index] in wholes[:index] for index in mixture.duplicates)
    else:
        assert not len(mixture.duplicates)
    if not shuffle:
        assert mixture.train.tolist() == sorted(mixture.train.tolist())


def test_seeds_and_streams() -> None:
    ids = list(range(200))
    first, again, other = (mixed(ids, val_set_size=0.1, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.train, again.train)
    np.testing.assert_array_equal(first.held_out, again.held_out)
    assert set(first.held_out.tolist()) != set(other.held_out.tolist())
    unshuffled = mixed(ids, val_set_size=0.1, shuffle=False)
    np.testing.assert_array_equal(unshuffled.held_out, first.held_out)
    assert not np.array_equal(random_order(50, 7, 1), random_order(50, 7, 2))


def test_the_order_never_changes_between_versions() -> None:
    # A change here would silently give every user another held-out set and another order on resume.
    assert merged_order(10, 42, shuffle=True).tolist() == [2, 6, 0, 3, 4, 9, 7, 5, 8, 1]
    assert merged_order(4, 42, shuffle=False).tolist() == [0, 1, 2, 3]


def test_the_split_never_changes_between_versions() -> None:
    assert mixed(list(range(20)), val_set_size=3.0, seed=42).held_out.tolist() == [2, 12, 4]


@given(
    keys=st.lists(st.integers(0, 2**64 - 1), min_size=4, max_size=40, unique=True),
    data=st.data(),
    seed=st.integers(0, 99),
)
def test_the_split_goes_by_what_the_rows_are(keys: list[int], data: st.DataObject, seed: int) -> None:
    """Other rows may go, come or change places: who is held out is decided between each two rows alone."""

    def held_out(keys: list[int], size: int) -> set[int]:
        mixture = mixed(list(range(len(keys))), keys=keys, seed=seed, val_set_size=float(size))
        return {keys[index] for index in mixture.held_out}

    size = data.draw(st.integers(1, len(keys) - 2))
    before = held_out(keys, size)
    assert held_out(data.draw(st.permutations(keys)), size) == before
    gone = data.draw(st.sampled_from(keys))
    after = held_out([key for key in keys if key != gone], size)
    assert before - {gone} <= after
    assert len(after - before) == (gone in before)


def test_all_samples_of_a_row_are_on_one_side() -> None:
    rows = np.repeat(np.arange(30), 3)
    mixture = mixed(list(range(90)), rows=rows, keys=rows, val_set_size=0.2)
    assert len(mixture.held_out) == 18
    assert not set(rows[mixture.held_out]) & set(rows[mixture.train])
    assert len(set(rows[mixture.held_out].tolist())) == 6


def test_the_draw_is_uniform() -> None:
    hits = np.zeros(10)
    for seed in range(2000):
        hits[mixed(list(range(10)), seed=seed, val_set_size=3.0).held_out] += 1
    assert hits.min() > 520  # expected 600, standard deviation 20
    assert hits.max() < 680


@pytest.mark.parametrize(
    ("count", "size", "expected"),
    [(100, 0.0, 0), (100, 0.05, 5), (100, 0.001, 1), (100, 1.0, 1), (100, 30.0, 30), (3, 0.5, 2), (100, 99.0, 99)],
)
def test_held_out_counts(count: int, size: float, expected: int) -> None:
    assert held_out_count(count, size) == expected


@pytest.mark.parametrize(("count", "size"), [(100, 100.0), (100, 500.0), (1, 0.1), (2, 0.9), (1, 1.0)])
def test_nothing_left_to_train_on(count: int, size: float) -> None:
    with pytest.raises(DataError, match=f"val_set_size: {size:g} holds out .* of {count} rows"):
        held_out_count(count, size)


def test_half_rows_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"val_set_size: 20\.5"):
        held_out_count(100, 20.5)


def test_duplicates_of_the_held_out_rows_that_leave_nothing() -> None:
    with pytest.raises(DataError, match=r"of 4 samples 0 are duplicates, 1 are held out and 3 equal a held-out one"):
        mixed([5, 5, 5, 5], val_set_size=1.0)
    with pytest.raises(DataError, match="nothing is left"):
        mixed([5, 6], test_id_digests=digests([6, 5]))


def test_masks() -> None:
    values = digests([3, 1, 3, 256, 1])
    assert first_of_each(values).tolist() == [True, True, False, True, False]
    assert equal_to_any(values, digests([1, 0])).tolist() == [False, True, False, False, True]
    assert equal_to_any(values, digests([])).tolist() == [False] * 5


# ---- shares ----

SOURCES = st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=25), min_size=1, max_size=4)


def mixed_with_shares(sources: list[list[int]], shares: list[SourceShare], **options: Any) -> Mixture:
    lengths = np.array([length for source in sources for length in source], dtype=np.int32)
    sizes = [len(source) for source in sources]
    return mixed(list(range(len(lengths))), lengths=lengths, sizes=sizes, shares=shares, **options)


def tokens_of(mixture: Mixture, sources: list[list[int]]) -> list[int]:
    lengths = np.array([length for source in sources for length in source])
    starts = np.cumsum([0, *map(len, sources)])
    owner = np.searchsorted(starts, mixture.train, side="right") - 1
    return [int(lengths[mixture.train[owner == number]].sum()) for number in range(len(sources))]


@given(sources=SOURCES, parts=st.lists(st.integers(1, 9), min_size=4, max_size=4), free=st.booleans(), data=st.data())
def test_shares_of_the_tokens_are_within_one_sample(
    sources: list[list[int]], parts: list[int], free: bool, data: st.DataObject
) -> None:
    parts = parts[: len(sources)]
    whole = sum(parts) + free
    asked = [part / whole for part in parts]
    shares = [SourceShare(token_share=share) for share in asked]
    if free:
        sources = [*sources, [5, 7, 9]]
        asked, shares = [*asked, 1 / whole], [*shares, SourceShare(weight=3.0)]
    total = data.draw(st.one_of(st.none(), st.integers(50, 3000)))
    mixture = mixed_with_shares(sources, shares, epoch_tokens=total, seed=data.draw(st.integers(0, 99)))
    wanted = total if total is not None else sum(map(sum, sources))
    for source, share, found in zip(sources, asked, tokens_of(mixture, sources), strict=True):
        assert abs(found - share * wanted) <= max(source)


@given(sources=SOURCES, weights=st.lists(st.integers(1, 40), min_size=4, max_size=4), seed=st.integers(0, 99))
def test_weights_repeat_and_leave_out(sources: list[list[int]], weights: list[int], seed: int) -> None:
    shares = [SourceShare(weight=weight / 8) for weight in weights[: len(sources)]]
    try:
        mixture = mixed_with_shares(sources, shares, seed=seed)
    except DataError:
        return  # a tenth of one sample is none
    times = np.bincount(mixture.train, minlength=sum(map(len, sources)))
    start = 0
    for source, share in zip(sources, shares, strict=True):
        mine = times[start : start + len(source)]
        assert abs(mine.sum() - share.weight * len(source)) <= 1
        assert int(mine.max()) - int(mine.min()) <= 1
        start += len(source)
    assert sorted(np.concatenate([np.unique(mixture.train), mixture.not_drawn]).tolist()) == list(range(start))
    again = mixed_with_shares(sources, shares, seed=seed)
    assert np.array_equal(mixture.train, again.train)


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=40),
    max_rows=st.integers(1, 45),
    max_tokens=st.integers(30, 600),
)
def test_caps_keep_whole_rows(lengths: list[int], max_rows: int, max_tokens: int) -> None:
    """Two samples a row."""
    rows = [index // 2 for index in range(len(lengths))]
    share = SourceShare(max_rows=max_rows, max_tokens=max_tokens)
    try:
        mixture = mixed_with_shares([lengths], [share], rows=rows, keys=rows)
    except DataError:
        return  # the first row alone is over the cap
    kept = {rows[index] for index in mixture.train}
    assert sorted(mixture.train.tolist()) == [index for index in range(len(lengths)) if rows[index] in kept]
    assert len(kept) <= max_rows
    tokens = sum(lengths[index] for index in mixture.train)
    assert tokens <= max_tokens
    assert sorted([*mixture.train.tolist(), *mixture.over_cap.tolist()]) == list(range(len(lengths)))
    alone = mixed_with_shares([lengths], [SourceShare(max_rows=max_rows)], rows=rows, keys=rows)
    assert len({rows[index] for index in alone.train}) == min(max_rows, len(set(rows)))


def test_rows_that_are_added_hardly_change_what_is_drawn() -> None:
    few = mixed_with_shares([[3] * 400], [SourceShare(weight=0.5)])
    more = mixed_with_shares([[3] * 420], [SourceShare(weight=0.5)])
    assert len(set(few.train.tolist()) & set(more.train.tolist())) >= 180


def test_nothing_asked_changes_nothing() -> None:
    plain = mixed(list(range(30)))
    asked = mixed_with_shares([[3] * 10, [4] * 20], [SourceShare(), SourceShare()])
    assert np.array_equal(plain.train, asked.train)
