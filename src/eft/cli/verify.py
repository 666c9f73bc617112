"""`eft verify`: the promises, checked on the user's own model, data and config."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from eft.cli.console import console, error_console, open_config, quiet_libraries, set_up_logging
from eft.cli.options import AllowUnsupported, ConfigPath, Overrides
from eft.core.constants import EXIT_FAILED
from eft.core.records import PromiseResult

_STYLES = {"pass": "green", "fail": "bold red", "not applicable": "dim"}


def verify(
    config: ConfigPath,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
    allow_unsupported: AllowUnsupported = False,
    nproc: Annotated[
        int, typer.Option("--nproc", min=1, help="Also train, stop and continue in so many processes on the CPU.")
    ] = 1,
) -> None:
    """Check eft's promises on CONFIG's own model and data: packing, loss, resume, data, saves, schedule, keys.

    Trains a few short steps in a temporary folder; nothing is written into output_dir. Exit code 1 when one fails.
    """
    loaded = open_config(config, overrides, allow_unsupported=allow_unsupported)
    set_up_logging()
    quiet_libraries()
    import tempfile
    from dataclasses import asdict
    from pathlib import Path

    from eft.verify.promises import check_promises
    from eft.verify.verification import assemble

    with tempfile.TemporaryDirectory(prefix="eft-verify-") as folder, error_console.status("data and model") as status:
        verification = assemble(loaded.config, Path(folder))
        results = list(check_promises(verification, status.update, num_processes=nproc))
    if as_json:
        typer.echo(json.dumps([asdict(result) for result in results], indent=2, ensure_ascii=False))
    else:
        console.print(promise_table(results))
        console.print(_verdict(results))
    if any(result.status == "fail" for result in results):
        raise typer.Exit(EXIT_FAILED)


def promise_table(results: list[PromiseResult]) -> Table:
    """One row per check: promise, what, pass or fail, the numbers."""
    table = Table(title="Promises", title_justify="left")
    for name in ("promise", "check", "result", "measured"):
        table.add_column(name, overflow="fold", no_wrap=name == "result")
    for result in sorted(results, key=lambda entry: entry.promise):
        state = Text(result.status, style=_STYLES[result.status])
        table.add_row(result.promise, result.title, state, Text(result.detail))
    return table


def _verdict(results: list[PromiseResult]) -> Text:
    failed = [result for result in results if result.status == "fail"]
    if not failed:
        return Text(f"all {len(results)} checks hold", style="green")
    return Text(f"{len(failed)} of {len(results)} checks failed", style="bold red")
