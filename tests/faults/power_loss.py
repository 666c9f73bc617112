"""What a disk may hold after the power fails: only what was flushed is sure, everything else may be there or not.

A killed process leaves the page cache behind, so it cannot show a missing fsync. Here every fsync, rename and removal
in a folder is recorded with the tree as it was at that moment. From that the states are built that a file system may
bring back: of each folder the entries as of its last fsync or as they were; of each file the data as of its last fsync,
as they were, or torn in the middle.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

Identity = tuple[int, int]
"""Inode number, and how often that number was given out before."""

RECORDED = ("fsync", "replace", "rename", "unlink", "rmdir", "mkdir")


@dataclass
class Disk:
    """A folder tree by identity: entries of folders, bytes of files."""

    folders: dict[Identity, dict[str, Identity]] = field(default_factory=dict)
    files: dict[Identity, bytes] = field(default_factory=dict)


@dataclass
class Moment:
    """The power fails right before `event`."""

    event: str
    finished: int
    """Saves that the program had been told were complete."""
    now: Disk
    flushed: Disk


@dataclass
class Recorder:
    """Watches `root` while a program runs in this process."""

    root: Path
    moments: list[Moment] = field(default_factory=list)
    finished: int = 0
    _flushed: Disk = field(default_factory=Disk)
    _births: dict[int, int] = field(default_factory=dict)
    _alive: set[int] = field(default_factory=set)

    def _identity(self, path: Path) -> Identity:
        number = path.stat().st_ino
        return number, self._births.get(number, 0)

    def _look(self) -> Disk:
        """The tree as a process sees it."""
        folders, files, seen = [], [], set()
        for parent, _, names in os.walk(self.root):
            folders.append(Path(parent))
            files += [Path(parent, name) for name in names]
        for path in [*folders, *files]:
            number = path.stat().st_ino
            seen.add(number)
            if number not in self._alive:
                self._births[number] = self._births.get(number, -1) + 1
        self._alive = seen
        disk = Disk()
        for path in folders:
            disk.folders[self._identity(path)] = {child.name: self._identity(child) for child in path.iterdir()}
        for path in files:
            disk.files[self._identity(path)] = path.read_bytes()
        return disk

    def before(self, event: str) -> None:
        """Note the states that a power failure at this point may leave."""
        flushed = Disk(dict(self._flushed.folders), dict(self._flushed.files))
        self.moments.append(Moment(event, self.finished, self._look(), flushed))

    def flush(self, descriptor: int) -> None:
        """An fsync of this descriptor is over."""
        number, disk = os.fstat(descriptor).st_ino, self._look()
        identity = (number, self._births.get(number, 0))
        if identity in disk.files:
            self._flushed.files[identity] = disk.files[identity]
        elif identity in disk.folders:
            self._flushed.folders[identity] = disk.folders[identity]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, the recorded calls of this process are seen."""
        with ExitStack() as stack:
            for name in RECORDED:
                stack.enter_context(mock.patch.object(os, name, self._recorded(name, getattr(os, name))))
            yield

    def _recorded(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def recorded(*arguments: Any, **keywords: Any) -> Any:
            self.before(f"{name} {' '.join(str(argument) for argument in arguments)}")
            result = call(*arguments, **keywords)
            if name == "fsync":
                self.flush(arguments[0])
            return result

        return recorded


def states_after(moment: Moment, root: Identity, draws: random.Random, mixtures: int) -> Iterator[tuple[str, Disk]]:
    """Named disks that may be there when the power comes back; the four pure ones, then `mixtures` random ones."""
    now, flushed = moment.now, moment.flushed

    def mix(folder_is_new: Callable[[], bool], file_state: Callable[[], str]) -> Disk:
        disk = Disk()
        for identity in {**now.folders, **flushed.folders}:
            old, new = flushed.folders.get(identity, {}), now.folders.get(identity)
            # A folder that was never flushed itself may come back empty under its name.
            disk.folders[identity] = new if new is not None and folder_is_new() else old
        for identity in {**now.files, **flushed.files}:
            old_data, new_data = flushed.files.get(identity, b""), now.files.get(identity)
            state = file_state() if new_data is not None else "old"
            assert new_data is not None or state == "old"
            data = {"old": old_data, "new": new_data or b"", "torn": (new_data or b"")[: len(new_data or b"") // 2]}
            # What is flushed and unchanged cannot tear.
            disk.files[identity] = old_data if new_data == old_data else data[state]
        return disk

    yield "nothing that was not flushed", mix(lambda: False, lambda: "old")
    yield "everything", mix(lambda: True, lambda: "new")
    yield "names without their data", mix(lambda: True, lambda: "old")
    yield "names with torn data", mix(lambda: True, lambda: "torn")
    for number in range(mixtures):
        yield (
            f"mixture {number}",
            mix(lambda: draws.random() < 0.5, lambda: draws.choice(["old", "new", "torn"])),
        )


def write_out(disk: Disk, identity: Identity, target: Path) -> None:
    """Make the tree below folder `identity` at `target`."""
    target.mkdir(parents=True)
    for name, child in disk.folders.get(identity, {}).items():
        if child in disk.folders:
            write_out(disk, child, target / name)
        elif child in disk.files:
            (target / name).write_bytes(disk.files[child])
