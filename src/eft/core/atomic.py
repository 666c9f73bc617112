"""Files and folders that are either wholly there or not there at all, also after a power loss.

The pattern is write to a temporary name, fsync the data, rename, fsync the parent folder. A reader never sees half a
file; after a crash the old content or the new content is there.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TEMPORARY_MARK = ".tmp-"
"""Start of the name of every unfinished file or folder; whatever carries it may be deleted by the next run."""


def fsync_path(path: Path) -> None:
    """Flush a file's data, or a folder's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` by `data` in one durable step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{TEMPORARY_MARK}{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    fsync_path(path.parent)


def write_text(path: Path, text: str) -> None:
    """Replace `path` by UTF-8 `text` in one durable step."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by `value` as indented JSON in one durable step."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def append_line(path: Path, line: str) -> None:
    """Append one line with a single write, so that a killed process leaves at most one broken last line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Build a folder under a temporary name beside `target`; on success fsync all of it and rename it to `target`.

    On any error the temporary folder is removed and `target` is untouched. Raises FileExistsError when `target`
    already exists: the caller decides whether to keep it or to move it aside.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{TEMPORARY_MARK}{target.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        fsync_tree(temporary)
        if target.exists():
            raise FileExistsError(target)
        temporary.replace(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_path(target.parent)


def commit_folder(folder: Path, target: Path) -> None:
    """Make a finished folder durable and rename it to `target`; one that is there already is kept instead."""
    fsync_tree(folder)
    try:
        folder.rename(target)
    except OSError:
        if not target.is_dir():
            raise
        shutil.rmtree(folder)
    fsync_path(target.parent)


def fsync_tree(folder: Path) -> None:
    """fsync every file and folder below `folder`, then `folder` itself."""
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            fsync_path(Path(root, name))
        fsync_path(Path(root))


def remove_leftovers(folder: Path) -> list[Path]:
    """Delete what earlier, killed processes left unfinished in `folder`; returns what was deleted."""
    leftovers = sorted(folder.glob(f"{TEMPORARY_MARK}*")) if folder.is_dir() else []
    for path in leftovers:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return leftovers
