"""What the processes beside the first one write of a checkpoint, and how it comes into its folder.

Each writes a folder of its own, under a temporary name that the step and the rank decide; it appears by a rename once
it is on the disk. The first process waits for these folders and moves the files. So no process talks to another while
the training does, and whatever is left behind by a kill looks like any other unfinished folder.
"""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path
from typing import Any

from eft.core.atomic import TEMPORARY_MARK, new_folder, write_text
from eft.core.constants import MANIFEST_NAME
from eft.core.errors import CheckpointError
from eft.runtime.draft import Draft
from eft.runtime.manifest import read_manifest, write_manifest

WAIT_S = 3600.0
"""For another process's share, at most."""
ENDING_S = 5.0
"""The same once an error has ended the run: the other may have been lost."""
_LOOK_EVERY_S = 0.02


def share_path(checkpoint: Path, rank: int) -> Path:
    """The finished share of `rank`."""
    return checkpoint.with_name(f"{TEMPORARY_MARK}share-{rank}-of-{checkpoint.name}")


def _failure_path(checkpoint: Path, rank: int) -> Path:
    return checkpoint.with_name(f"{TEMPORARY_MARK}share-{rank}-of-{checkpoint.name}.failed")


def write_share(checkpoint: Path, rank: int, draft: Draft) -> None:
    """Write the files of `rank`'s draft; a failure is also left as a file, so that the first process stops waiting."""
    target = share_path(checkpoint, rank)
    shutil.rmtree(target, ignore_errors=True)  # of a save that failed elsewhere
    try:
        with new_folder(target) as folder:
            draft.write(folder)
            write_manifest(folder, kind="share", extra={"rank": rank})
    except BaseException as error:
        write_text(_failure_path(checkpoint, rank), f"{type(error).__name__}: {error}")
        raise


def collect_shares(
    checkpoint: Path, world_size: int, folder: Path | None, run_failed: threading.Event
) -> dict[str, Any]:
    """Move the shares of all other ranks into `folder` as they are done; returns their manifest entries.

    None: wait for them and throw them away. `run_failed`: from then on they are waited for but a moment.

    Raises:
        CheckpointError: a share failed, or did not come.
    """
    known: dict[str, Any] = {}
    for rank in range(1, world_size):
        share = _wait_for(checkpoint, rank, run_failed)
        if folder is not None:
            files = read_manifest(share)["files"]
            for name in files:
                (share / name).replace(folder / name)
            known.update(files)
        (share / MANIFEST_NAME).unlink()
        shutil.rmtree(share, ignore_errors=True)
    return known


def _wait_for(checkpoint: Path, rank: int, run_failed: threading.Event) -> Path:
    share, failure = share_path(checkpoint, rank), _failure_path(checkpoint, rank)
    end = time.monotonic() + WAIT_S
    while not share.is_dir():
        if failure.is_file():
            reason = failure.read_text()
            failure.unlink(missing_ok=True)
            raise CheckpointError(f"{checkpoint}: not written, process {rank} failed: {reason}")
        if run_failed.is_set():
            end = min(end, time.monotonic() + ENDING_S)
        if time.monotonic() > end:
            raise CheckpointError(f"{checkpoint}: not written, nothing came from process {rank}")
        time.sleep(_LOOK_EVERY_S)
    return share
