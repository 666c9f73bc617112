"""The output folder belongs to one run: a new one, the continuation of an unfinished one, or an error (D15)."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from eft.core.atomic import remove_leftovers, write_json
from eft.core.constants import CHECKPOINT_PREFIX
from eft.core.errors import CheckpointError, ConfigError

RUN_FILE = "run.json"

Status = Literal["running", "interrupted", "finished"]
Differences = Callable[[dict[str, Any], dict[str, Any]], list[str]]


@dataclass
class RunFolder:
    """A claimed output folder."""

    path: Path
    continues: bool
    """Whether an unfinished run of the same identity was found here."""
    identity: dict[str, Any]

    def mark(self, status: Status, **facts: Any) -> None:
        """Write down how far the run has come."""
        write_json(self.path / RUN_FILE, {"status": status, "identity": self.identity, **facts})


Claim = Literal["new", "replace", "continue"]


def check_run_folder(path: Path, identity: dict[str, Any], *, overwrite: bool, differences: Differences) -> Claim:
    """What `path` is to a run with this identity; changes nothing but leftovers of killed processes.

    Args:
        path: `output_dir`; made if it is missing.
        identity: the keys that a continued run must agree in, JSON-able.
        overwrite: an earlier eft run in the folder may be deleted.
        differences: (identity before, identity now) to a list of `key: before → now`.

    Raises:
        ConfigError: the folder cannot be written, or holds files that eft did not write.
        CheckpointError: it holds a finished run, or an unfinished one of another config.
    """
    _check_writable(path)
    remove_leftovers(path)
    record = path / RUN_FILE
    if not record.is_file():
        foreign = sorted(entry.name for entry in path.iterdir())
        if foreign:
            raise ConfigError(
                f"output_dir {path}: is not empty and holds no eft run (found {', '.join(foreign[:5])}). "
                "Choose an empty or new folder; eft never writes among files it does not know."
            )
        return "new"
    before = json.loads(record.read_text())
    # Without a checkpoint nothing was reached yet that a new start could lose.
    if overwrite or (before["status"] != "finished" and not any(path.glob(f"{CHECKPOINT_PREFIX}*"))):
        return "replace"
    if before["status"] == "finished":
        raise CheckpointError(f"output_dir {path}: holds a finished run. Choose another folder, or pass --overwrite.")
    changed = differences(before["identity"], identity)
    if changed:
        raise CheckpointError(
            f"output_dir {path}: holds an unfinished run of another config:\n  "
            + "\n  ".join(changed)
            + "\nGo back to its settings to continue it, choose another folder, or pass --overwrite to delete it."
        )
    return "continue"


def claim_run_folder(path: Path, identity: dict[str, Any], *, overwrite: bool, differences: Differences) -> RunFolder:
    """Take the folder for this run. Arguments and errors as `check_run_folder`."""
    claim = check_run_folder(path, identity, overwrite=overwrite, differences=differences)
    folder = RunFolder(path, claim == "continue", identity)
    if claim == "replace":
        _clear(path)
    if claim != "continue":
        # At once, so that a run that dies early leaves a folder that the next start knows.
        folder.mark("running")
    return folder


def _check_writable(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise ConfigError(f"output_dir {path}: is a file; a folder is needed")
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".tmp-write-probe.{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"output_dir {path}: cannot be written ({error.strerror})") from error


def _clear(path: Path) -> None:
    for entry in path.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
