"""When a fault strikes, seen from inside of the process that it hits: at a file operation, at a batch of an evaluation.

Python reports every opening, renaming and removing of a file to audit hooks (PEP 578), in whatever thread it happens,
so a signal can be placed exactly into a save or a retention. Every flush opens its file or folder first.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from eft.callbacks.stopping import StopOnRequest

_EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")


def at_file_event(number: int, strike: Callable[[], None]) -> Callable[[Path], None]:
    """Strike at the `number`-th file operation in the checkpoints of the output folder."""

    def prepare(output: Path) -> None:
        count = 0

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal count
            if event in _EVENTS and _concerns(event, arguments, str(output)):
                count += 1
                if count == number:
                    strike()

        sys.addaudithook(hook)

    return prepare


def count_file_events(note: Path) -> Callable[[Path], None]:
    """Write every file operation of the run into `note`, a line each."""

    def prepare(output: Path) -> None:
        descriptor = os.open(note, os.O_CREAT | os.O_WRONLY | os.O_APPEND)

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if event in _EVENTS and _concerns(event, arguments, str(output)):
                os.write(descriptor, f"{event} {arguments[0]}\n".encode())

        sys.addaudithook(hook)

    return prepare


def _concerns(event: str, arguments: tuple[Any, ...], output: str) -> bool:
    path = os.fspath(arguments[0]) if isinstance(arguments[0], str | os.PathLike) else ""
    if path.startswith(output) and "checkpoint-" in path:
        return True
    # shutil.rmtree works relative to a descriptor.
    return event in ("os.remove", "os.rmdir") and isinstance(arguments[-1], int) and arguments[-1] >= 0


def at_evaluation_batch(number: int, strike: Callable[[], None]) -> Callable[[Path], None]:
    """Strike before the `number`-th batch of all evaluations is over."""

    def prepare(output: Path) -> None:
        count, event = 0, StopOnRequest.on_prediction_step

        def counted(self: StopOnRequest, *arguments: Any, **keywords: Any) -> None:
            nonlocal count
            count += 1
            if count == number:
                strike()
            event(self, *arguments, **keywords)

        mock.patch.object(StopOnRequest, "on_prediction_step", counted).start()

    return prepare


def send(number: signal.Signals) -> Callable[[], None]:
    """This process gets the signal."""
    return lambda: os.kill(os.getpid(), number)


def with_clock_going_back(every_s: float, by_s: float) -> Callable[[Path], None]:
    """Inside, the wall clock jumps back by `by_s` whenever `every_s` have passed. Monotonic clocks go on."""

    def prepare(output: Path) -> None:
        began, wall = time.monotonic(), time.time()

        def backwards() -> float:
            passed = time.monotonic() - began
            return wall + passed - by_s * int(passed / every_s)

        mock.patch.object(time, "time", backwards).start()

    return prepare
