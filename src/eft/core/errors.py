"""Errors whose message is the whole answer: the CLI prints them without a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the records know NumPy, which takes its time to import
    from eft.core.records import ShownRow


class EftError(Exception):
    """Something the user can mend. `str(error)` names what, where, what was expected, the nearest valid thing."""


class ConfigError(EftError):
    """The YAML or an override is wrong (exit code 2)."""


class DataError(EftError):
    """A row, file or data set is wrong (exit code 2)."""


class DataGateError(DataError):
    """Prepared data are over a gate's limit (exit code 2); `rows` has the worst ones, decoded."""

    def __init__(self, message: str, rows: Sequence[ShownRow] = ()):
        super().__init__(message)
        self.rows = list(rows)


class ModelError(EftError):
    """The model, tokenizer or adapter cannot do what the config asks (exit code 2)."""


class CheckpointError(EftError):
    """A checkpoint is missing, incomplete or does not belong to this run (exit code 2)."""


class RunFinished(CheckpointError):  # noqa: N818  # the run is over, which is no error
    """The same run was finished here before, so that nothing is left to do (exit code 0)."""


class OutputError(EftError):
    """The output folder can no longer be written; what was complete in it still is (exit code 2)."""


class PromiseBroken(EftError):  # noqa: N818  # a statement about the run, not about the program
    """A promise (E1 to E8) does not hold on this run (exit code 1)."""


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word closest to `word`, or None when nothing is close."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return matches[0] if matches else None
