"""The terminal: results go to stdout, notes and errors to stderr. Logging is set up here and nowhere else."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler
from rich.text import Text

from eft.config.load import LoadedConfig, load_config
from eft.core.errors import EftError

console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
"""stdout: what the command was asked for."""
error_console = Console(stderr=True, highlight=False)
"""stderr: notes, log records and errors, never mixed into piped results."""


def open_config(path: Path, overrides: Sequence[str] | None = None, *, allow_unsupported: bool = False) -> LoadedConfig:
    """Load the config that a command was given, and tell the user which keys have no effect.

    Raises:
        ConfigError: the config is wrong.
    """
    loaded = load_config(path, overrides or [], allow_unsupported=allow_unsupported)
    print_notes(loaded.notes())
    return loaded


def print_error(error: EftError) -> None:
    """`error: …` in red; the message is the whole answer, so there is no traceback."""
    error_console.print(Text.assemble(("error: ", "bold red"), str(error)), soft_wrap=True)


def print_notes(notes: Iterable[str]) -> None:
    """One `note: …` line each."""
    for note in notes:
        error_console.print(Text.assemble(("note: ", "bold yellow"), note), soft_wrap=True)


def set_up_logging(*, verbose: bool = False, quiet: bool = False) -> None:
    """Send log records to stderr: ours from INFO on (DEBUG with `verbose`), those of libraries from WARNING on.

    `eft --verbose` comes first; a command that asks again, without it, changes nothing. `quiet`: errors only, for
    processes that repeat what another one says.
    """
    if quiet:
        logging.getLogger().setLevel(logging.ERROR)
        logging.getLogger("eft").setLevel(logging.ERROR)
        return
    if not verbose and any(isinstance(handler, RichHandler) for handler in logging.getLogger().handlers):
        return
    handler = RichHandler(console=error_console, show_path=verbose, show_time=verbose, markup=False)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("eft").setLevel(logging.DEBUG if verbose else logging.INFO)


def quiet_libraries() -> None:
    """Keep libraries from writing among our lines. To be called once they are to be imported anyway."""
    if not sys.stderr.isatty():
        # Bars that nobody can watch fill a log file; read when tqdm is imported.
        os.environ.setdefault("TQDM_DISABLE", "1")
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # Says in every layer and step that 8-bit products are made in float16, and that it found no kernels to download.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    # Deprecations between the libraries (peft calls a name that transformers has renamed) are not the user's to mend.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers|peft")
    # DeepSpeed 0.19 calls collectives by the names that torch 2.13 has replaced.
    warnings.filterwarnings("ignore", message="`torch.distributed.* is deprecated", category=FutureWarning)
    warnings.filterwarnings("ignore", message=r"The PEFT config's `base_model_name_or_path` was renamed", module="peft")
