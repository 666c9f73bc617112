"""`eft train`: fine-tune as a YAML says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from eft.cli.console import console, open_config, quiet_libraries, set_up_logging
from eft.cli.options import AllowUnsupported, ConfigPath, Overrides
from eft.cli.progress import data_progress
from eft.core.constants import EXIT_FAILED


def train(
    config: ConfigPath,
    overrides: Overrides = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete an earlier run in output_dir first.")] = False,
    allow_unsupported: AllowUnsupported = False,
    report: Annotated[bool, typer.Option("--report/--no-report", help="Write report.html at the end.")] = True,
) -> None:
    """Fine-tune a model as CONFIG says; continue an unfinished run of the same config by itself.

    Exit codes: 0 finished · 1 a promise does not hold · 2 config or data are wrong · 130 / 143 stopped by Ctrl-C /
    SIGTERM after a full checkpoint; the same command continues.
    """
    loaded = open_config(config, overrides, allow_unsupported=allow_unsupported)
    set_up_logging()
    quiet_libraries()
    from eft import run
    from eft.cli.start import show_start
    from eft.report.page import write_report
    from eft.report.terminal import summary_table

    def finish(folder: Path) -> None:
        console.print(summary_table(folder))
        if report:
            console.print(f"report: {write_report(folder)}", highlight=False, soft_wrap=True)

    # A folder that cannot be used, a schedule that cannot be built: said before any row is read.
    run.check_before_start(loaded.config, overwrite=overwrite)
    with data_progress(console) as progress:
        meta = run.load_datasets(loaded.config, progress=progress)
    _, _, trainer = run.train(
        loaded.config,
        meta,
        overwrite=overwrite,
        console=console,
        origins=loaded.origins,
        on_start=show_start,
        on_finish=finish,
    )
    outcome = trainer.outcome
    if outcome.signal_number is not None and trainer.state.global_step < trainer.args.max_steps:
        console.print(
            f"{outcome.reason} after step {trainer.state.global_step:,}; the same command continues.", soft_wrap=True
        )
        raise typer.Exit(128 + outcome.signal_number)
    if outcome.failed:
        console.print(f"stopped: {outcome.reason}; nothing was exported, the checkpoints are kept.")
        raise typer.Exit(EXIT_FAILED)
