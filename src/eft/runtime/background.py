"""One job at a time beside the training, whose failure is not lost."""

from __future__ import annotations

import threading
from collections.abc import Callable


class BackgroundJob:
    """Runs one job in a thread; a second one only after the first is over."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def start(self, job: Callable[[], None]) -> None:
        """Start `job`. The one before must be over (`wait`)."""
        assert self._thread is None, "one job at a time"
        # Not a daemon: leaving Python waits for the job, also after an error elsewhere.
        self._thread = threading.Thread(target=self._run, args=(job,), name="eft-save")
        self._thread.start()

    def wait(self) -> None:
        """Wait for the job, if there is one; raises what it raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.raise_failure()

    def raise_failure(self) -> None:
        """Raise, once, what the job raised; without waiting for one that still runs."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _run(self, job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:  # handed to the thread that asked for the job
            self._failure = error
