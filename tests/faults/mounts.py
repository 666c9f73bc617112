"""A small disk of its own for one piece of work: a tmpfs in private mount name spaces, without anybody's permission."""

from __future__ import annotations

import ctypes
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

_NEWNS, _NEWUSER = 0x20000, 0x10000000
_RDONLY, _REMOUNT, _PRIVATE, _REC = 1, 32, 1 << 18, 16384
_LIBC = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: Any) -> None:
    if getattr(_LIBC, name)(*arguments):
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")


def _enter() -> None:
    """Mounts of this process and its children are their own from here on."""
    user, group = os.getuid(), os.getgid()
    try:
        _call("unshare", _NEWNS)
    except PermissionError:
        _call("unshare", _NEWNS | _NEWUSER)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    _call("mount", b"none", b"/", None, _REC | _PRIVATE, None)


def mount(folder: Path, kib: int) -> None:
    """An empty disk of `kib` KiB at `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    _call("mount", b"tmpfs", os.fsencode(folder), b"tmpfs", 0, f"size={kib}k".encode())


def remount(folder: Path, kib: int, *, read_only: bool = False) -> None:
    """Another size, or no writing; waits for a moment at which no file is open for writing."""
    flags = _REMOUNT | (_RDONLY if read_only else 0)
    for attempt in range(2000):
        try:
            _call("mount", b"tmpfs", os.fsencode(folder), b"tmpfs", flags, f"size={kib}k".encode())
        except OSError:
            if attempt == 1999:
                raise
            time.sleep(0.001)
        else:
            return


def in_own_mounts(work: Callable[[], Any]) -> Any:
    """What `work` gives in a forked process that may mount; raises what it raises.

    Raises:
        OSError: this system allows nobody to mount.
    """
    reader, writer = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            try:
                _enter()
                answer = (True, work())
            except Exception as error:
                traceback.print_exc()
                answer = (False, error)
            with os.fdopen(writer, "wb") as pipe:
                pickle.dump(answer, pipe)
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        data = pipe.read()
    os.waitpid(child, 0)
    done, answer = pickle.loads(data)
    if not done:
        raise answer
    return answer


def can_mount(folder: Path) -> bool:
    """Whether this system lets us."""
    try:
        in_own_mounts(lambda: mount(folder, 64))
    except OSError:
        return False
    return True
