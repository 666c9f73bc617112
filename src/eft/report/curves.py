"""The four charts of a run, from its metrics rows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from eft.report.charts import Chart
from eft.report.reading import Json, RunFiles, is_eval_loss, number
from eft.report.series import Series, smooth

_SHARE = "share/"
_SOURCES = 5
SMOOTH_FROM = 25
"""Shorter loss curves are drawn as they are."""


def run_charts(run: RunFiles) -> list[Chart]:
    """Loss, that of each data set where there are several, learning rate, gradient norm and throughput."""
    marks = epoch_ends(run.plan)
    note = "dashed lines: epoch ends" if marks else ""
    return [
        Chart(
            "loss", "Loss", [*_smoothed(run.training, "loss", "training"), *_evaluation(run)], marks=marks, note=note
        ),
        *_by_data_set(run, marks),
        Chart(
            "learning-rate",
            "Learning rate",
            [column(run.training, "learning_rate", "rate")],
            "linear",
            True,
            marks,
        ),
        Chart(
            "grad-norm",
            "Gradient norm before clipping",
            _smoothed(run.training, "grad_norm", "each step", 3),
            marks=marks,
        ),
        Chart("throughput", "Tokens per second", _throughput(run.training), "linear", True, marks),
    ]


def _by_data_set(run: RunFiles, marks: list[float]) -> list[Chart]:
    """The training loss of the data sets with the most trained tokens."""
    weights: dict[str, float] = {}
    for row in run.training:
        for key in row:
            if key.startswith(_SHARE):
                weights[key] = weights.get(key, 0.0) + number(row[key])
    names = [key.removeprefix(_SHARE) for key in sorted(weights, key=weights.__getitem__, reverse=True)]
    if len(names) < 2:
        return []
    shown = [_smoothed(run.training, f"loss/{name}", name, colour)[-1] for colour, name in enumerate(names[:_SOURCES])]
    lines = [Series(name, each.x, each.y, "line", each.colour) for name, each in zip(names, shown, strict=False)]
    left = len(names) - len(lines)
    note = f"the {_SOURCES} with the most trained tokens; {left} more in metrics.jsonl" if left else ""
    return [Chart("loss-by-data-set", "Loss by data set", lines, marks=marks, note=note)]


def column(rows: Sequence[Json], name: str, label: str, colour: int = 0) -> Series:
    """One value by step; rows without it are left out."""
    present = [row for row in rows if name in row]
    return Series(label, [row["step"] for row in present], [number(row[name]) for row in present], "line", colour)


def epoch_ends(plan: Json) -> list[float]:
    """Steps after which an epoch ends, the last one left out; [] when the plan does not say."""
    epochs = plan.get("epochs")
    steps = [number(e.get("steps_executed")) for e in epochs if isinstance(e, dict)] if isinstance(epochs, list) else []
    ends = list(itertools.accumulate(steps))[:-1]
    return [end for end in ends if math.isfinite(end)] if len(ends) <= 20 else []


def _smoothed(rows: Sequence[Json], name: str, label: str, colour: int = 0) -> list[Series]:
    raw = column(rows, name, label, colour)
    if len(raw.x) < SMOOTH_FROM:
        return [raw]
    faint = Series(label, raw.x, raw.y, "faint", colour)
    return [faint, Series("smoothed", raw.x, smooth(raw.y, max(5.0, len(raw.y) / 30)), "line", colour)]


def _throughput(rows: Sequence[Json]) -> list[Series]:
    trained = column(rows, "trained_tokens_per_second", "trained", 4)
    return [column(rows, "tokens_per_second", "all tokens", 2), *([trained] if trained.x else [])]


def _evaluation(run: RunFiles) -> list[Series]:
    names = sorted({name for row in run.evaluations for name in row if is_eval_loss(name)})
    found = []
    for index, name in enumerate(names[:5]):
        source = name.removeprefix("eval_").removesuffix("loss").strip("_")
        values = column(run.evaluations, name, f"held out: {source}" if source else "held out")
        found.append(Series(values.label, values.x, values.y, "points", 1 + index))
    return found
