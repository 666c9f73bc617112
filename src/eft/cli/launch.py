"""Whether a command runs in this process or starts others, and how."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from typing import Annotated

import typer

from eft.cli.console import console, error_console, print_error
from eft.core.constants import EXIT_FAILED, EXIT_OK
from eft.core.errors import ConfigError, PromiseBroken, RunFinished


class Launcher(StrEnum):
    """What starts the processes of a run."""

    TORCHRUN = "torchrun"
    ACCELERATE = "accelerate"
    RAY = "ray"
    NONE = "none"


NumProcesses = Annotated[
    int | None,
    typer.Option("--nproc", min=1, help="Processes on this machine; default: one per accelerator, else one."),
]
LauncherOption = Annotated[
    Launcher,
    typer.Option("--launcher", help="What starts them; none: this process alone, or as a launcher started it."),
]
NumNodes = Annotated[int, typer.Option("--nnodes", min=1, help="Machines; run the same command on each.")]
Rendezvous = Annotated[str | None, typer.Option("--rendezvous", help="HOST:PORT where several machines meet.")]
MaxRestarts = Annotated[
    int, typer.Option("--max-restarts", min=0, help="Start all processes again so often when one is lost.")
]


def is_started() -> bool:
    """Whether a launcher has started this process."""
    return "WORLD_SIZE" in os.environ


def is_first() -> bool:
    """Whether this process speaks for the run."""
    return os.environ.get("RANK", "0") == "0"


def is_restarted() -> bool:
    """Whether the launcher has started this process again after a failure."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


@contextmanager
def recorded_failures() -> Iterator[None]:
    """Leave a failure of one of several processes where their launcher finds it; ours prints the first one only."""
    if not is_started():
        yield
        return
    from eft.parallel.failures import exit_code_of, record_failure, record_stop
    from eft.parallel.launch import RUN_ID
    from eft.parallel.watch import end_with_launcher

    run_id, restarts = os.environ.get("TORCHELASTIC_RUN_ID", ""), os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    ours = run_id.startswith(RUN_ID)
    if run_id:
        end_with_launcher()

    def end(code: int) -> typer.Exit:
        """torchrun would start again, at once, what was asked to stop, what a guard stopped, what broke a promise."""
        if not ours or restarts == "0":
            return typer.Exit(code)
        record_stop(code)
        return typer.Exit(EXIT_OK)

    try:
        yield
    except RunFinished:
        raise
    except typer.Exit as stop:
        raise end(stop.exit_code) if stop.exit_code else stop from None
    except Exception as error:
        if ours and restarts != "0" and isinstance(error, PromiseBroken):
            print_error(error)
            raise end(EXIT_FAILED) from error
        record_failure(error)
        if not ours:
            raise
        raise typer.Exit(exit_code_of(error)) from error


def processes_here(nproc: int | None) -> int:
    """The processes that this machine is to run."""
    if nproc is not None:
        return nproc
    import torch

    return max(1, torch.accelerator.device_count()) if torch.accelerator.is_available() else 1


def start_processes(
    arguments: Sequence[str], *, launcher: Launcher, nproc: int, nnodes: int, rendezvous: str | None, max_restarts: int
) -> None:
    """Run `eft ARGUMENTS` in several processes and wait for them.

    Raises:
        ConfigError: the machines would not find each other.
        typer.Exit: a process failed; its own message has been printed.
    """
    from eft.parallel.launch import Fleet, RunFailed, accelerate_command, launch, shown, torchrun_command

    fleet = Fleet(nproc, nnodes, rendezvous, max_restarts)
    if launcher is Launcher.ACCELERATE:
        if max_restarts or nnodes > 1:
            option = "--max-restarts" if max_restarts else "--nnodes"
            raise ConfigError(f"{option}: not with accelerate's launcher; use `--launcher torchrun`")
        command = accelerate_command(nproc, arguments)
        console.print(f"starting: {shown(command)}", highlight=False, soft_wrap=True)
        # Its output is the run's; this process has nothing left to do.
        os.execv(sys.executable, [sys.executable, "-m", "accelerate.commands.accelerate_cli", *command[1:]])
    console.print(f"starting: {shown(torchrun_command(fleet, arguments))}", highlight=False, soft_wrap=True)
    sys.stdout.flush()
    try:
        code = launch(fleet, arguments)
    except RunFailed as failure:
        error_console.print(str(failure), highlight=False, soft_wrap=True, markup=False)
        raise typer.Exit(failure.exit_code if failure.exit_code > 0 else 1) from failure
    if code:
        raise typer.Exit(code)
