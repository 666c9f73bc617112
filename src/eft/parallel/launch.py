"""Start the processes of a run with torchrun or accelerate, as a library or as a command to print.

torchrun (`torch.distributed.run`) starts one process per device, restarts them all when one fails, and lets several
machines find each other (c10d rendezvous). accelerate's launcher and Ray's workers set the same variables.
"""

from __future__ import annotations

import json
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from eft.core.errors import ConfigError, EftError

RUN_ID = "eft-launch"
"""TORCHELASTIC_RUN_ID of the processes that eft itself has started, whose failures it prints."""

_TAIL_LINES = 12


class RunFailed(EftError):  # noqa: N818  # what the user reads
    """A process of the run failed; the message begins with its own."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Fleet:
    """Which processes to start."""

    nproc: int
    """On each machine."""
    nnodes: int = 1
    rendezvous: str | None = None
    """`host:port` of the machine that the others meet at; None: this one, at a free port."""
    max_restarts: int = 0
    run_id: str = RUN_ID

    def __post_init__(self) -> None:
        if self.nnodes > 1 and self.rendezvous is None:
            raise ConfigError(
                "--nnodes: the machines must know where to meet; give --rendezvous HOST:PORT, the same on each of them"
            )
        if self.nnodes > 1 and self.max_restarts:
            # Each machine counts its own restarts, and torch 2.13 keeps the addresses of the dead in the shared store.
            raise ConfigError(
                "--max-restarts: not offered over several machines (--nnodes); start the same command again on each"
            )


def torchrun_command(fleet: Fleet, arguments: Sequence[str]) -> list[str]:
    """The command that starts the same processes without eft, to be run on every machine."""
    meeting = [
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={fleet.rendezvous or 'localhost:0'}",
        f"--rdzv-id={fleet.run_id}",
    ]
    shape = [f"--nnodes={fleet.nnodes}", f"--nproc-per-node={fleet.nproc}", f"--max-restarts={fleet.max_restarts}"]
    return ["torchrun", *shape, *meeting, "-m", "eft.cli", *arguments]


def accelerate_command(fleet: Fleet, arguments: Sequence[str], *, cpu: bool) -> list[str]:
    """The same through accelerate's launcher. Its own config file is not read: the YAML says everything."""
    shape = [f"--num_processes={fleet.nproc * fleet.nnodes}", f"--num_machines={fleet.nnodes}"]
    if fleet.rendezvous is not None:
        host, _, port = fleet.rendezvous.rpartition(":")
        shape += [f"--main_process_ip={host}", f"--main_process_port={port}"]
    kind = ["--cpu"] if cpu else ["--multi_gpu"] if fleet.nproc * fleet.nnodes > 1 else []
    return [
        "accelerate",
        "launch",
        *kind,
        *shape,
        "--mixed_precision=no",
        "--dynamo_backend=no",
        "-m",
        "eft.cli",
        *arguments,
    ]


def shown(command: Sequence[str]) -> str:
    """A command as one would type it."""
    return shlex.join(command)


def launch(fleet: Fleet, arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
    """Run `eft ARGUMENTS` in every process and wait; rank 0's output is this process's, the others' go to files.

    Args:
        environment: variables of the processes beside this one's own.

    Raises:
        RunFailed: a process failed; the message is that of the first one, with where the others' output is.
    """
    logs = Path(tempfile.mkdtemp(prefix="eft-ranks-"))
    quiet = dict.fromkeys(range(1, fleet.nproc), Std.ALL)
    config = LaunchConfig(
        min_nodes=fleet.nnodes,
        max_nodes=fleet.nnodes,
        nproc_per_node=fleet.nproc,
        run_id=fleet.run_id,
        rdzv_endpoint=fleet.rendezvous or "localhost:0",
        rdzv_backend="c10d",
        max_restarts=fleet.max_restarts,
        monitor_interval=0.5,
        # Time for a last checkpoint; whoever waits for a process that is gone is killed then.
        shutdown_timeout=30,
        logs_specs=DefaultLogsSpecs(log_dir=str(logs), redirects=quiet),
    )
    entry = elastic_launch(config, sys.executable)
    try:
        entry("-m", "eft.cli", *arguments)
    except SignalException as stop:
        raise RunFailed(f"stopped by {stop.sigval.name}", 128 + stop.sigval) from stop
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        raise RunFailed(failure_text(rank, failure, logs), failure.exitcode) from error


def failure_text(rank: int, failure: ProcessFailure, logs: Path) -> str:
    """The failing process's own words first, then where the rest is."""
    said = _recorded(failure) or _tail(failure, rank, logs)
    if failure.exitcode < 0:
        said = f"rank {rank} was ended by signal {-failure.exitcode}" + (f"\n{said}" if said else "")
    return f"{said}\n(rank {rank} failed first, exit code {failure.exitcode}; all output: {logs})"


def _recorded(failure: ProcessFailure) -> str:
    """The traceback that the process has left."""
    try:
        content = json.loads(Path(failure.error_file).read_text())["message"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    if isinstance(content, dict):
        text = str(content.get("message", ""))
        kind, _, message = text.partition(": ")
        if kind in {error.__name__ for error in EftError.__subclasses__()}:
            return f"error: {message}"
        content = content.get("extraInfo", {}).get("py_callstack") or text
    return str(content).rstrip()


def _tail(failure: ProcessFailure, rank: int, logs: Path) -> str:
    found = sorted(logs.glob(f"**/{failure.local_rank}/stderr.log"))
    lines = found[-1].read_text(errors="replace").splitlines() if found else []
    return "\n".join(lines[-_TAIL_LINES:]) or f"rank {rank} said nothing"
