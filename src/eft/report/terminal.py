"""Tables, curves and coloured text for the terminal. Pure: plain rows in, rich renderables out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from eft.core.records import PromiseResult
from eft.data.ledger import HEADER
from eft.report.headline import run_cards
from eft.report.reading import read_run
from eft.report.sections import text_of
from eft.report.series import format_number

_STATES = {"pass": "green", "fail": "bold red"}
_BRAILLE = 0x2800
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""Bit of each dot of a braille sign, by row and column."""


def quantities_table(title: str, rows: Iterable[tuple[str, str]]) -> Table:
    """Names and values, two columns."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_header=False, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(Text(name), Text(value))
    return table


def ledger_table(rows: Iterable[Sequence[str]]) -> Table:
    """The token ledger, from `Ledger.table()`."""
    table = Table(title="Token ledger", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(HEADER):
        table.add_column(name, justify="left" if index in (0, len(HEADER) - 1) else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def gates_table(report: dict[str, Any]) -> Table:
    """One line per gate that judged something, from `GateReport.to_json()`."""
    table = Table(title="Data gates", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("data set", "gate", "state", "found", "limit"):
        table.add_column(name, justify="right" if name in ("found", "limit") else "left", overflow="fold")
    for gate in report["gates"]:
        if gate["status"] == "not applicable":
            continue
        state = Text("over", style="bold red") if gate["status"] == "over" else Text("pass", style="green")
        what = Text.assemble((gate["gate"], "bold"), f" {gate['what']}")
        found = Text(f"{gate['faulty']:,} of {gate['judged']:,} ({100 * gate['share']:.3g} %)")
        table.add_row(Text(gate["source"]), what, state, found, Text(f"{100 * gate['limit']:.3g} %"))
    return table


def promises_table(results: Iterable[PromiseResult]) -> Table:
    """One line per promise: what was shown, and the numbers."""
    table = Table(title="Promises", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("promise", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("result", overflow="fold")
    for result in results:
        numbers = ", ".join(f"{name} {format_number(value)}" for name, value in result.numbers.items())
        detail = Text(result.detail).append(f"\n{numbers}", style="dim") if numbers else Text(result.detail)
        name = Text.assemble((result.promise, "bold"), f" {result.title}")
        table.add_row(name, Text(result.status, style=_STATES.get(result.status, "dim")), detail)
    return table


def summary_table(output_dir: Path) -> Table:
    """The end of a run, from the files in its folder: what came out, and the promises by number."""
    run = read_run(output_dir)
    rows = [
        (
            card.title.lower(),
            (f"{card.before} → " if card.before else "") + card.value + (f"  ({card.note})" if card.note else ""),
        )
        for card in run_cards(run)
    ]
    for status in ("pass", "fail", "not applicable"):
        names = [str(row.get("promise")) for row in run.promises if row.get("status") == status]
        if names:
            rows.append((f"promises: {status}", ", ".join(dict.fromkeys(names))))
    return quantities_table("After the run", [*rows, ("folder", str(output_dir))])


def answers_table(samples: Sequence[dict[str, Any]]) -> Table:
    """Questions with the reference, and the answers before and after training side by side.

    Samples are those of samples.jsonl (the last turn of `prompt` is shown), or have `question` instead of `prompt`.
    """
    table = Table(title="Answers", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, show_lines=True)
    for name in ("question", "reference", "before", "after"):
        table.add_column(name, ratio=1, overflow="fold")
    for sample in samples:
        question = sample["question"] if "question" in sample else sample["prompt"][-1].get("content")
        cells = [
            text_of(value).strip()
            for value in (question, sample.get("reference"), sample.get("before"), sample.get("after"))
        ]
        right = bool(cells[1]) and cells[1] == cells[3]
        table.add_row(*(Text(cell) for cell in cells[:3]), Text(cells[3], style="green" if right else ""))
    return table


def curve(title: str, values: Sequence[float], *, width: int = 60, height: int = 6) -> Text:
    """A curve of braille dots, `width` × `height` signs, with its highest and lowest value beside it."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return Text(f"{title}: no values")
    low, high = min(finite), max(finite)
    columns = min(2 * width, max(2, len(values)))
    cells = [[0] * ((columns + 1) // 2) for _ in range(height)]
    rows = 4 * height - 1
    before: int | None = None
    for column in range(columns):
        value = values[column * (len(values) - 1) // (columns - 1)]
        if not math.isfinite(value):
            before = None
            continue
        row = round((high - value) / (high - low) * rows) if high > low else rows // 2
        # A steep piece is a vertical line, not a hole.
        start = row if before is None else before + (row > before) - (row < before)
        for dot in range(min(start, row), max(start, row) + 1):
            cells[dot // 4][column // 2] |= _DOTS[dot % 4][column % 2]
        before = row
    labels = [format_number(high), *[""] * (height - 2), format_number(low)]
    margin = max(len(label) for label in labels)
    lines = [
        f"{label:>{margin}} │{''.join(chr(_BRAILLE + c) for c in row)}"
        for label, row in zip(labels, cells, strict=True)
    ]
    steps = f"{len(values):,}" if len(values) > 1 else ""
    axis = f"{'':>{margin}} └{'─' * len(cells[0])}\n{'':>{margin}}  1{steps:>{max(len(steps) + 1, len(cells[0]) - 1)}}"
    return Text(f"{title} by step\n" + "\n".join(lines) + f"\n{axis}")
