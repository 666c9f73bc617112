"""The terminal: results go to stdout, everything else to stderr. Logging is set up here and nowhere else."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from rich.console import Console
from rich.logging import RichHandler
from rich.text import Text

from eft.core.errors import EftError

stdout = Console(highlight=False, soft_wrap=True)
"""What the command was asked for."""
stderr = Console(stderr=True, highlight=False, soft_wrap=True)
"""Notes, progress and errors; never mixed into piped results."""


def print_error(error: EftError) -> None:
    """`error: …` in red; the message is the whole answer, so there is no traceback."""
    stderr.print(Text.assemble(("error: ", "bold red"), str(error)))


def print_notes(notes: Iterable[str]) -> None:
    """One `note: …` line each."""
    for note in notes:
        stderr.print(Text.assemble(("note: ", "bold yellow"), note))


def set_up_logging(*, verbose: bool = False) -> None:
    """Send log records to stderr: ours from INFO on (DEBUG with `verbose`), those of libraries from WARNING on."""
    handler = RichHandler(console=stderr, show_path=verbose, show_time=verbose, markup=False, rich_tracebacks=False)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("eft").setLevel(logging.DEBUG if verbose else logging.INFO)
