"""The output folder belongs to one run: a new one, the continuation of an unfinished one, or an error (D15)."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from eft.core.atomic import remove_leftovers, write_json
from eft.core.constants import CHECKPOINT_PREFIX
from eft.core.errors import CheckpointError, ConfigError, RunFinished

RUN_FILE = "run.json"
WAIT_S = 10.0
"""How long to wait for a locked folder: the data workers of a killed run live on for some seconds."""

Status = Literal["running", "interrupted", "finished"]
Differences = Callable[[dict[str, Any], dict[str, Any]], list[str]]


@dataclass
class RunFolder:
    """A claimed output folder."""

    path: Path
    continues: bool
    """Whether an unfinished run of the same identity was found here."""
    identity: dict[str, Any]
    changed: list[str] = field(default_factory=list)
    """`key: before → now` of the settings in which that run differs."""
    lock: int | None = field(default=None, repr=False)
    """Descriptor of the folder that keeps other processes out; the system gives it back when the process ends."""

    def release(self) -> None:
        """Let other processes have the folder."""
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None

    def mark(self, status: Status, **facts: Any) -> None:
        """Write down how far the run has come."""
        write_json(self.path / RUN_FILE, {"status": status, "identity": self.identity, **facts})


Claim = Literal["new", "replace", "continue"]


@dataclass(frozen=True)
class FolderRequest:
    """What a run wants of its output folder."""

    path: Path
    """`output_dir`; made if it is missing."""
    identity: dict[str, Any]
    """The keys that a continued run must agree in, JSON-able."""
    overwrite: bool
    """An earlier eft run in the folder may be deleted."""
    differences: Differences
    """(identity before, identity now) to a list of `key: before → now`."""
    inputs: Mapping[str, Path] = field(default_factory=dict)
    """Config key to a file or folder that the run reads, and that must outlive a deletion of the earlier run."""
    allow_change: bool = False
    """Settings may differ from those of the run that is continued."""
    cache: Path | None = None
    """The prepared data: may lie in the folder, is neither foreign to it nor deleted with it."""
    continues: bool = False
    """A run of the same settings is continued, and is left alone once it is finished."""


def check_finished(request: FolderRequest) -> None:
    """Raise RunFinished where the same run was finished in the folder: a supervisor may start it again for ever."""
    if not request.continues or request.overwrite or not (request.path / RUN_FILE).is_file():
        return
    before = _read_record(request.path / RUN_FILE)
    if before["status"] == "finished" and not request.differences(before["identity"], request.identity):
        raise RunFinished(
            f"output_dir {request.path}: this run is finished, nothing is left to do (--overwrite trains it anew)."
        )


def check_run_folder(request: FolderRequest) -> Claim:
    """What the folder is to this run; changes nothing but leftovers of killed processes.

    Raises:
        ConfigError: the folder cannot be written, holds files that eft did not write, or would be deleted with
            something that the run reads.
        CheckpointError: it holds a finished run, or an unfinished one of another config; another process is at it.
    """
    path = request.path
    _check_writable(path)
    os.close(_locked(path))
    remove_leftovers(path)
    record = path / RUN_FILE
    if not record.is_file():
        foreign = sorted(entry.name for entry in path.iterdir() if not _holds(entry, request.cache))
        if foreign:
            raise ConfigError(
                f"output_dir {path}: is not empty and holds no eft run (found {', '.join(foreign[:5])}). "
                "Choose an empty or new folder; eft never writes among files it does not know."
            )
        return "new"
    before = _read_record(record)
    # Without a checkpoint nothing was reached yet that a new start could lose.
    if request.overwrite or (before["status"] != "finished" and not any(path.glob(f"{CHECKPOINT_PREFIX}*"))):
        _check_inputs(request)
        return "replace"
    if before["status"] == "finished":
        check_finished(request)
        raise CheckpointError(f"output_dir {path}: holds a finished run. Choose another folder, or pass --overwrite.")
    changed = request.differences(before["identity"], request.identity)
    if changed and not request.allow_change:
        raise CheckpointError(
            f"output_dir {path}: holds an unfinished run of another config:\n  "
            + "\n  ".join(changed)
            + "\nGo back to its settings to continue it, pass --allow-change to continue it with these, choose another "
            "folder, or pass --overwrite to delete it."
        )
    return "continue"


def claim_run_folder(request: FolderRequest) -> RunFolder:
    """Take the folder for this run, until `release`. Errors as `check_run_folder`."""
    claim = check_run_folder(request)
    folder = RunFolder(request.path, claim == "continue", request.identity, lock=_locked(request.path))
    if claim == "replace":
        _clear(request.path, request.cache)
    if folder.continues:
        folder.changed = request.differences(recorded_identity(request.path), request.identity)
    if not folder.continues or folder.changed:
        # At once, so that a run that dies early leaves a folder that the next start knows.
        folder.mark("running")
    return folder


def _locked(path: Path) -> int:
    """A descriptor of the folder `path` with a lock that no other process holds."""
    handle = os.open(path, os.O_RDONLY)
    end = time.monotonic() + WAIT_S
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() < end:
                time.sleep(0.2)
                continue
            os.close(handle)
            raise CheckpointError(
                f"output_dir {path}: another process is training in it. Wait for it, or choose another folder."
            ) from error
        except OSError:
            pass  # a file system without locks
        return handle


def recorded_identity(path: Path) -> dict[str, Any]:
    """The identity of the run in `path`; empty where none is known."""
    try:
        identity: dict[str, Any] = _read_record(path / RUN_FILE)["identity"]
    except ConfigError:
        return {}
    return identity


def _read_record(record: Path) -> dict[str, Any]:
    try:
        before = json.loads(record.read_text())
        known = before["status"] in get_args(Status) and isinstance(before["identity"], dict)
    except (OSError, ValueError, KeyError, TypeError):
        known = False
    if not known:
        # Not even for --overwrite: nothing shows that what lies here is ours to delete.
        raise ConfigError(
            f"output_dir {record.parent}: its {RUN_FILE} is broken or not eft's, so nothing in the folder is touched. "
            "Choose another folder, or delete it yourself."
        )
    result: dict[str, Any] = before
    return result


def _check_inputs(request: FolderRequest) -> None:
    """Refuse to delete what the run is about to read."""
    for key, source in request.inputs.items():
        if source.resolve().is_relative_to(request.path.resolve()):
            raise ConfigError(
                f"{key} {source}: lies in output_dir {request.path}, whose earlier run would be deleted and it with it."
                " Move it, or choose another output_dir."
            )


def _holds(entry: Path, cache: Path | None) -> bool:
    return cache is not None and cache.resolve().is_relative_to(entry.resolve())


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


def _clear(path: Path, cache: Path | None) -> None:
    for entry in path.iterdir():
        if _holds(entry, cache):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
