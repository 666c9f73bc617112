"""Whether a command runs in this process or starts others, and how."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from typing import Annotated

import typer

from eft.cli.console import console, error_console
from eft.core.constants import EXIT_FAILED, EXIT_USAGE
from eft.core.errors import ConfigError, EftError, PromiseBroken, RunFinished


class Launcher(StrEnum):
    """What starts the processes of a run."""

    TORCHRUN = "torchrun"
    ACCELERATE = "accelerate"
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
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    from eft.parallel.launch import RUN_ID

    try:
        yield
    except (typer.Exit, RunFinished):
        raise
    except Exception as error:
        get_error_handler().record_exception(error)
        if os.environ.get("TORCHELASTIC_RUN_ID") != RUN_ID:
            raise
        # Exit codes as `main` has them.
        wrong = isinstance(error, EftError) and not isinstance(error, PromiseBroken)
        raise typer.Exit(EXIT_USAGE if wrong else EXIT_FAILED) from error


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
        if max_restarts:
            raise ConfigError("--max-restarts: accelerate's launcher does not restart; use `--launcher torchrun`")
        import torch

        command = accelerate_command(fleet, arguments, cpu=not torch.accelerator.is_available())
        console.print(f"starting: {shown(command)}", highlight=False, soft_wrap=True)
        # Its output is the run's; this process has nothing left to do.
        os.execv(sys.executable, [sys.executable, "-m", "accelerate.commands.accelerate_cli", *command[1:]])
    console.print(f"starting: {shown(torchrun_command(fleet, arguments))}", highlight=False, soft_wrap=True)
    sys.stdout.flush()
    try:
        launch(fleet, arguments)
    except RunFailed as failure:
        error_console.print(str(failure), highlight=False, soft_wrap=True, markup=False)
        raise typer.Exit(failure.exit_code if failure.exit_code > 0 else 1) from failure
