"""Checkpoint folders that are wholly there or not there, with checksums that tell a good one from a damaged one (D17).

`checkpoint-N` appears by a rename, after every file was flushed to the disk; its manifest, written last, lists size and
SHA-256 of each. A folder without a manifest that agrees is not COMPLETE and is never resumed from.
"""

from __future__ import annotations

import errno
import json
import logging
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn
from torch.optim import Optimizer

from eft.core.atomic import TEMPORARY_MARK, fsync_path, new_folder, remove_leftovers, write_json
from eft.core.constants import CHECKPOINT_PREFIX, MANIFEST_NAME
from eft.core.errors import CheckpointError
from eft.core.hashing import hash_file
from eft.runtime.background import BackgroundJob
from eft.runtime.draft import Draft, TensorCopies
from eft.runtime.optimizer_state import add_optimizer, load_optimizer
from eft.runtime.weights import add_weights, load_weights

MANIFEST_FORMAT = 1
_STEP = re.compile(re.escape(CHECKPOINT_PREFIX) + r"(\d+)")
_ASIDE = ".aside"
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class NewestCheckpoint:
    """The checkpoint to resume from, and what was passed over to find it."""

    path: Path | None
    skipped: list[tuple[Path, str]]
    """Newer folders that are not complete, each with the reason."""


@dataclass(frozen=True)
class SaveTimes:
    """Seconds of one save: the training stood still for `blocked_s`; the folder was there after `write_s`."""

    step: int
    blocked_s: float
    write_s: float


class CheckpointStore:
    """The checkpoints of one run, in `output_dir`."""

    def __init__(self, output_dir: Path, *, save_total_limit: int | None, asynchronous: bool = False) -> None:
        """Keeps the newest `save_total_limit` checkpoints (None: all) and the best one. Touches no file.

        With `asynchronous`, `save` returns once the state was copied, and writes beside the next steps.
        """
        assert save_total_limit is None or save_total_limit >= 1
        self.output_dir = output_dir
        self.save_total_limit = save_total_limit
        self.times: list[SaveTimes] = []
        """Of every save that is over."""
        self._copies = TensorCopies() if asynchronous else None
        self._job = BackgroundJob()

    def path(self, step: int) -> Path:
        """The folder of `step`, there or not."""
        return self.output_dir / f"{CHECKPOINT_PREFIX}{step}"

    def remove_leftovers(self) -> list[Path]:
        """Delete what killed processes left unfinished; to be called once, before a run starts."""
        return remove_leftovers(self.output_dir)

    def steps(self) -> list[int]:
        """Steps that have a folder, complete or not, ascending."""
        folders = self.output_dir.iterdir() if self.output_dir.is_dir() else iter(())
        matches = (_STEP.fullmatch(folder.name) for folder in folders if folder.is_dir())
        return sorted(int(match[1]) for match in matches if match)

    def newest_complete(self) -> NewestCheckpoint:
        """The newest checkpoint to resume from: every file agrees with its manifest and the optimizer's are among them.

        Newer ones that are damaged, or hold the model only, are passed over.
        """
        skipped: list[tuple[Path, str]] = []
        for step in reversed(self.steps()):
            folder = self.path(step)
            try:
                if not verify_manifest(folder).get("resumable", True):
                    raise CheckpointError("it holds the model only (`save_only_model`)")
            except CheckpointError as error:
                skipped.append((folder, str(error)))
            else:
                return NewestCheckpoint(folder, skipped)
        return NewestCheckpoint(None, skipped)

    def save(
        self,
        step: int,
        best_step: int | None,
        extra: Mapping[str, Any],
        *,
        keep: bool,
        fill: Callable[[Draft], None],
    ) -> None:
        """Write `checkpoint-<step>` with what `fill` adds to a draft; arguments as for `write`.

        Asynchronous: returns when everything was added. One save at a time is under way; the next one waits for it.

        Raises:
            CheckpointError: as `write` does; of an asynchronous save it is raised by the next `wait` or `save`.
        """
        started = time.perf_counter()
        self.wait()
        draft = Draft(self._copies)
        fill(draft)
        draft.finish()

        def write() -> None:
            with self.write(step, best_step, extra, keep=keep) as folder:
                if folder is not None:
                    draft.write(folder)
            seconds = time.perf_counter() - started
            self.times.append(SaveTimes(step, seconds if self._copies is None else blocked, seconds))

        blocked = time.perf_counter() - started
        if self._copies is None:
            write()
        else:
            self._job.start(write)

    def wait(self) -> None:
        """Wait until the save that is under way is on the disk; raises CheckpointError where it failed."""
        self._job.wait()

    def raise_failure(self) -> None:
        """Raise CheckpointError where an asynchronous save has failed meanwhile; waits for nothing."""
        self._job.raise_failure()

    @contextmanager
    def write(
        self, step: int, best_step: int | None = None, extra: Mapping[str, Any] | None = None, *, keep: bool = True
    ) -> Iterator[Path | None]:
        """Yield a temporary folder to fill; on leaving, it becomes `checkpoint-<step>` and old ones are removed.

        Yields None, with a log line, when a complete `checkpoint-<step>` with the same `extra` is there already and
        `keep` says that this run may have written it: it is kept. An incomplete one, or another run's, is renamed aside
        first. `best_step` is never removed, nor is the one just written. `extra` goes into the manifest. On an error in
        the body nothing is left and every older checkpoint is untouched.

        Raises:
            CheckpointError: the disk is full or the folder cannot be written.
        """
        target = self.path(step)
        if target.exists() and self._keep_existing(target, extra or {}, keep):
            yield None
            return
        with self._disk_errors(target), new_folder(target) as folder:
            yield folder
            write_manifest(folder, kind="checkpoint", extra={"step": step, **(extra or {})})
        self._retain(step, best_step)

    def _keep_existing(self, target: Path, extra: Mapping[str, Any], keep: bool) -> bool:
        try:
            if not keep:
                raise CheckpointError("it was there before the run started")
            manifest = verify_manifest(target)
            other = [name for name, value in extra.items() if manifest.get(name) != value]
            if other:
                raise CheckpointError(f"it belongs to another run: {', '.join(other)} differ")
        except CheckpointError as error:
            aside = _free_name(target.with_name(target.name + _ASIDE))
            target.rename(aside)
            _log.warning("%s is not this run's (%s); renamed to %s.", target.name, error, aside.name)
            return False
        _log.info("%s is there already and complete; kept.", target)
        return True

    @contextmanager
    def _disk_errors(self, target: Path) -> Iterator[None]:
        """Turn a full disk or a refused write into one message that says what is still safe."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            code = error.errno if isinstance(error, OSError) else None
            # safetensors reports the system's error as text.
            full = code in _DISK_FULL or any(f"(os error {number})" in str(error) for number in _DISK_FULL)
            if full:
                what = f"the disk is full ({shutil.disk_usage(self.output_dir).free / 2**20:,.0f} MiB free)"
            elif isinstance(error, PermissionError):
                what = f"no permission: {error}"
            elif isinstance(error, FileExistsError):
                what = "another process wrote it meanwhile"
            else:
                raise
            older = [self.path(step).name for step in self.steps() if (self.path(step) / MANIFEST_NAME).exists()]
            safe = f"{older[-1]} is untouched." if older else "No earlier checkpoint exists."
            raise CheckpointError(f"{target}: not written, {what}. {safe}") from error

    def _retain(self, written: int, best_step: int | None) -> None:
        """Remove the oldest complete checkpoints beyond the limit. What is not complete is not ours to delete."""
        if self.save_total_limit is None:
            return
        complete = [step for step in self.steps() if _sizes_agree(self.path(step))]
        kept = {*complete[-self.save_total_limit :], written, best_step}
        for step in complete:
            if step not in kept:
                # Renamed first, so that a kill in the middle leaves no half checkpoint under its name.
                doomed = _free_name(self.output_dir / f"{TEMPORARY_MARK}removed-{self.path(step).name}")
                self.path(step).rename(doomed)
                fsync_path(self.output_dir)
                shutil.rmtree(doomed, ignore_errors=True)

    # The same functions as methods, for callers that are handed only the store.

    def add_weights(self, draft: Draft, model: nn.Module) -> None:
        """See `weights.add_weights`."""
        add_weights(draft, model)

    def load_weights(self, folder: Path, model: nn.Module) -> None:
        """See `weights.load_weights`."""
        load_weights(folder, model)

    def add_optimizer(self, draft: Draft, model: nn.Module, optimizer: Optimizer) -> None:
        """See `optimizer_state.add_optimizer`."""
        add_optimizer(draft, optimizer, model)

    def load_optimizer(self, folder: Path, model: nn.Module, optimizer: Optimizer) -> None:
        """See `optimizer_state.load_optimizer`."""
        load_optimizer(folder, optimizer, model)


def write_manifest(folder: Path, *, kind: str, extra: Mapping[str, Any] | None = None) -> None:
    """Write the manifest of all files below `folder`: size and SHA-256 of each, `kind`, and the fields of `extra`."""
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": hash_file(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / MANIFEST_NAME
    }
    write_json(folder / MANIFEST_NAME, {"format": MANIFEST_FORMAT, "kind": kind, **(extra or {}), "files": files})


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of `folder`, not compared with the files.

    Raises:
        CheckpointError: it is missing, broken or of a newer format.
    """
    path = folder / MANIFEST_NAME
    try:
        manifest = json.loads(path.read_text())
        files = manifest["files"]
        entries = [(entry["bytes"], entry["sha256"]) for entry in files.values()]
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: missing; the folder was not written to its end, or not by eft.") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: broken: {type(error).__name__} {error}") from error
    if manifest.get("format") != MANIFEST_FORMAT or not entries:
        raise CheckpointError(f"{path}: format {manifest.get('format')!r}, {len(entries)} files; expected format 1.")
    result: dict[str, Any] = manifest
    return result


def verify_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of `folder`, after every file it lists was read and compared.

    Raises:
        CheckpointError: manifest missing or broken; a file missing, of another size or with another content.
    """
    manifest = read_manifest(folder)
    for name, entry in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path}: missing, though the manifest lists it.")
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise CheckpointError(f"{path}: has {size:,} bytes, the manifest says {entry['bytes']:,}.")
        if hash_file(path) != entry["sha256"]:
            raise CheckpointError(f"{path}: its content differs from the manifest's SHA-256; the file was altered.")
    return manifest


def _sizes_agree(folder: Path) -> bool:
    """The quick form of `verify_manifest`, for counting."""
    try:
        files = read_manifest(folder)["files"]
    except CheckpointError:
        return False
    return all((folder / name).is_file() and (folder / name).stat().st_size == files[name]["bytes"] for name in files)


def _free_name(path: Path) -> Path:
    number, candidate = 1, path
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate
