"""Start the processes of a run with torchrun or accelerate, as a library or as a command to print.

torchrun (`torch.distributed.run`) starts one process per device, restarts them all when one fails, and lets several
machines find each other (c10d rendezvous). accelerate's launcher and Ray's workers set the same variables.
"""

from __future__ import annotations

import hashlib
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.api import RendezvousClosedError, RendezvousError, RendezvousTimeoutError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from eft.core.errors import ConfigError, EftError
from eft.parallel.failures import STOPS, first_failure, recorded_stop
from eft.parallel.meeting import check_meeting_place

RUN_ID = "eft-launch"
"""TORCHELASTIC_RUN_ID of the processes that eft itself has started begins so; their failures it prints."""
MEET_S = 600
"""How long machines wait for each other."""
SHUTDOWN_S = 30
"""For a last checkpoint after a signal; whoever waits for a process that is gone is killed then."""
_NEVER = 10**7
"""Heartbeats that a machine may miss: three, as torch has it, are 15 s, counted by the clock of another machine."""


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

    def __post_init__(self) -> None:
        if self.nnodes > 1 and self.rendezvous is None:
            raise ConfigError(
                "--nnodes: the machines must know where to meet; give --rendezvous HOST:PORT, the same on each of them"
            )
        if self.rendezvous is not None and not self.rendezvous.rpartition(":")[2].isdecimal():
            raise ConfigError(f"--rendezvous: expected HOST:PORT, got {self.rendezvous!r}; for instance host:29500")
        if self.nnodes > 1 and self.max_restarts:
            # Each machine counts its own restarts, and torch 2.13 keeps the addresses of the dead in the shared store.
            raise ConfigError(
                "--max-restarts: not offered over several machines (--nnodes); start the same command again on each"
            )

    def run_id(self, arguments: Sequence[str]) -> str:
        """Equal on all machines of a run, and for no other command: runs at one port are told apart by it."""
        text = "\0".join([str(self.nproc), str(self.nnodes), *arguments])
        return f"{RUN_ID}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def torchrun_command(fleet: Fleet, arguments: Sequence[str]) -> list[str]:
    """The command that starts the same processes without eft, to be run on every machine."""
    meeting = [
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={fleet.rendezvous or 'localhost:0'}",
        f"--rdzv-id={fleet.run_id(arguments)}",
    ]
    shape = [f"--nnodes={fleet.nnodes}", f"--nproc-per-node={fleet.nproc}", f"--max-restarts={fleet.max_restarts}"]
    return ["torchrun", *shape, *meeting, "-m", "eft.cli", *arguments]


def accelerate_command(nproc: int, arguments: Sequence[str]) -> list[str]:
    """The same on one machine through accelerate's launcher, at a free port."""
    # `--multi_gpu` stands for its use of torchrun, on CPUs too: with `--cpu` it would start one process, silently.
    kind = ["--multi_gpu", "--mixed_precision=no", "--dynamo_backend=no"]
    shape = [f"--num_processes={nproc}", "--num_machines=1", "--main_process_port=0"]
    return ["accelerate", "launch", *kind, *shape, "-m", "eft.cli", *arguments]


def shown(command: Sequence[str]) -> str:
    """A command as one would type it."""
    return shlex.join(command)


def launch_config(fleet: Fleet, arguments: Sequence[str], logs: Path) -> LaunchConfig:
    """What torchrun is told: rank 0's output is this process's, that of the others on this machine goes into `logs`."""
    quiet = dict.fromkeys(range(1, fleet.nproc), Std.ALL)
    return LaunchConfig(
        min_nodes=fleet.nnodes,
        max_nodes=fleet.nnodes,
        nproc_per_node=fleet.nproc,
        run_id=fleet.run_id(arguments),
        rdzv_endpoint=fleet.rendezvous or "localhost:0",
        rdzv_backend="c10d",
        rdzv_configs={"join_timeout": MEET_S, "keep_alive_max_attempt": _NEVER},
        max_restarts=fleet.max_restarts,
        monitor_interval=0.5,
        shutdown_timeout=SHUTDOWN_S,
        logs_specs=DefaultLogsSpecs(log_dir=str(logs), redirects=quiet),
    )


def launch(fleet: Fleet, arguments: Sequence[str]) -> int:
    """Run `eft ARGUMENTS` in every process and wait; rank 0's output is this process's, the others' go to files.

    Returns:
        the exit code: 0, or of a run that was asked to stop where it would have been started again.

    Raises:
        RunFailed: a process failed; the message is that of the first one, with where the others' output is.
        ConfigError: the machines cannot meet.
    """
    if fleet.rendezvous is not None:
        check_meeting_place(fleet.rendezvous, fleet.run_id(arguments), MEET_S)
    logs = Path(tempfile.mkdtemp(prefix="eft-ranks-"))
    entry = elastic_launch(launch_config(fleet, arguments, logs), sys.executable)
    try:
        entry("-m", "eft.cli", *arguments)
    except SignalException as stop:
        raise RunFailed(f"stopped by {stop.sigval.name}", 128 + stop.sigval) from stop
    except ChildFailedError as error:
        failure = first_failure(error.failures, logs, several_machines=fleet.nnodes > 1)
        where = f"(rank {failure.rank} failed first, exit code {failure.exit_code}; all output: {logs})"
        text = failure.text if failure.exit_code in STOPS else f"{failure.text}\n{where}"
        raise RunFailed(text, failure.exit_code) from error
    except RendezvousError as error:
        raise _not_met(fleet, error) from error
    return recorded_stop(logs)


def _not_met(fleet: Fleet, error: RendezvousError) -> EftError:
    """What torch's rendezvous has to say, in words for the user."""
    place = fleet.rendezvous or "this machine"
    if isinstance(error, RendezvousTimeoutError):
        return ConfigError(
            f"--nnodes: {fleet.nnodes} machines were to meet at {place}, and not all have come within {MEET_S} s. "
            "Start the same command on each of them."
        )
    if isinstance(error, RendezvousClosedError):
        return ConfigError(
            f"--rendezvous {place}: this run has just ended there, on another machine. Read what that one says, then "
            "start the same command again on all of them."
        )
    return RunFailed(
        f"error: lost the launcher at {place}, where the machines of the run meet: it has ended. What went wrong "
        "stands there; the same command on all machines continues from the newest checkpoint.",
        1,
    )
