"""What every training prints before its first step."""

from __future__ import annotations

from eft.cli.console import console
from eft.data.dataset_meta import DatasetMeta
from eft.report.terminal import ledger_table, quantities_table
from eft.start_table import Rows


def show_start(rows: Rows, meta: DatasetMeta) -> None:
    """The token ledger and the derived quantities."""
    if meta.ledger is not None:
        console.print(ledger_table(meta.ledger.table()))
    console.print(quantities_table("Before the first step", rows))
