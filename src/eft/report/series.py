"""Numbers made ready to draw: smoothing, thinning, axes, ticks, labels. Pure functions of lists of floats."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

LOG_RANGE = 30.0
"""A positive series whose bulk (5th to 95th percentile) spans more than this factor is drawn on a log axis."""

_LARGE = ((999.5e9, 1e12, "T"), (999.5e6, 1e9, "B"), (999.5e3, 1e6, "M"), (9999.5, 1e3, "k"))
"""Numbers from the first on are shown in units of the second; below 1,000 units there is no exponent."""


@dataclass(frozen=True)
class Series:
    """One curve. `x` and `y` have equal length; a NaN or infinite `y` is a gap."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    look: Literal["line", "faint", "points"] = "line"
    colour: int = 0


@dataclass(frozen=True)
class Axis:
    """A range, its scale and its labelled ticks (value, label); `low` < `high`."""

    low: float
    high: float
    log: bool
    ticks: list[tuple[float, str]]

    def place(self, value: float) -> float:
        """Where `value` lies, 0 at `low`, 1 at `high`, clipped to both."""
        if self.log:
            share = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return min(1.0, max(0.0, share))


def smooth(values: Sequence[float], span: float) -> list[float]:
    """Moving average with weights that fall off exponentially on both sides, over about `span` values each.

    Looking both ways it does not lag behind, and it leans to nothing at the ends. A non-finite value counts nowhere.
    """
    forward = _trailing(values, span)
    backward = _trailing(values[::-1], span)[::-1]
    averages = []
    for (left, left_weight), (right, right_weight), value in zip(forward, backward, values, strict=True):
        own = (value, 1.0) if math.isfinite(value) else (0.0, 0.0)
        weight = left_weight + right_weight - own[1]
        averages.append((left + right - own[0]) / weight if weight > 0.0 else math.nan)
    return averages


def _trailing(values: Sequence[float], span: float) -> list[tuple[float, float]]:
    """At each position: Σ decay^age · value, and Σ decay^age, over the finite values up to it."""
    decay = 1.0 - 1.0 / max(1.0, span)
    total = weight = 0.0
    sums = []
    for value in values:
        finite = math.isfinite(value)
        total = decay * total + (value if finite else 0.0)
        weight = decay * weight + (1.0 if finite else 0.0)
        sums.append((total, weight))
    return sums


def thin(series: Series, limit: int) -> Series:
    """At most about `limit` points: of each bucket the lowest and the highest, so that no spike is lost."""
    count = len(series.x)
    if count <= limit:
        return series
    kept: list[int] = []
    buckets = max(1, limit // 2)
    for bucket in range(buckets):
        indices = range(bucket * count // buckets, (bucket + 1) * count // buckets)
        finite = [i for i in indices if math.isfinite(series.y[i])]
        pair = (
            {min(finite, key=series.y.__getitem__), max(finite, key=series.y.__getitem__)} if finite else {indices[0]}
        )
        kept.extend(sorted(pair))
    kept = sorted({0, *kept, count - 1})
    return Series(series.label, [series.x[i] for i in kept], [series.y[i] for i in kept], series.look, series.colour)


def wants_log(values: Sequence[float]) -> bool:
    """True when all values are positive and their bulk spans more than LOG_RANGE."""
    finite = sorted(v for v in values if math.isfinite(v))
    if len(finite) < 3 or finite[0] <= 0.0:
        return False
    low, high = finite[int(0.05 * (len(finite) - 1))], finite[math.ceil(0.95 * (len(finite) - 1))]
    return high / low > LOG_RANGE


def value_axis(values: Sequence[float], *, log: bool, from_zero: bool = False) -> Axis:
    """An axis that holds every finite value, ending on ticks. All-equal values get room on both sides."""
    finite = [v for v in values if math.isfinite(v)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    if log:
        return _log_axis(low, high)
    if from_zero and low >= 0.0:
        low = 0.0
    if high - low < 1e-12 * max(abs(high), abs(low), 1e-300):
        room = abs(high) * 0.1 or 1.0
        low, high = low - room, high + room
    step = nice_step((high - low) / 4)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [k * step for k in range(first, last + 1)]
    return Axis(ticks[0], ticks[-1], False, [(tick, format_tick(tick, step)) for tick in ticks])


def step_axis(low: float, high: float) -> Axis:
    """The horizontal axis: exactly the given range, ticks at round steps inside it."""
    if high <= low:
        low, high = low - 1.0, low + 1.0
    step = max(1.0, nice_step((high - low) / 5))
    step = 5.0 if step == 2.5 else step  # steps are whole
    ticks = [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return Axis(low, high, False, [(tick, format_tick(tick, step)) for tick in ticks])


def nice_step(rough: float) -> float:
    """The smallest of 1, 2, 2.5, 5 × 10^k that is at least `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    for factor in (1.0, 2.0, 2.5, 5.0):
        if rough <= factor * power * (1 + 1e-9):
            return factor * power
    return 10.0 * power


def _log_axis(low: float, high: float) -> Axis:
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    factors = (1.0, 2.0, 5.0) if last - first <= 2 else (1.0,)
    stride = max(1, math.ceil((last - first) / 6))
    candidates = [f * 10.0**k for k in range(first, last + 2, stride) for f in factors]
    below = [c for c in candidates if c <= low * (1 + 1e-9)]
    above = [c for c in candidates if c >= high * (1 - 1e-9)]
    start, end = below[-1] if below else low, above[0] if above else high
    if end <= start:
        end = start * 10.0
    return Axis(start, end, True, [(c, format_number(c)) for c in candidates if start <= c <= end * (1 + 1e-9)])


def format_tick(value: float, step: float) -> str:
    """A tick's label with just the digits that tell it from its neighbours `step` away."""
    if value == 0.0 or abs(value) < step * 1e-6:
        return "0"
    if max(abs(value), step) >= 10_000:
        return format_number(value)
    if step < 1e-3 and abs(value) < 1e-1:
        return _scientific(value, significant=2)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    if not math.isclose(step * 10**decimals, round(step * 10**decimals)):
        decimals += 1
    return f"{value:.{decimals}f}"


def format_number(value: float) -> str:
    """A number as people read it: 0.1234, 3e-4, 12.3k, 135M; `–` for what is not finite."""
    if not math.isfinite(value):
        return "–"
    size = abs(value)
    if value == 0.0:
        return "0"
    if size < 1e-3:
        return _scientific(value, significant=3)
    for limit, divisor, mark in _LARGE:
        if size >= limit:
            return f"{value / divisor:.3g}{mark}"
    if size >= 100 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.4g}"


def _scientific(value: float, *, significant: int) -> str:
    digits, exponent = f"{value:.{significant - 1}e}".split("e")
    digits = digits.rstrip("0").rstrip(".") if "." in digits else digits
    return f"{digits}e{int(exponent)}"
