"""What a process of a run leaves for its launcher when it ends early, and which of several failures is to be read.

Where one process fails, the others fail soon after: a collective breaks under them. torch dates failures by whole
seconds and looks only at processes that have ended; here the files that they leave are compared, and what merely
followed from another failure comes last.
"""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import IntEnum
from pathlib import Path
from signal import SIGTERM, Signals

from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from eft.core.atomic import write_json, write_text
from eft.core.constants import EXIT_SIGINT, EXIT_SIGTERM, EXIT_STOP_FILE, EXIT_USAGE
from eft.core.errors import EftError, PromiseBroken

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
"""Variable with the path at which the launcher looks for a process's failure."""
STOPPED = "stopped"
"""File beside it: the exit code of a run that was asked to stop, and must not be started again at once."""

_TAIL_LINES = 12
STOPS = (EXIT_SIGINT, EXIT_SIGTERM, 138, EXIT_STOP_FILE)
"""Exit codes of a process that was asked to stop, and has saved."""
_FOLLOWED = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Connection was likely closed",
    "remote process exited",
    "communicator was aborted",
    "Connection refused",
)
"""What gloo, NCCL and the store say in a process whose counterpart has gone."""
_WAITED = ("Timed out waiting", "Timeout waiting", "collective operation timeout", "Wait timeout")


class OtherRankFailed(EftError):  # noqa: N818  # what happened, said by a process that did nothing wrong
    """Another process of the run failed; its own message is the one to read."""


class Cause(IntEnum):
    """How near a failure is to what went wrong; the lowest is shown."""

    OWN = 0
    """It says what went wrong."""
    SIGNAL = 1
    """Ended from outside (kill -9, out of memory), without a word."""
    SILENT = 2
    FOLLOWED = 3
    """A collective broke or a process was missed, because another one had failed."""
    CLOSED = 4
    """Ended by the launcher, or stopped with all others."""


@dataclass(frozen=True)
class Failure:
    """What became of one process."""

    cause: Cause
    at_ns: int
    """When it was written down, by this machine's clock; only failures of one machine are compared."""
    rank: int
    exit_code: int
    """Minus the signal's number where one ended it."""
    text: str
    """Its own words, or what is known without them."""


def record_failure(error: BaseException) -> None:
    """Leave `error` where the launcher looks, in torch's format and with what is ours beside it.

    The file is whole or not there: a process may be killed while it writes, and torchrun itself fails on half a file.
    """
    path = os.environ.get(ERROR_FILE)
    if not path:
        return
    name = f"{type(error).__name__}: {error}"
    text, followed = words_of(error)
    own = {"text": text, "followed": followed}
    callstack = "".join(traceback.format_exception(error))
    extra = {"py_callstack": callstack, "timestamp": str(int(time.time()))}
    try:
        write_json(Path(path), {"message": {"message": name, "extraInfo": extra, "eft": own}})
    except OSError:  # a full disk may be what went wrong; without the file the launcher shows the end of stderr
        traceback.print_exception(error)


def words_of(error: BaseException) -> tuple[str, bool]:
    """What is shown of `error`: its message for the user, else the traceback; whether it followed from another one."""
    followed = isinstance(error, OtherRankFailed) or any(text in str(error) for text in _FOLLOWED)
    if isinstance(error, EftError) and not followed:
        return f"error: {error}", False
    callstack = "".join(traceback.format_exception(error))
    if any(text in str(error) for text in _WAITED):
        callstack += "A collective waited longer than `ddp_timeout` seconds: some process did not come to it.\n"
    return callstack, followed


def exit_code_of(error: Exception) -> int:
    """As the command line has them: what the user can mend, and what is a failure."""
    return EXIT_USAGE if isinstance(error, EftError) and not isinstance(error, PromiseBroken) else 1


def record_stop(exit_code: int) -> None:
    """Leave the exit code of a run that was asked to stop."""
    write_text(Path(os.environ[ERROR_FILE]).with_name(STOPPED), str(exit_code))


def recorded_stop(logs: Path) -> int:
    """The exit code of a run that was asked to stop; 0: it was not."""
    return next((int(path.read_text()) for path in sorted(logs.rglob(STOPPED))), 0)


def first_failure(failures: Mapping[int, ProcessFailure], logs: Path, *, several_machines: bool = False) -> Failure:
    """The failure that the others came from.

    Args:
        failures: by rank, what the launcher saw: the processes of this machine that had ended when it looked.
        logs: its folder: others have written theirs meanwhile.
        several_machines: what went wrong may stand elsewhere.
    """
    found = [_seen(rank, failure, logs) for rank, failure in failures.items()]
    offset = min(rank - failure.local_rank for rank, failure in failures.items())
    paths = {Path(failure.error_file) for failure in failures.values()}
    attempts = sorted(logs.rglob("attempt_*"), key=lambda path: int(path.name.rpartition("_")[2]))
    others = [path for path in attempts[-1].glob("*/error.json") if path not in paths] if attempts else []
    written = (_written(offset + int(path.parent.name), 1, path) for path in others)
    found += [failure for failure in written if failure is not None]
    first = min(found, key=lambda failure: (failure.cause, failure.at_ns))
    if first.exit_code in STOPS and several_machines:
        return replace(first, text=f"{first.text} on all machines (asked for on another one, or its launcher was lost)")
    if first.cause is Cause.FOLLOWED and several_machines:
        lost = "a process on another machine was lost; what it said stands there. Start the same command on all again."
        return replace(first, text=f"error: {lost}\n\n{first.text}")
    return first


def _seen(rank: int, failure: ProcessFailure, logs: Path) -> Failure:
    code = failure.exitcode
    at_ns = failure.timestamp * 10**9
    if code < 0:
        cause = Cause.CLOSED if -code == SIGTERM else Cause.SIGNAL
        name = f"{-code}, {Signals(-code).name}" if -code in set(Signals) else str(-code)
        said = _tail(failure, logs)
        return Failure(cause, at_ns, rank, code, f"rank {rank} was ended by signal {name}" + (said and f"\n{said}"))
    written = _written(rank, code, Path(failure.error_file))
    if written is not None:
        return written
    if code in STOPS:
        text = f"stopped on request (exit code {code}) after a full checkpoint; the same command continues"
        return Failure(Cause.CLOSED, at_ns, rank, code, text)
    return Failure(Cause.SILENT, at_ns, rank, code, _tail(failure, logs) or f"rank {rank} said nothing")


def _written(rank: int, exit_code: int, path: Path) -> Failure | None:
    """What a process has left in `path`, if anything readable: the user's own torchrun has others write it, too."""
    try:
        message, at_ns = json.loads(path.read_text())["message"], path.stat().st_mtime_ns
        own = message.get("eft") or {"text": message["extraInfo"]["py_callstack"], "followed": False}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    cause = Cause.FOLLOWED if own["followed"] else Cause.OWN
    return Failure(cause, at_ns, rank, exit_code, own["text"].rstrip())


def _tail(failure: ProcessFailure, logs: Path) -> str:
    found = sorted(logs.glob(f"**/{failure.local_rank}/stderr.log"))
    lines = found[-1].read_text(errors="replace").splitlines() if found else []
    return "\n".join(lines[-_TAIL_LINES:])
