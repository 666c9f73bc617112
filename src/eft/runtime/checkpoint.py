"""Checkpoint folders that are wholly there or not there, with checksums that tell a good one from a damaged one (D17).

`checkpoint-N` appears by a rename, after every file was flushed to the disk; its manifest, written last, lists size and
SHA-256 of each. A folder without a manifest that agrees is not COMPLETE and is never resumed from.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from eft.core.atomic import TEMPORARY_MARK, append_line, fsync_path, new_folder, remove_leftovers
from eft.core.constants import CHECKPOINT_PREFIX, MANIFEST_NAME, SAVES_FILE
from eft.core.errors import CheckpointError
from eft.runtime.background import BackgroundJob
from eft.runtime.disk import clear_disk_errors, disk_trouble, lack_of_room
from eft.runtime.draft import SHARD_BYTES, Draft, TensorCopies
from eft.runtime.manifest import sizes_agree, verify_manifest, write_manifest
from eft.runtime.optimizer_state import add_optimizer, load_optimizer, place_scheduler
from eft.runtime.sharding import ONE_PROCESS, Sharding
from eft.runtime.shares import collect_shares, write_share
from eft.runtime.weights import add_weights, load_weights

__all__ = ["CheckpointStore", "NewestCheckpoint", "SaveCheck", "SaveTimes", "verify_manifest", "write_manifest"]

_STEP = re.compile(re.escape(CHECKPOINT_PREFIX) + r"(\d+)")
_ASIDE = ".aside"
_log = logging.getLogger(__name__)

SaveCheck = Callable[[Path], None]
"""Looks at a folder that is written but not yet a checkpoint; raises where it must not become one."""


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
    verify_s: float = 0.0
    """Of `write_s`, until a fresh process had loaded it (`verify_saves: always`)."""


class CheckpointStore:
    """The checkpoints of one run, in `output_dir`. With several processes each has its own store of the same folder."""

    def __init__(
        self,
        output_dir: Path,
        *,
        save_total_limit: int | None,
        keep_every: int | None = None,
        asynchronous: bool = False,
        sharding: Sharding = ONE_PROCESS,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        """Keeps the newest `save_total_limit` checkpoints (None: all), the best one, and every one whose step is a
        multiple of `keep_every`. Touches no file.

        With `asynchronous`, `save` returns once the state was copied, and writes beside the next steps.
        """
        assert save_total_limit is None or save_total_limit >= 1
        self.output_dir = output_dir
        self.save_total_limit = save_total_limit
        self.keep_every = keep_every
        self.sharding = sharding
        self.allow_change = False
        """Whether what is loaded may be of other settings: the run's own then count from here on (`--allow-change`)."""
        self.times: list[SaveTimes] = []
        """Of every save that is over."""
        self._shard_bytes = shard_bytes
        self._copies = TensorCopies() if asynchronous else None
        self._job = BackgroundJob()
        self._other_job = BackgroundJob()
        self._run_failed = threading.Event()

    def path(self, step: int) -> Path:
        """The folder of `step`, there or not."""
        return self.output_dir / f"{CHECKPOINT_PREFIX}{step}"

    def remove_leftovers(self) -> list[Path]:
        """Delete what killed processes left unfinished; to be called once, by one process, before a run starts."""
        return remove_leftovers(self.output_dir)

    def steps(self) -> list[int]:
        """Steps that have a folder, complete or not, ascending."""
        folders = self.output_dir.iterdir() if self.output_dir.is_dir() else iter(())
        matches = (_STEP.fullmatch(folder.name) for folder in folders if folder.is_dir())
        return sorted(int(match[1]) for match in matches if match)

    def newest_complete(self, *, before: int | None = None) -> NewestCheckpoint:
        """The newest checkpoint to resume from: every file agrees with its manifest and the optimizer's are among them.

        Newer ones that are damaged, or hold the model only, are passed over; so are those of step `before` and later.
        """
        skipped: list[tuple[Path, str]] = []
        for step in reversed([step for step in self.steps() if before is None or step < before]):
            folder = self.path(step)
            try:
                if not verify_manifest(folder).get("resumable", True):
                    raise CheckpointError("it holds the model only (`save_only_model`)")
            except CheckpointError as error:
                skipped.append((folder, str(error)))
            else:
                return NewestCheckpoint(folder, skipped)
        return NewestCheckpoint(None, skipped)

    def set_aside(self, first: int) -> None:
        """Rename every checkpoint of step `first` or later, so that none is resumed from or taken for a new one."""
        for step in self.steps():
            if step >= first:
                self.path(step).rename(_free_name(self.path(step).with_name(self.path(step).name + _ASIDE)))
        fsync_path(self.output_dir)

    def save(
        self,
        step: int,
        best_step: int | None,
        extra: Mapping[str, Any],
        *,
        keep: bool,
        fill: Callable[[Draft], None],
        check: SaveCheck | None = None,
    ) -> None:
        """Write `checkpoint-<step>` with what `fill` adds to a draft; arguments as for `write`.

        Every process calls it. Asynchronous: returns when everything was added. One save at a time is under way; the
        next one waits for it.

        Args:
            check: asked by the first process about the written folder, before it becomes a checkpoint.

        Raises:
            CheckpointError: as `write` does; of an asynchronous save it is raised by the next `wait` or `save`.
        """
        started = time.perf_counter()
        self._job.wait()
        draft = Draft(self._copies, self.sharding, self._shard_bytes)
        fill(draft)
        draft.finish()

        def write() -> None:
            verify_s = 0.0

            def timed_check(folder: Path) -> None:
                nonlocal verify_s
                if check is not None:
                    since = time.perf_counter()
                    check(folder)
                    verify_s = time.perf_counter() - since

            if self.sharding.rank == 0:
                self._write_draft(draft, step, best_step, extra, keep=keep, check=timed_check)
            else:
                write_share(self.path(step), self.sharding.rank, draft)
            seconds = time.perf_counter() - started
            times = SaveTimes(step, seconds if self._copies is None else blocked, seconds, verify_s)
            self.times.append(times)
            if self.sharding.rank == 0:
                with clear_disk_errors(self.output_dir):
                    append_line(self.output_dir / SAVES_FILE, json.dumps(asdict(times)))

        blocked = time.perf_counter() - started
        if self._copies is None:
            write()
        else:
            self._job.start(write)

    def beside(self, job: Callable[[], None]) -> None:
        """Run `job` beside the training and the saves; what it raises is raised as a failed save is."""
        self._other_job.wait()
        self._other_job.start(job)

    def fail(self) -> None:
        """An error has ended the run: a save that is under way hardly waits for processes that may be lost with it.

        Returns when it is over, whatever became of it: the error is the one to be told.
        """
        self._run_failed.set()
        with suppress(Exception):
            self.wait()

    def wait(self) -> None:
        """Wait until the save that is under way is on the disk; raises CheckpointError where it failed."""
        self._job.wait()
        self._other_job.wait()

    def raise_failure(self) -> None:
        """Raise CheckpointError where an asynchronous save has failed meanwhile; waits for nothing."""
        self._job.raise_failure()
        self._other_job.raise_failure()

    @contextmanager
    def write(
        self,
        step: int,
        best_step: int | None = None,
        extra: Mapping[str, Any] | None = None,
        *,
        keep: bool = True,
        known: Mapping[str, Any] | None = None,
        check: SaveCheck | None = None,
    ) -> Iterator[Path | None]:
        """Yield a temporary folder to fill; on leaving, it becomes `checkpoint-<step>` and old ones are removed.

        Yields None, with a log line, when a complete `checkpoint-<step>` with the same `extra` is there already and
        `keep` says that this run may have written it: it is kept. An incomplete one, or another run's, is renamed aside
        first. `best_step` is never removed, nor is the one just written. `extra` goes into the manifest, as do the
        entries of `known`. On an error in the body nothing is left and every older checkpoint is untouched.

        Raises:
            CheckpointError: the disk is full or the folder cannot be written.
        """
        target = self.path(step)
        if target.exists() and self._keep_existing(target, extra or {}, keep):
            yield None
            return
        with self._disk_errors(target), new_folder(target) as folder:
            yield folder
            write_manifest(folder, kind="checkpoint", extra={"step": step, **(extra or {})}, known=known)
            if check is not None:
                check(folder)
        self._retain(step, best_step)

    def _write_draft(
        self, draft: Draft, step: int, best_step: int | None, extra: Mapping[str, Any], *, keep: bool, check: SaveCheck
    ) -> None:
        """Of the first process: its own files, then what the others wrote."""
        known: dict[str, Any] = {}
        with self.write(step, best_step, extra, keep=keep, known=known, check=check) as folder:
            if folder is not None and (lack := lack_of_room(self.output_dir, draft.num_bytes)):
                raise self._not_written(self.path(step), lack)
            draft.write(folder)
            known.update(collect_shares(self.path(step), self.sharding.world_size, folder, self._run_failed))

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
        except Exception as error:
            trouble = disk_trouble(error, self.output_dir)
            if isinstance(error, FileExistsError):
                trouble = "another process wrote it meanwhile"
            if trouble is None:
                raise
            raise self._not_written(target, trouble) from error

    def _not_written(self, target: Path, why: str) -> CheckpointError:
        older = [self.path(step).name for step in self.steps() if (self.path(step) / MANIFEST_NAME).exists()]
        safe = f"{older[-1]} is untouched." if older else "No earlier checkpoint exists."
        return CheckpointError(f"{target}: not written, {why}. {safe}")

    def _retain(self, written: int, best_step: int | None) -> None:
        """Remove the oldest complete checkpoints beyond the limit. What is not complete is not ours to delete."""
        if self.save_total_limit is None:
            return
        complete = [step for step in self.steps() if sizes_agree(self.path(step))]
        # The one just written was read back and compared, so that at least one good one is left.
        kept = {*complete[-self.save_total_limit :], written, best_step}
        for step in complete:
            if step not in kept and (self.keep_every is None or step % self.keep_every):
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
        load_weights(folder, model, self.sharding)

    def add_optimizer(self, draft: Draft, model: nn.Module, optimizer: Optimizer) -> None:
        """See `optimizer_state.add_optimizer`."""
        add_optimizer(draft, optimizer, model)

    def load_optimizer(self, folder: Path, model: nn.Module, optimizer: Optimizer) -> None:
        """See `optimizer_state.load_optimizer`."""
        load_optimizer(folder, optimizer, model, sharding=self.sharding, allow_change=self.allow_change)

    def place_scheduler(self, scheduler: LambdaLR, step: int) -> None:
        """See `optimizer_state.place_scheduler`."""
        place_scheduler(scheduler, step)


def _free_name(path: Path) -> Path:
    number, candidate = 1, path
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate
