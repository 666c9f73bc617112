"""Saving beside the training: the state of the moment it was taken at, one save at a time, no failure lost."""

from __future__ import annotations

import errno
import json
import threading
from pathlib import Path

import pytest
import torch

from eft.core.errors import CheckpointError
from eft.runtime.background import BackgroundJob
from eft.runtime.checkpoint import CheckpointStore, verify_manifest
from eft.runtime.draft import Draft, TensorCopies
from eft.runtime.tensors import read_tensors


def test_a_draft_with_copies_holds_what_was_there_when_it_was_filled(tmp_path: Path) -> None:
    weight, steps = torch.arange(6.0).reshape(2, 3).t(), {"step": 1}
    draft = Draft(TensorCopies())
    draft.add_tensors("a.safetensors", {"w": weight, "scalar": torch.tensor(3, dtype=torch.int64)})
    draft.add_json("a.json", steps)
    draft.add_files(lambda folder: (folder / "other").write_text("x"))
    draft.finish()
    expected = weight.clone()
    weight.fill_(-1)
    steps["step"] = 2
    draft.write(tmp_path)
    stored = read_tensors(tmp_path / "a.safetensors")
    assert torch.equal(stored["w"], expected)
    assert stored["scalar"].item() == 3
    assert json.loads((tmp_path / "a.json").read_text()) == {"step": 1}
    assert (tmp_path / "other").read_text() == "x"


def test_the_memory_of_copies_is_used_again_unless_the_tensor_changed() -> None:
    copies = TensorCopies()
    first = copies.take("f", {"w": torch.zeros(3), "v": torch.zeros(3)}.items())
    second = copies.take("f", {"w": torch.ones(3), "v": torch.ones(3, dtype=torch.bfloat16)}.items())
    assert first["w"].data_ptr() == second["w"].data_ptr()
    assert first["v"].data_ptr() != second["v"].data_ptr()
    assert second["w"].tolist() == [1, 1, 1]
    assert second["v"].dtype == torch.bfloat16


def test_tensors_that_share_memory_are_each_copied() -> None:
    shared = torch.arange(4.0)
    taken = TensorCopies().take("f", {"a": shared, "b": shared[:2]}.items())
    shared.zero_()
    assert taken["a"].tolist() == [0, 1, 2, 3]
    assert taken["b"].tolist() == [0, 1]


def test_a_save_goes_on_while_the_caller_does_and_the_next_one_waits(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, save_total_limit=None, asynchronous=True)
    go, value = threading.Event(), torch.zeros(2)

    def fill(draft: Draft) -> None:
        draft.add_tensors("w.safetensors", {"w": value})
        draft.add_files(lambda folder: go.wait(30))

    store.save(1, None, {}, keep=False, fill=fill)
    value += 1
    assert store.steps() == [], "the folder has its name only when it is complete"
    go.set()
    store.save(2, None, {}, keep=False, fill=fill)
    assert store.steps()[0] == 1
    store.wait()
    assert [read_tensors(store.path(step) / "w.safetensors")["w"].tolist() for step in (1, 2)] == [[0, 0], [1, 1]]
    assert all(verify_manifest(store.path(step)) for step in (1, 2))
    assert [times.step for times in store.times] == [1, 2]
    assert all(times.blocked_s <= times.write_s for times in store.times)


def test_a_failed_save_is_raised_once_by_whoever_asks_next(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, save_total_limit=None, asynchronous=True)

    def refuse(folder: Path) -> None:
        raise PermissionError(errno.EACCES, "refused")

    store.save(1, None, {}, keep=False, fill=lambda draft: draft.add_files(refuse))
    with pytest.raises(CheckpointError, match="checkpoint-1: not written, no permission"):
        store.wait()
    store.wait()
    store.save(2, None, {}, keep=False, fill=lambda draft: draft.add_files(refuse))
    with pytest.raises(CheckpointError, match="checkpoint-2"):
        store.save(3, None, {}, keep=False, fill=lambda draft: None)
    assert list(tmp_path.iterdir()) == []


def test_a_job_that_still_runs_has_not_failed() -> None:
    job, go = BackgroundJob(), threading.Event()

    def fail() -> None:
        go.wait(30)
        raise ValueError("late")

    job.start(fail)
    job.raise_failure()
    go.set()
    with pytest.raises(ValueError, match="late"):
        job.wait()
