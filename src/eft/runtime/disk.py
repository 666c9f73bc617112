"""Errors of a disk in words: full, over quota, read-only; also where a library tells them only as text."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from eft.core.errors import EftError, OutputError

_WORDS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota is used up",
    errno.EFBIG: "a file became too large",
    errno.EROFS: "the disk is read-only",
    errno.EACCES: "no permission",
    errno.EPERM: "no permission",
    errno.EIO: "the disk reports an error",
}
MIB = 2**20


def disk_trouble(error: BaseException, folder: Path) -> str | None:
    """What is wrong with the disk of `folder`, where `error` says that something is."""
    code = error.errno if isinstance(error, OSError) else None
    if code not in _WORDS:
        # Libraries in Rust report the system's error as text.
        code = next((number for number in _WORDS if f"(os error {number})" in str(error)), None)
    if code is None:
        return None
    words = _WORDS[code]
    if code in (errno.ENOSPC, errno.EDQUOT):
        return f"{words} ({shutil.disk_usage(folder).free / MIB:,.1f} MiB free)"
    return words if code != errno.EACCES else f"{words}: {error}"


def lack_of_room(folder: Path, num_bytes: int) -> str | None:
    """Why `num_bytes` do not fit on the disk of `folder`; None where they do. A quota shows only when it is hit."""
    free = shutil.disk_usage(folder).free
    if num_bytes <= free:
        return None
    return f"the disk is full: it takes {num_bytes / MIB:,.1f} MiB, and {free / MIB:,.1f} MiB are free"


@contextmanager
def clear_disk_errors(folder: Path) -> Iterator[None]:
    """Inside, trouble with the disk becomes one message.

    Raises:
        OutputError: for what `disk_trouble` knows; anything else stays as it is.
    """
    try:
        yield
    except EftError:
        raise
    except Exception as error:
        trouble = disk_trouble(error, folder)
        if trouble is None:
            raise
        raise OutputError(
            f"{folder}: cannot be written, {trouble}. What is complete in it stays so; mend that, and start the same "
            "command again to continue."
        ) from error
