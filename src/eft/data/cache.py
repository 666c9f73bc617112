"""Where prepared stores lie, who may write them, and why one was not reused."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from eft.config.data import DataConfig
from eft.core.atomic import TEMPORARY_MARK
from eft.core.errors import DataError
from eft.core.hashing import hash_json
from eft.data.store import META_FILE, TokenStore, open_store

StoreKey = Mapping[str, Any]
"""Everything that decides the ids, labels and weights of a store, flat and JSON-able."""

_NAME_CHARACTERS = 32
_VALUE_CHARACTERS = 40
_LEFTOVER = re.compile(re.escape(TEMPORARY_MARK) + rf"(?P<name>[0-9a-f]{{{_NAME_CHARACTERS}}})\.\d+")


def prepared_location(cfg: DataConfig) -> Path:
    """The folder of all prepared stores: `dataset_prepared_path`, else `$EFT_CACHE`, else `~/.cache/eft`."""
    chosen = cfg.dataset_prepared_path or os.environ.get("EFT_CACHE") or "~/.cache/eft"
    return Path(chosen).expanduser()


def store_folder(location: Path, key: StoreKey) -> Path:
    """The folder of the store with this key."""
    return location / hash_json(key)[:_NAME_CHARACTERS]


def reusable(folder: Path) -> TokenStore | None:
    """The whole store in `folder`, or None when there is none or its files were damaged."""
    try:
        return open_store(folder)
    except DataError:
        return None


def create_location(location: Path) -> None:
    """Make the folder of all stores. Raises DataError when nothing can be written there."""
    try:
        location.mkdir(parents=True, exist_ok=True)
        if not os.access(location, os.W_OK | os.X_OK):
            raise PermissionError(f"no permission to write in {location}")
    except OSError as error:
        raise DataError(
            f"{location}: prepared data cannot be written there ({error}); set dataset_prepared_path (or $EFT_CACHE) "
            "to a folder that you may write to"
        ) from error


@contextmanager
def exclusive(folder: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Let one process at a time build `folder`; the others wait, and then find it built.

    The lock ends with its process, however that ends. On a file system without locks the work may be done twice; the
    rename of a whole folder still keeps it right.
    """
    with _lock_path(folder.parent, folder.name).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
        yield


def remove_abandoned(location: Path) -> None:
    """Delete half-built stores whose builder is gone: nobody holds the lock any more."""
    for leftover in location.glob(f"{TEMPORARY_MARK}*"):
        match = _LEFTOVER.fullmatch(leftover.name)
        if match is None:
            continue
        with _lock_path(location, match["name"]).open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                continue
            shutil.rmtree(leftover, ignore_errors=True)


def _lock_path(location: Path, name: str) -> Path:
    return location / f".lock-{name}"


def discard_damaged(folder: Path) -> bool:
    """Delete a store whose files were changed from outside; whether there was one. Call it under the lock."""
    if not folder.exists():
        return False
    shutil.rmtree(folder)
    return True


def why_not_reused(location: Path, name: str, key: StoreKey) -> str:
    """How the most similar store of the data set `name` differs from `key`, in words."""
    best: dict[str, Any] | None = None
    for path in sorted(location.glob(f"*/{META_FILE}")):
        try:
            meta = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # another store's damage is its own next user's business
        found = meta.get("key")
        if found is None or meta["name"] != name:
            continue
        if best is None or len(_differences(found, key)) < len(_differences(best, key)):
            best = found
    if best is None:
        return "no store of it yet"
    return ", ".join(_differences(best, key))


def _differences(old: StoreKey, new: StoreKey) -> list[str]:
    changes = []
    for part in sorted({*old, *new}):
        before, after = (json.dumps(key.get(part), ensure_ascii=False, sort_keys=True) for key in (old, new))
        if before != after:
            short = max(len(before), len(after)) <= _VALUE_CHARACTERS
            changes.append(f"{part} {before} → {after}" if short else f"{part} changed")
    return changes
