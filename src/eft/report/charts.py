"""Series to a figure: SVG curves stretched to any width, with labels as text beside them so that they stay legible.

The drawing is 1000 × 1000 units, stretched by the browser; strokes keep their width (`vector-effect`), and a point is a
zero-length line with a round cap, so nothing is squashed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from eft.report.markup import Markup, data_block, element, escape, join
from eft.report.series import Axis, Series, format_number, step_axis, thin, value_axis, wants_log

SIZE = 1000.0
POINT_LIMIT = 1200
"""Points of a curve that are drawn; longer series are thinned, spikes kept."""


@dataclass(frozen=True)
class Chart:
    """A figure to draw. `scale="auto"` takes a log axis when the range asks for it."""

    identifier: str
    title: str
    series: Sequence[Series]
    scale: Literal["auto", "linear"] = "auto"
    from_zero: bool = False
    marks: Sequence[float] = field(default_factory=tuple)
    """Steps with a vertical line, such as epoch ends."""
    note: str = ""


def figure(chart: Chart) -> Markup:
    """The whole `<figure>`, or a short note when there is nothing finite to draw."""
    series = [thin(s, POINT_LIMIT) for s in chart.series if any(math.isfinite(v) for v in s.y)]
    if not series:
        body = element("p", "No values in metrics.jsonl.", class_="empty")
        return element("figure", _caption(chart, [], None) + body, class_="chart")
    values = [v for s in series for v in s.y]
    log = chart.scale == "auto" and wants_log(values)
    y_axis = value_axis(values, log=log, from_zero=chart.from_zero)
    x_axis = step_axis(min(min(s.x) for s in series), max(max(s.x) for s in series))
    plot = element(
        "div",
        join([_y_labels(y_axis), _area(chart, series, x_axis, y_axis), _x_labels(x_axis)]),
        class_="plot",
    )
    data = data_block(f"{chart.identifier}-data", _hover_data(series, x_axis, y_axis))
    parts = [_caption(chart, series, y_axis), plot, data]
    return element("figure", join(parts), class_="chart", id=chart.identifier)


def path_data(series: Series, x_axis: Axis, y_axis: Axis) -> str:
    """The `d` of a path; a gap where `y` is not finite; a lone point is a zero-length line."""
    pieces: list[str] = []
    pen_down = False
    for x, y in zip(series.x, series.y, strict=True):
        if not math.isfinite(y):
            pen_down = False
            continue
        left, top = SIZE * x_axis.place(x), SIZE * (1.0 - y_axis.place(y))
        if series.look == "points":
            pieces.append(f"M{left:.1f} {top:.1f}h0")
        else:
            pieces.append(f"{'L' if pen_down else 'M'}{left:.1f} {top:.1f}")
        pen_down = True
    return "".join(pieces)


def _area(chart: Chart, series: Sequence[Series], x_axis: Axis, y_axis: Axis) -> Markup:
    lines = [_line("grid", 0.0, SIZE * (1 - y_axis.place(v)), SIZE, None) for v, _ in y_axis.ticks]
    lines += [_line("grid", SIZE * x_axis.place(v), 0.0, None, SIZE) for v, _ in x_axis.ticks]
    lines += [
        _line("mark", SIZE * x_axis.place(v), 0.0, None, SIZE) for v in chart.marks if x_axis.low < v < x_axis.high
    ]
    lines += [_line("axis", 0.0, SIZE, SIZE, None), _line("axis", 0.0, 0.0, None, SIZE)]
    for one in series:
        curve = f"curve {one.look} c{one.colour}"
        if one.look == "points" and len(one.x) > 1:
            through = Series(one.label, one.x, one.y, "line", one.colour)
            lines.append(element("path", d=path_data(through, x_axis, y_axis), class_=f"curve through c{one.colour}"))
        lines.append(element("path", d=path_data(one, x_axis, y_axis), class_=curve))
    drawing = Markup(
        f'<svg viewBox="0 0 {SIZE:.0f} {SIZE:.0f}" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(_description(chart, series))}">{join(lines)}</svg>'
    )
    return element("div", drawing + element("div", class_="cursor", hidden=""), class_="area", tabindex=0)


def _line(name: str, x: float, y: float, to_x: float | None, to_y: float | None) -> Markup:
    end = f"H{to_x:.1f}" if to_x is not None else f"V{to_y:.1f}"
    return element("path", d=f"M{x:.1f} {y:.1f}{end}", class_=name)


def _y_labels(axis: Axis) -> Markup:
    spans = (element("span", escape(label), style=f"top:{100 * (1 - axis.place(v)):.2f}%") for v, label in axis.ticks)
    return element("div", join(spans), class_="ys", aria_hidden="true")


def _x_labels(axis: Axis) -> Markup:
    spans = (element("span", escape(label), style=f"left:{100 * axis.place(v):.2f}%") for v, label in axis.ticks)
    return element("div", join(spans), class_="xs", aria_hidden="true")


def _caption(chart: Chart, series: Sequence[Series], axis: Axis | None) -> Markup:
    """Title, where the cursor is, and the legend, which is also the read-out: at rest it shows the last values."""
    notes = [chart.note, "log scale" if axis is not None and axis.log else ""]
    note = element("small", escape(" · ".join(filter(None, notes))), class_="note")
    title = element("h3", escape(chart.title) + note + element("small", "", class_="where"))
    items = (
        element("li", element("i") + escape(f"{one.label} ") + _last_value(one), class_=f"{one.look} c{one.colour}")
        for one in series
    )
    return element("figcaption", title + element("ul", join(items), class_="legend"))


def _last_value(series: Series) -> Markup:
    return element("b", escape(format_number(_last_finite(series.y))))


def _hover_data(series: Sequence[Series], x_axis: Axis, y_axis: Axis) -> dict[str, Any]:
    """What the page's script needs: ranges, and per curve its steps, values and ready-made labels."""
    return {
        "x": [x_axis.low, x_axis.high],
        "curves": [
            {
                "x": list(one.x),
                "top": [round(100 * (1 - y_axis.place(v)), 2) if math.isfinite(v) else None for v in one.y],
                "text": [format_number(v) for v in one.y],
                "colour": one.colour,
            }
            for one in series
        ],
    }


def _description(chart: Chart, series: Sequence[Series]) -> str:
    parts = (f"{s.label}: {len(s.x)} points, last {format_number(_last_finite(s.y))}" for s in series)
    return f"{chart.title} by step. " + "; ".join(parts)


def _last_finite(values: Sequence[float]) -> float:
    return next((v for v in reversed(values) if math.isfinite(v)), math.nan)
