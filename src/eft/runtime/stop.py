"""Being asked to stop, by a signal or by a file: heard at any time, heeded by all processes at the same point.

A signal handler does nothing but remember. The run asks at points that every process passes in the same order: the end
of a step, a batch of an evaluation, a save.
"""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from eft.core.constants import EXIT_STOP_FILE

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Ctrl-C; what schedulers send before they kill; what they can be told to send earlier."""

FILE_EVERY_S = 1.0
"""How often to look for the file: on a network file system a look may take milliseconds."""


class EvaluationStopped(Exception):  # noqa: N818  # no error: the run is asked to stop, and goes on with that
    """An evaluation was given up because the run is to stop; the continued run makes it again."""


class StopRequest:
    """Whether this run has been asked to stop; asked once, it stays so."""

    def __init__(self, stop_file: Path, *, looks_for_file: bool = True, agree: Callable[[int], int] = int) -> None:
        """
        Args:
            stop_file: stands for a request as soon as it is there, and is removed.
            looks_for_file: whether this process looks; one of a run is enough.
            agree: the largest of a number over all processes, as of its last call; alone the number itself.
        """
        self.stop_file = stop_file
        self.code = 0
        """What asked: 0 nothing, otherwise the exit code that says so, 128 + the signal's number or EXIT_STOP_FILE."""
        self._looks_for_file = looks_for_file
        self._agree = agree
        self._last_look = -math.inf
        self._before: dict[int, Any] = {}
        self.is_listening = False
        """Whether requests are heeded."""

    @property
    def reason(self) -> str:
        """What asked, in words."""
        return str(self.stop_file) if self.code == EXIT_STOP_FILE else signal.Signals(self.code - 128).name

    def listen(self) -> None:
        """Take the signals over, until `release`. Only the main thread may; elsewhere they stay as they are."""
        if self.is_listening:
            return
        self.code, self.is_listening = 0, True
        try:
            self._before = {number: signal.signal(number, self._remember) for number in SIGNALS}
        except ValueError:
            self._before = {}

    def release(self) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before, self.is_listening = {}, False

    def is_agreed(self) -> bool:
        """Whether to stop here. Every process calls it at the same points."""
        self._look()
        agreed = self._agree(self.code)
        self.code = agreed or self.code
        return agreed != 0

    def _look(self) -> None:
        now = time.monotonic()
        if self.code or not self._looks_for_file or now - self._last_look < FILE_EVERY_S:
            return
        self._last_look = now
        try:
            # Removed here: the next start of the same command is to go on.
            self.stop_file.unlink()
        except FileNotFoundError:
            return
        except OSError as error:
            logger.warning("%s: cannot be removed (%s); remove it before the next start", self.stop_file, error)
        self.code = EXIT_STOP_FILE

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.code:
            # A third one ends the process whatever it is doing.
            for every in SIGNALS:
                signal.signal(every, signal.SIG_DFL)
            raise KeyboardInterrupt
        self.code = 128 + number


def stop_file_of(stop_file: str | None, output_dir: str) -> Path:
    """`stop_file`, or STOP in the output folder."""
    return Path(output_dir, "STOP") if stop_file is None else Path(stop_file)
