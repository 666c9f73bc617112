"""Notices when a process of the run stops answering, and names it, the line it was at and what the others wait in.

Every process says once a second that it lives and where its main thread is, and listens to its right neighbour. That
is a sign of life, not of progress: a long step goes on answering. A process that is stopped (SIGSTOP, a frozen host, a
page that never comes) does not, and all others would wait in their next collective until it times out. Every process
counts the seconds by its own monotonic clock: no clock of another one is read.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from torch.distributed import DistError, Store, TCPStore  # type: ignore[attr-defined]  # torch's own stubs lack them

from eft.core.constants import EXIT_FAILED
from eft.core.errors import EftError
from eft.parallel.failures import record_failure

BEAT_S = 1.0
_DONE = "done"
_PR_SET_PDEATHSIG = 1
_COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "barrier", "all_to_all", "gather", "scatter")
_OF_DDP = ("_pre_forward", "_sync_", "_distributed_broadcast")
_TORCH = f"{os.sep}torch{os.sep}"
_PACKAGE = str(Path(__file__).parents[1]) + os.sep
_GROUP = f"parallel{os.sep}group.py"
_WRAPPERS = (f"parallel{os.sep}watch.py", _GROUP)
"""Files whose lines say what is waited for, or nothing, but not what the run was doing."""


class StalledRank(EftError):  # noqa: N818  # named after what happened
    """A process of the run no longer answers."""


class StallWatch:
    """A thread that sends this process's signs of life and waits for those of its neighbour."""

    def __init__(
        self,
        store: Store,
        rank: int,
        world_size: int,
        timeout_s: float,
        on_silence: Callable[[str, int | None], None],
        *,
        main_thread: int | None = None,
    ) -> None:
        """
        Args:
            store: shared by all processes; a connection of its own, since one that waits blocks.
            timeout_s: silence after which `on_silence` is called, once, with a message for the user and the process id
                of the silent neighbour (on its machine), if it has ever told it.
            main_thread: whose place in the code is told; default: the calling one.
        """
        self._store = store
        self._rank = rank
        self._world_size = world_size
        self._neighbour = (rank + 1) % world_size
        self._timeout_s = timeout_s
        self._on_silence = on_silence
        self._main_thread = main_thread or threading.get_ident()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="eft-stall-watch", daemon=True)

    def start(self) -> None:
        """Begin. The neighbour has `timeout_s` for its first sign, too."""
        self._thread.start()

    def stop(self) -> None:
        """Say goodbye: from here on silence is no fault."""
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        heard, heard_at, place, pid = "", time.monotonic(), "", None
        beat = 0
        try:
            # The first sign at once: a process that stops within a second has still said where it was and its id.
            while beat == 0 or not self._over.wait(BEAT_S):
                beat += 1
                self._store.set(_key(self._rank), json.dumps([beat, place_of(self._main_thread), os.getpid()]))
                sign = self._neighbours_sign()
                if sign != heard:
                    heard, heard_at = sign, time.monotonic()
                    if sign not in ("", _DONE):
                        _, place, pid = json.loads(sign)
                elif time.monotonic() - heard_at > self._timeout_s:
                    # The last thing that all do together is to wait for each other: nobody is done long before.
                    message = self._left_message() if heard == _DONE else self._message(place)
                    return self._on_silence(message, None if heard == _DONE else pid)
            self._store.set(_key(self._rank), _DONE)
        except DistError as error:
            # Its launcher has gone. So have the processes beside it, or they are on the way to their last checkpoint.
            if not self._over.wait(self._timeout_s):
                self._on_silence(f"the launcher that keeps the run's store does not answer any more ({error})", None)

    def _neighbours_sign(self) -> str:
        key = _key(self._neighbour)
        return self._store.get(key).decode() if self._store.check([key]) else ""

    def _left_message(self) -> str:
        return (
            f"rank {self._neighbour} of {self._world_size} has ended, but rank {self._rank} is still at "
            f"{place_of(self._main_thread)} after {self._timeout_s:g} s. The run ends; the same command continues it "
            "from its newest checkpoint."
        )

    def _message(self, last: str) -> str:
        where = f"at its last sign (one a second) it was at {last}" if last else "it has never answered"
        return (
            f"rank {self._neighbour} of {self._world_size} has not answered for {self._timeout_s:g} s: {where}. "
            f"Rank {self._rank} is at {place_of(self._main_thread)}. The run ends; the same command continues it from "
            "its newest checkpoint."
        )


def place_of(thread: int) -> str:
    """`file:line in function: code` of the innermost line of ours, and the collective that it waits in, if any.

    A collective of NCCL is not named: Python has left it when the host comes to wait for the device.
    """
    frame = sys._current_frames().get(thread)
    if frame is None:
        return "its end"
    stack = traceback.extract_stack(frame)
    ours = next((entry for entry in reversed(stack) if _is_ours(entry)), stack[-1])
    text = f"{Path(ours.filename).name}:{ours.lineno} in {ours.name}: {ours.line}"
    waits = next((entry for entry in reversed(stack) if _is_collective(entry)), None)
    if waits is not None:
        return f"{text} (waits in {waits.name}, {Path(waits.filename).name}:{waits.lineno})"
    if any(entry.name in ("backward", "_engine_run_backward") for entry in stack):
        return f"{text} (in the backward pass, which averages gradients over all ranks)"
    if any(entry.name == "synchronize" and _TORCH in entry.filename for entry in stack):
        # NCCL's collectives return at once: who lacks their numbers waits here.
        return f"{text} (waits for its device, where the collectives of the ranks are queued)"
    return text


def _is_ours(entry: traceback.FrameSummary) -> bool:
    return entry.filename.startswith(_PACKAGE) and not entry.filename.endswith(_WRAPPERS)


def _is_collective(entry: traceback.FrameSummary) -> bool:
    if "torch/nn/parallel/distributed" in entry.filename:
        # DDP has it in C++: the buckets are agreed on, the buffers sent round.
        return entry.name.startswith(_OF_DDP)
    named = any(name in entry.name for name in _COLLECTIVES)
    # To wait for one that was begun earlier is C++, too: only the name of our function tells which.
    return named and ("torch/distributed" in entry.filename or entry.filename == _PACKAGE + _GROUP)


def _key(rank: int) -> str:
    return f"eft/alive/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{rank}"


def end_process(message: str, silent: int | None = None) -> None:
    """Print why and leave at once: the main thread waits in a collective that no exception reaches.

    `silent`: the process that is missed. Where it is a child of this one's launcher it is killed: a stopped process
    does not hear that it is to end, and the launcher would wait for it.
    """
    # First what went wrong, then what makes the launcher look.
    record_failure(StalledRank(message))
    print(f"error: {message}", file=sys.stderr, flush=True)
    if silent is not None and _parent_of(silent) == os.getppid():
        os.kill(silent, signal.SIGKILL)
    os._exit(EXIT_FAILED)


def _parent_of(pid: int) -> int | None:
    """Process id of the parent; None where the system does not tell, or there is no such process here."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return None


def end_with_launcher() -> None:
    """From here on a launcher that is killed takes this process along: SIGTERM, so the last step is saved."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


@contextmanager
def stall_watch(
    rank: int, world_size: int, timeout_s: float, environ: Mapping[str, str] | None = None
) -> Iterator[None]:
    """While active, a process of the run that no longer answers ends this one with a message; 0 s: nothing."""
    variables = os.environ if environ is None else environ
    if world_size == 1 or timeout_s == 0 or not {"MASTER_ADDR", "MASTER_PORT"} <= variables.keys():
        yield
        return
    store = TCPStore(
        variables["MASTER_ADDR"],
        int(variables["MASTER_PORT"]),
        is_master=False,
        timeout=timedelta(seconds=max(timeout_s, 10.0)),
    )
    watch = StallWatch(store, rank, world_size, timeout_s, end_process)
    watch.start()
    try:
        yield
    finally:
        watch.stop()
