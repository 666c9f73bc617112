"""Progress of long work: a bar on a terminal, a line now and then where the output is piped."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Column

from eft.cli.console import error_console

if TYPE_CHECKING:  # the data room is slow to import
    from eft.data.entry import Progress as Report

_LINE_EVERY_S = 10.0


@contextmanager
def data_progress(console: Console) -> Iterator[Report]:
    """A bar per data set while it is tokenised; without a terminal a line on stderr every ten seconds."""
    if not console.is_terminal:
        yield _lines()
        return
    columns = (
        TextColumn("{task.description}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
        BarColumn(bar_width=10),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
    )
    with Progress(*columns, console=console, transient=True, expand=True) as progress:
        tasks: dict[str, TaskID] = {}

        def report(what: str, done: int, total: int | None, speed: str) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what.rsplit("/")[-1], total=total, speed=speed)
            progress.update(tasks[what], completed=done, total=total, speed=speed)

        yield report


def _lines() -> Report:
    last = time.monotonic()

    def report(what: str, done: int, total: int | None, speed: str) -> None:
        nonlocal last
        is_waiting = not done and total is None
        if is_waiting or time.monotonic() - last >= _LINE_EVERY_S:
            last = time.monotonic()
            of = "" if total is None else f" of {total:,}"
            line = what if is_waiting else f"{what}: {done:,}{of} rows" + (f", {speed}" if speed else "")
            error_console.print(line, soft_wrap=True, markup=False)

    return report
