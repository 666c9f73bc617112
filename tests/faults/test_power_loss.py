"""The power fails before every fsync, rename and removal of three saves and their retention: nothing done is lost."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch

from eft.core import atomic
from eft.core.errors import CheckpointError
from eft.runtime.checkpoint import CheckpointStore, verify_manifest
from eft.runtime.draft import Draft
from eft.runtime.tensors import read_tensors
from tests.faults.power_loss import Recorder, states_after, write_out

SAVES = 3


def save(store: CheckpointStore, step: int) -> None:
    def fill(draft: Draft) -> None:
        draft.add_tensors("model.safetensors", {"w": torch.full((64,), float(step))})
        draft.add_json("progress.json", {"step": step})
        draft.add_files(lambda folder: (folder / "tokenizer.json").write_text(f"{step}" * 50))

    store.save(step, None, {"plan": "p"}, keep=False, fill=fill)
    store.wait()


def record(folder: Path, *, limit: int, asynchronous: bool) -> Recorder:
    """Three saves, watched."""
    folder.mkdir()
    recorder = Recorder(folder)
    store = CheckpointStore(folder, save_total_limit=limit, asynchronous=asynchronous)
    with recorder.watching():
        for step in range(1, SAVES + 1):
            save(store, step)
            recorder.finished = step
        recorder.before("the end")
    return recorder


def newest_step(folder: Path) -> int:
    """The step that a new run would continue from, after the check that the checkpoint holds that step's state."""
    found = CheckpointStore(folder, save_total_limit=None).newest_complete()
    if found.path is None:
        return 0
    step = int(verify_manifest(found.path)["step"])
    assert read_tensors(found.path / "model.safetensors")["w"].tolist() == [step] * 64
    return step


def losses(recorder: Recorder, folder: Path, mixtures: int = 6) -> tuple[list[str], int]:
    """Power failures after which a finished save is gone, in words, and how many failures were tried."""
    draws, lost, tried = random.Random(7), [], 0
    root = recorder._identity(recorder.root)
    for number, moment in enumerate(recorder.moments):
        for name, disk in states_after(moment, root, draws, mixtures):
            write_out(disk, root, folder)
            tried += 1
            if newest_step(folder) < moment.finished:
                lost.append(f"{number} before {moment.event}: {name}")
            shutil.rmtree(folder)
    return lost, tried


@pytest.mark.parametrize("limit", [1, 2])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_no_finished_checkpoint_is_lost(tmp_path: Path, limit: int, asynchronous: bool) -> None:
    recorder = record(tmp_path / "out", limit=limit, asynchronous=asynchronous)
    assert len(recorder.moments) > 60
    renames = sum(moment.event.startswith("rename") for moment in recorder.moments)
    assert renames >= SAVES - limit, "retention is watched"
    lost, tried = losses(recorder, tmp_path / "after")
    assert lost == []
    assert tried > 600


def test_a_new_run_cleans_up_and_saves_after_any_of_them(tmp_path: Path) -> None:
    recorder = record(tmp_path / "out", limit=1, asynchronous=False)
    root, draws = recorder._identity(recorder.root), random.Random(3)
    for moment in recorder.moments[::7]:
        for _, disk in states_after(moment, root, draws, 1):
            folder = tmp_path / "after"
            write_out(disk, root, folder)
            store = CheckpointStore(folder, save_total_limit=1)
            store.remove_leftovers()
            save(store, 9)
            assert newest_step(folder) == 9
            assert not list(folder.glob(".tmp-*"))
            shutil.rmtree(folder)


@pytest.mark.parametrize("flush", ["fsync_tree", "fsync_path"])
def test_a_missing_flush_is_found(tmp_path: Path, flush: str) -> None:
    """Without the flush of the files, and without that of the folder after the rename, checkpoints are lost."""
    patched = "eft.runtime.checkpoint.fsync_path" if flush == "fsync_path" else "eft.core.atomic.fsync_tree"
    with mock.patch(patched), mock.patch.object(atomic, flush):
        recorder = record(tmp_path / "out", limit=1, asynchronous=False)
    lost, _ = losses(recorder, tmp_path / "after")
    assert lost


def test_a_save_that_only_looks_complete_is_refused(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, save_total_limit=None)
    save(store, 1)
    path = store.path(1) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="has .* bytes"):
        verify_manifest(store.path(1))
