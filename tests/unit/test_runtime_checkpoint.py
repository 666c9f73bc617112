"""Checkpoint folders: atomic, checked, kept and removed by rule, whatever happens in between."""

from __future__ import annotations

import errno
import json
import logging
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

from eft.core.constants import MANIFEST_NAME
from eft.core.errors import CheckpointError
from eft.runtime.checkpoint import CheckpointStore, verify_manifest, write_manifest


def write(store: CheckpointStore, step: int, best: int | None = None, content: bytes = b"weights") -> bool:
    with store.write(step, best, {"fingerprint": f"f{step}"}) as folder:
        if folder is None:
            return False
        (folder / "weights").write_bytes(content + str(step).encode())
        (folder / "sub").mkdir()
        (folder / "sub" / "more").write_bytes(b"x" * step)
    return True


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "out", save_total_limit=None)


def test_a_written_checkpoint_has_a_manifest_that_agrees(store: CheckpointStore) -> None:
    write(store, 7)
    manifest = verify_manifest(store.path(7))
    assert (manifest["kind"], manifest["step"], manifest["fingerprint"]) == ("checkpoint", 7, "f7")
    assert set(manifest["files"]) == {"weights", "sub/more"}
    assert manifest["files"]["sub/more"]["bytes"] == 7
    assert store.newest_complete().path == store.path(7)
    assert names(store.output_dir) == {"checkpoint-7"}


def test_no_checkpoint(store: CheckpointStore) -> None:
    assert store.newest_complete().path is None
    store.output_dir.mkdir()
    (store.output_dir / "checkpoint-x").mkdir()
    (store.output_dir / "checkpoint-9").write_text("a file")
    assert store.newest_complete() == store.newest_complete()
    assert store.newest_complete().skipped == []


def damage_missing(folder: Path) -> None:
    (folder / "weights").unlink()


def damage_short(folder: Path) -> None:
    (folder / "weights").write_bytes(b"w")


def damage_flip(folder: Path) -> None:
    path = folder / "weights"
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)


def damage_no_manifest(folder: Path) -> None:
    (folder / MANIFEST_NAME).unlink()


def damage_half_manifest(folder: Path) -> None:
    path = folder / MANIFEST_NAME
    path.write_text(path.read_text()[:40])


def damage_other_json(folder: Path) -> None:
    (folder / MANIFEST_NAME).write_text("[1, 2]")


def damage_empty_list(folder: Path) -> None:
    (folder / MANIFEST_NAME).write_text(json.dumps({"format": 1, "files": {}}))


DAMAGES = {
    damage_missing: r"weights: missing, though the manifest lists it",
    damage_short: r"weights: has 1 bytes, the manifest says 9",
    damage_flip: r"weights: its content differs",
    damage_no_manifest: r"manifest.json: missing",
    damage_half_manifest: r"manifest.json: broken",
    damage_other_json: r"manifest.json: broken",
    damage_empty_list: r"manifest.json: format 1, 0 files",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_ones_are_passed_over_with_the_reason(store: CheckpointStore, damage) -> None:  # type: ignore[no-untyped-def]
    write(store, 3)
    write(store, 12)
    damage(store.path(12))
    with pytest.raises(CheckpointError, match=DAMAGES[damage]):
        verify_manifest(store.path(12))
    found = store.newest_complete()
    assert found.path == store.path(3)
    assert [path for path, _ in found.skipped] == [store.path(12)]


def test_an_existing_complete_one_is_kept(store: CheckpointStore, caplog: pytest.LogCaptureFixture) -> None:
    write(store, 4)
    with caplog.at_level(logging.INFO):
        assert not write(store, 4, content=b"other")
    assert "is there already and complete; kept" in caplog.text
    assert (store.path(4) / "weights").read_bytes() == b"weights4"


def test_a_complete_one_of_another_run_is_moved_aside_not_taken_for_ours(store: CheckpointStore) -> None:
    for plan in ("theirs", "ours"):
        with store.write(4, extra={"plan": plan}) as folder:
            assert folder is not None
            (folder / "weights").write_text(plan)
    assert (store.path(4) / "weights").read_text() == "ours"
    assert names(store.output_dir) == {"checkpoint-4", "checkpoint-4.aside"}


def test_an_incomplete_one_is_moved_aside(store: CheckpointStore, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        assert write(store, 4)
        damage_flip(store.path(4))
    assert "is not this run's" in caplog.text
    assert write(store, 4)
    verify_manifest(store.path(4))
    aside = {"checkpoint-4.aside", "checkpoint-4.aside-2", "checkpoint-4.aside-3"}
    assert names(store.output_dir) == {"checkpoint-4", *aside}
    assert store.steps() == [4]


def test_an_error_while_writing_leaves_nothing(store: CheckpointStore) -> None:
    write(store, 1)

    def fail() -> None:
        with store.write(2) as folder:
            assert folder is not None
            (folder / "half").write_bytes(b"h")
            raise KeyError("planted")

    with pytest.raises(KeyError, match="planted"):
        fail()
    assert names(store.output_dir) == {"checkpoint-1"}


@pytest.mark.parametrize(
    ("code", "words"), [(errno.ENOSPC, "the disk is full"), (errno.EDQUOT, "the quota is used up")]
)
def test_a_full_disk_says_so(store: CheckpointStore, code: int, words: str) -> None:
    write(store, 1)

    def fail() -> None:
        with store.write(2):
            raise OSError(code, "planted")

    with pytest.raises(CheckpointError, match=rf"checkpoint-2: not written, {words} \(.* MiB free\). checkpoint-1"):
        fail()
    assert names(store.output_dir) == {"checkpoint-1"}


def test_safetensors_error_of_a_full_disk_is_recognised(store: CheckpointStore) -> None:
    def fail() -> None:
        with store.write(2):
            # The text that safetensors 0.8 gives the system's error.
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with pytest.raises(CheckpointError, match=r"the disk is full \(.* MiB free\). No earlier checkpoint exists"):
        fail()
    assert names(store.output_dir) == set()


def test_a_folder_without_permission_says_so(store: CheckpointStore) -> None:
    def fail() -> None:
        with store.write(2):
            raise PermissionError(errno.EACCES, "Permission denied", "weights")

    with pytest.raises(CheckpointError, match=r"no permission: .*Permission denied: 'weights'"):
        fail()


def test_other_errors_keep_their_type(store: CheckpointStore) -> None:
    def fail() -> None:
        with store.write(2) as folder:
            assert folder is not None
            (folder / "missing" / "file").read_bytes()

    with pytest.raises(FileNotFoundError):
        fail()


def test_retention_keeps_newest_and_best(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, save_total_limit=2)
    for step in (10, 20, 30, 40):
        write(store, step, best=10)
    assert names(tmp_path) == {"checkpoint-10", "checkpoint-30", "checkpoint-40"}
    write(store, 50, best=50)
    assert names(tmp_path) == {"checkpoint-40", "checkpoint-50"}


def test_retention_never_removes_what_was_just_written(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, save_total_limit=1)
    write(store, 50)
    write(store, 10)  # resumed from an older one
    assert names(tmp_path) == {"checkpoint-10", "checkpoint-50"}


def test_retention_neither_counts_nor_removes_incomplete_ones(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, save_total_limit=1)
    for step in (1, 2, 3):
        write(CheckpointStore(tmp_path, save_total_limit=None), step)
    damage_no_manifest(store.path(1))
    damage_short(store.path(3))
    write(store, 4)
    assert names(tmp_path) == {"checkpoint-1", "checkpoint-3", "checkpoint-4"}


@settings(max_examples=15, deadline=None)
@given(
    limit=st.integers(1, 4),
    writes=st.lists(st.tuples(st.integers(1, 30), st.booleans()), min_size=1, max_size=8),
)
def test_retention_property(
    limit: int, writes: list[tuple[int, bool]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("retention")
    store, best, written = CheckpointStore(folder, save_total_limit=limit), None, set()
    for step, is_best in writes:
        best = step if is_best else best
        with store.write(step, best) as target:
            if target is not None:
                (target / "f").write_bytes(b"1")
        written.add(step)
        present = set(store.steps())
        assert step in present
        assert best is None or best in present
        assert len(present) <= limit + 2
        assert max(written) in present
    shutil.rmtree(folder)


def _write_and_hang(folder: Path, moment: str) -> None:
    store = CheckpointStore(folder, save_total_limit=1)
    with store.write(2) as target:
        assert target is not None
        (target / "weights").write_bytes(b"w" * 1000)
        if moment == "inside":
            (folder / "ready").touch()
            time.sleep(60)


def test_kill_9_while_writing_leaves_the_older_one(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, save_total_limit=1)
    write(store, 1)
    process = multiprocessing.get_context("fork").Process(target=_write_and_hang, args=(tmp_path, "inside"))
    process.start()
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert store.newest_complete().path == store.path(1)
    assert store.newest_complete().skipped == []
    assert len(store.remove_leftovers()) == 1
    assert names(tmp_path) == {"checkpoint-1", "ready"}


def test_manifest_of_an_export(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    write_manifest(tmp_path, kind="export", extra={"verified": True})
    write_manifest(tmp_path, kind="export")  # its own file is not part of it
    assert set(verify_manifest(tmp_path)["files"]) == {"config.json"}
