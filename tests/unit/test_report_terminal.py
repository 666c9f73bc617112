"""What the terminal shows, as plain text."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

from rich.console import Console

from eft.core.records import PromiseResult
from eft.data.ledger import Ledger
from eft.report.terminal import (
    answers_table,
    curve,
    ledger_table,
    promises_table,
    quantities_table,
    summary_table,
)
from tests.run_folder import LEDGER, SAMPLES, write_run_folder


def shown(renderable: Any, width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(renderable)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_quantities_are_text_not_markup() -> None:
    text = shown(quantities_table("Before [b]", [("[red]device", "cpu [/] x")]))
    assert "[red]device" in text
    assert "cpu [/] x" in text


def test_ledger_table_takes_the_rows_of_the_ledger() -> None:
    text = shown(ledger_table(Ledger.from_json(LEDGER).table()), 160)
    assert "raw tokens" in text
    assert "48,210" in text
    assert "too long: 4 rows" in text


def test_summary_of_a_run(tmp_path: Path) -> None:
    text = shown(summary_table(write_run_folder(tmp_path)))
    for words in ("182 of 182", "1.34 → 0.1312", "promises: fail", "E6", "E1", str(tmp_path)[:20]):
        assert words in text, words


def test_summary_of_an_empty_folder(tmp_path: Path) -> None:
    assert "folder" in shown(summary_table(tmp_path))


def test_promises_show_state_and_numbers() -> None:
    results = [PromiseResult("E1", "packing", "pass", "no [leak]", {"leak": 0.0, "difference": 2.1e-7})]
    text = shown(promises_table(results))
    for words in ("E1 packing", "pass", "no [leak]", "leak 0, difference 2.1e-7"):
        assert words in text, words


def test_answers_of_both_kinds() -> None:
    text = shown(answers_table([SAMPLES[0], {"question": "Why?", "reference": "x", "before": "", "after": None}]), 200)
    assert "Find the area" in text
    assert "Answer with one JSON" not in text
    assert "Why?" in text


def test_curve_is_a_grid_of_dots_without_holes() -> None:
    text = curve("rate", [float(i) for i in range(1000)], width=20, height=4)
    lines = text.plain.splitlines()
    assert len(lines) == 7
    assert lines[0] == "rate by step"
    assert lines[1].startswith("999 │")
    assert lines[4].startswith("  0 │")
    assert lines[-1].endswith("1,000")
    signs = [line.split("│")[1] for line in lines[1:5]]
    assert all(len(row) == 20 for row in signs)
    for column in range(20):
        assert any(ord(row[column]) > 0x2800 for row in signs), column
    rising = [max(i for i, row in enumerate(signs) if ord(row[c]) > 0x2800) for c in range(20)]
    assert rising == sorted(rising, reverse=True)


def test_a_steep_piece_is_a_vertical_line() -> None:
    lines = curve("rate", [0.0] * 20 + [1.0] * 20, width=20, height=4).plain.splitlines()
    columns = [{line.split("│")[1][10] for line in lines[1:5]}, {line.split("│")[1][5] for line in lines[1:4]}]
    assert chr(0x2800) not in columns[0]
    assert columns[1] == {chr(0x2800)}


def test_curve_of_few_or_no_values() -> None:
    assert curve("a", []).plain == "a: no values"
    assert curve("a", [math.nan]).plain == "a: no values"
    assert len(curve("a", [1.0]).plain.splitlines()) == 9
    assert curve("a", [1.0, math.inf, 2.0]).plain.splitlines()[-1].endswith("1 3")
