"""Numbers made ready to draw."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eft.report.series import (
    Series,
    format_number,
    format_tick,
    nice_step,
    smooth,
    step_axis,
    thin,
    value_axis,
    wants_log,
)

finite = st.floats(-1e9, 1e9)


@given(st.lists(finite, min_size=1, max_size=60), st.floats(1, 20))
def test_smoothed_values_stay_within_the_values(values: list[float], span: float) -> None:
    averages = smooth(values, span)
    room = 1e-6 * max(1.0, *map(abs, values))
    assert len(averages) == len(values)
    assert all(min(values) - room <= a <= max(values) + room for a in averages)


def test_smoothing_neither_lags_nor_leans_at_the_ends() -> None:
    line = [float(i) for i in range(100)]
    averages = smooth(line, 5)
    assert averages[50] == pytest.approx(50.0, abs=1e-3)
    assert averages == pytest.approx([99 - a for a in reversed(averages)])
    assert smooth([2.0] * 7, 5) == pytest.approx([2.0] * 7)


def test_smoothing_leaves_out_what_is_not_finite() -> None:
    assert smooth([1.0, math.nan, 1.0, math.inf], 3) == pytest.approx([1.0] * 4)
    assert all(map(math.isnan, smooth([math.nan, math.nan], 3)))


def test_span_one_changes_nothing() -> None:
    assert smooth([3.0, 1.0, 2.0], 1) == [3.0, 1.0, 2.0]


def test_thinning_keeps_ends_and_spikes() -> None:
    values = [1.0] * 10_000
    values[4_321], values[8_765], values[5_000] = 99.0, -99.0, math.nan
    series = thin(Series("loss", list(range(10_000)), values, "faint", 2), 400)
    assert 200 <= len(series.x) <= 410
    assert series.x[0] == 0
    assert series.x[-1] == 9_999
    assert list(series.x) == sorted(series.x)
    assert {99.0, -99.0} <= set(series.y)
    assert (series.look, series.colour, series.label) == ("faint", 2, "loss")
    short = Series("a", [0, 1], [2.0, 3.0])
    assert thin(short, 400) is short


@given(st.lists(finite, min_size=1, max_size=30), st.booleans())
def test_value_axis_holds_every_value_between_its_ticks(values: list[float], from_zero: bool) -> None:
    axis = value_axis(values, log=False, from_zero=from_zero)
    room = 1e-9 * max(1.0, *map(abs, values))
    assert axis.low < axis.high
    assert axis.low - room <= min(values)
    assert max(values) <= axis.high + room
    assert 2 <= len(axis.ticks) <= 9
    assert all(0.0 <= axis.place(v) <= 1.0 for v in values)
    assert axis.place(axis.low) == 0.0
    assert axis.place(axis.high) == 1.0


@given(st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=30))
def test_log_axis_holds_every_value(values: list[float]) -> None:
    axis = value_axis(values, log=True)
    assert 0 < axis.low <= min(values) * (1 + 1e-9)
    assert max(values) * (1 - 1e-9) <= axis.high
    assert len(axis.ticks) >= 1
    places = [axis.place(v) for v in sorted(values)]
    assert places == sorted(places)


def test_log_axis_has_labels_at_round_values() -> None:
    axis = value_axis([0.03, 5.0, 210.0], log=True)
    assert [label for _, label in axis.ticks] == ["0.01", "0.1", "1", "10", "100", "1,000"]
    assert axis.place(math.sqrt(axis.low * axis.high)) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, 2.0, 3.0], False),
        ([0.0, 1.0, 1e5], False),
        ([1e-3] * 10 + [1.0] * 10, True),
        ([1.0] * 99 + [1e6], False),
        ([math.nan, 1.0], False),
    ],
)
def test_log_is_taken_when_the_bulk_of_the_range_asks(values: list[float], expected: bool) -> None:
    assert wants_log(values) is expected


def test_equal_values_and_no_values_have_an_axis() -> None:
    axis = value_axis([0.25, 0.25], log=False)
    assert axis.low < 0.25 < axis.high
    assert value_axis([], log=False).low < value_axis([math.nan], log=False).high


@pytest.mark.parametrize(("low", "high"), [(0, 12), (1, 1), (0, 182), (5, 100_000), (0, 3)])
def test_step_ticks_are_whole_steps_inside_the_range(low: int, high: int) -> None:
    axis = step_axis(low, high)
    assert axis.low <= low <= high <= axis.high
    assert all(value == int(value) and axis.low <= value <= axis.high for value, _ in axis.ticks)
    assert all("." not in label or "k" in label for _, label in axis.ticks)
    assert len(axis.ticks) <= 7


@given(st.floats(1e-12, 1e12))
def test_nice_step_is_round_and_little_above(rough: float) -> None:
    step = nice_step(rough)
    assert rough * (1 - 1e-6) <= step <= rough * 2.5
    assert round(step / 10 ** math.floor(math.log10(step) + 1e-9), 6) in (1.0, 2.0, 2.5, 5.0)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (3e-4, "3e-4"),
        (2.345e-5, "2.35e-5"),
        (-1e-5, "-1e-5"),
        (0.13124, "0.1312"),
        (1.0, "1"),
        (588.2, "588"),
        (9_999.0, "9,999"),
        (12_345.0, "12.3k"),
        (134_515_008.0, "135M"),
        (999_999_999.0, "1B"),
        (2e12, "2T"),
        (math.nan, "–"),
        (math.inf, "–"),
    ],
)
def test_numbers_read_well(value: float, text: str) -> None:
    assert format_number(value) == text


def test_ticks_differ_from_their_neighbours() -> None:
    assert [format_tick(k * 0.25, 0.25) for k in range(4)] == ["0", "0.25", "0.50", "0.75"]
    assert [format_tick(k * 1e-4, 1e-4) for k in range(4)] == ["0", "1e-4", "2e-4", "3e-4"]
    assert [format_tick(k * 5000.0, 5000.0) for k in range(4)] == ["0", "5000", "10k", "15k"]
