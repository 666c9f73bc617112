"""`eft train`: fine-tune as a YAML says."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from eft.cli.console import console, open_config, quiet_libraries, set_up_logging
from eft.cli.launch import (
    Launcher,
    LauncherOption,
    MaxRestarts,
    NumNodes,
    NumProcesses,
    Rendezvous,
    is_first,
    is_restarted,
    is_started,
    processes_here,
    recorded_failures,
    start_processes,
)
from eft.cli.options import AllowUnsupported, ConfigPath, Overrides
from eft.cli.progress import data_progress
from eft.cli.ray_run import Order, check_ray_options, start_on_ray
from eft.config.load import LoadedConfig
from eft.core.constants import EXIT_FAILED

if TYPE_CHECKING:
    from eft.data.dataset_meta import DatasetMeta


def train(
    config: ConfigPath,
    overrides: Overrides = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete an earlier run in output_dir first.")] = False,
    allow_change: Annotated[
        bool, typer.Option("--allow-change", help="Continue a run of other settings; the differences are listed.")
    ] = False,
    allow_unsupported: AllowUnsupported = False,
    report: Annotated[bool, typer.Option("--report/--no-report", help="Write report.html at the end.")] = True,
    nproc: NumProcesses = None,
    launcher: LauncherOption = Launcher.TORCHRUN,
    nnodes: NumNodes = 1,
    rendezvous: Rendezvous = None,
    max_restarts: MaxRestarts = 0,
) -> None:
    """Fine-tune a model as CONFIG says; continue an unfinished run of the same config by itself.

    With several accelerators, or `--nproc`, in several processes; the data are prepared before they start.

    Exit codes: 0 finished, now or before · 1 a promise does not hold, a guard stopped the run, a process was lost · 2
    config, data or folder are wrong · 130 / 143 / 138 / 75 stopped by Ctrl-C / SIGTERM / SIGUSR1 / the stop file, after
    a full checkpoint of the last step; the same command continues.
    """
    if launcher is Launcher.RAY:
        overrides = [*(overrides or []), "use_ray=true"]
    loaded = open_config(config, overrides, allow_unsupported=allow_unsupported)
    set_up_logging(quiet=not is_first())
    quiet_libraries()
    with recorded_failures():
        if loaded.config.use_ray and launcher is not Launcher.NONE:
            check_ray_options(launcher, nproc, nnodes, rendezvous)
            order = Order(loaded, allow_change, report)
            start_on_ray(order, overwrite=overwrite, max_restarts=max_restarts)
            return
        from eft import inputs, run

        here = 1 if is_started() or launcher is Launcher.NONE else processes_here(nproc)
        # A folder that cannot be used, a schedule that cannot be built: said before any row is read.
        world_size = here * nnodes if here > 1 else None
        run.check_before_start(loaded.config, overwrite=overwrite, allow_change=allow_change, world_size=world_size)
        with data_progress(console) as progress:
            meta = inputs.load_datasets(loaded.config, progress=progress, world_size=world_size)
        if here * nnodes > 1:
            switches = {
                "--overwrite": overwrite,
                "--allow-change": allow_change,
                "--no-report": not report,
                "--allow-unsupported": allow_unsupported,
            }
            start_processes(
                ["train", str(config), *(overrides or []), *(name for name, on in switches.items() if on)],
                launcher=launcher,
                nproc=here,
                nnodes=nnodes,
                rendezvous=rendezvous,
                max_restarts=max_restarts,
            )
            return
        # What a lost process leaves is continued, not deleted again.
        overwrite = overwrite and not is_restarted()
        train_here(loaded, meta, overwrite=overwrite, allow_change=allow_change, report=report)


def train_here(loaded: LoadedConfig, meta: DatasetMeta, *, overwrite: bool, allow_change: bool, report: bool) -> None:
    """In this process: all of the run, or one rank of it."""
    from eft import run
    from eft.cli.start import show_start
    from eft.report.page import write_report
    from eft.report.terminal import summary_table

    def finish(folder: Path) -> None:
        console.print(summary_table(folder))
        if report:
            console.print(f"report: {write_report(folder)}", highlight=False, soft_wrap=True)

    first = is_first()
    _, _, trainer = run.train(
        loaded.config,
        meta,
        overwrite=overwrite,
        allow_change=allow_change,
        console=console if first else None,
        origins=loaded.origins,
        on_start=show_start if first else None,
        on_finish=finish if first else None,
    )
    outcome = trainer.outcome
    if outcome.exit_code:
        if first:
            after = f"after step {trainer.state.global_step:,}, which is saved: no step is lost"
            console.print(f"{outcome.reason} {after}; the same command continues.", soft_wrap=True)
        raise typer.Exit(outcome.exit_code)
    if outcome.failed:
        if first:
            console.print(f"stopped: {outcome.reason}; nothing was exported, the checkpoints are kept.")
        raise typer.Exit(EXIT_FAILED)
