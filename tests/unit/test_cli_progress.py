"""Progress of the data: one bar per data set on a terminal, plain lines where the output is piped."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from eft.cli import progress

REPORTS = [
    ("/data/of/mine/rows.jsonl", 512, 2048, ""),
    ("/data/of/mine/rows.jsonl", 1024, 2048, "1,000 rows/s, 290,000 tokens/s, 0:00:01 left"),
    ("/data/of/mine/rows.jsonl", 2048, 2048, "1,000 rows/s, 290,000 tokens/s, 0:00:00 left"),
    ("other.jsonl", 5, None, ""),
]


@pytest.mark.parametrize("width", [80, 160])
def test_a_terminal_has_one_bar_per_data_set(width: int) -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=width)
    with progress.data_progress(console) as report:
        for each in REPORTS[:2]:
            report(*each)
    last = file.getvalue().split("\r")[-1]
    assert "1024/2048" in file.getvalue()
    assert "1,000 rows/s, 290,000 tokens/s, 0:00:01 left" in file.getvalue()
    assert last.count("rows.jsonl") <= 1


def test_a_pipe_has_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    file, clock = io.StringIO(), [0.0]
    monkeypatch.setattr(progress, "error_console", Console(file=file, width=40))
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with progress.data_progress(Console(file=io.StringIO())) as report:
        report("rows.jsonl: another process is preparing it", 0, None, "")
        for each in REPORTS:
            clock[0] += 6.0
            report(*each)
    assert file.getvalue().splitlines() == [
        "rows.jsonl: another process is preparing it",
        "/data/of/mine/rows.jsonl: 1,024 of 2,048 rows, 1,000 rows/s, 290,000 tokens/s, 0:00:01 left",
        "other.jsonl: 5 rows",
    ]
