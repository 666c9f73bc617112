"""What callbacks share with the run: how it ends, and what they need to know of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from eft.core.records import PromiseResult


@dataclass
class RunOutcome:
    """How the run ended, and what was proven on the way; filled by callbacks, read by `run.train`."""

    reason: str = "finished"
    exit_code: int = 0
    """Of the command: not 0 where the run was asked to stop before it was over (`callbacks.stopping`)."""
    failed: bool = False
    """The weights are not worth exporting: a guard stopped the run."""
    promises: list[PromiseResult] = field(default_factory=list)

    @property
    def is_interrupted(self) -> bool:
        """Whether the run is to be continued: nothing is exported."""
        return self.failed or self.exit_code != 0

    def start(self) -> None:
        """A training begins."""
        self.reason, self.exit_code, self.failed = "finished", 0, False

    def fail(self, reason: str) -> None:
        """The run ends here, and what it has come to is not to be used."""
        self.reason, self.failed = reason, True


@dataclass(frozen=True)
class CallbackContext:
    """What callbacks need of the run."""

    output_dir: Path
    outcome: RunOutcome
    check_keys_read: Callable[[], PromiseResult]
    """Promise E8, asked when everything has been set up."""
    console: Console | None
    """Where the progress line goes; None: nowhere."""
    agree: Callable[[int], int] = int
    """The largest of a number over all processes, as of the step before; alone the number itself."""
