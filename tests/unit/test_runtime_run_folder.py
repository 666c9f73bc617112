"""An output folder is one run's: what is deleted, what is refused, who may be in it (D15)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from eft.config.identity import differences
from eft.core.errors import CheckpointError, ConfigError
from eft.runtime import run_folder
from eft.runtime.run_folder import FolderRequest, check_run_folder, claim_run_folder


def request(path: Path, *, overwrite: bool = False, **more: Any) -> FolderRequest:
    return FolderRequest(path, {"seed": 1}, overwrite, differences, **more)


def finished(path: Path) -> Path:
    folder = claim_run_folder(request(path))
    folder.mark("finished")
    folder.release()
    (path / "model.safetensors").write_text("weights")
    return path


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"status": "done", "identity": {}}', '{"status": "finished"}'])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_record_that_is_not_ours_protects_the_folder(text: str, overwrite: bool, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(text)
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match=r"run\.json is broken or not eft's"):
        claim_run_folder(request(tmp_path, overwrite=overwrite))
    assert (tmp_path / "thesis.tex").exists()
    assert (tmp_path / "run.json").read_text() == text


@pytest.mark.parametrize("inside", [".", "checkpoint-4", "model.safetensors", "../link/model.safetensors"])
def test_what_the_run_reads_is_not_deleted(inside: str, tmp_path: Path) -> None:
    out = finished(tmp_path / "out")
    (tmp_path / "link").symlink_to(out)
    with pytest.raises(ConfigError, match="base_model .*lies in output_dir"):
        claim_run_folder(request(out, overwrite=True, inputs={"base_model": out / inside}))
    with pytest.raises(ConfigError, match="base_model .*lies in output_dir"):
        claim_run_folder(request(tmp_path / "link", overwrite=True, inputs={"base_model": out / inside}))
    assert (out / "model.safetensors").exists()


def test_a_run_without_a_checkpoint_is_no_licence_either(tmp_path: Path) -> None:
    claim_run_folder(request(tmp_path)).release()
    with pytest.raises(ConfigError, match="lies in output_dir"):
        check_run_folder(request(tmp_path, inputs={"datasets.0.path": tmp_path / "rows.jsonl"}))


def test_prepared_data_may_lie_in_the_folder(tmp_path: Path) -> None:
    """Neither foreign at the first start nor deleted at the next."""
    cache = tmp_path / "prepared" / "stores"
    cache.mkdir(parents=True)
    claim_run_folder(request(tmp_path, cache=cache)).release()
    (tmp_path / "plan.json").write_text("{}")
    claim_run_folder(request(tmp_path, cache=cache, overwrite=True)).release()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prepared", "run.json"]
    assert cache.is_dir()


def test_a_link_to_a_folder_is_that_folder(tmp_path: Path) -> None:
    out = finished(tmp_path / "out")
    (tmp_path / "link").symlink_to(out)
    with pytest.raises(CheckpointError, match="finished run"):
        claim_run_folder(request(tmp_path / "link"))
    claim_run_folder(request(tmp_path / "link", overwrite=True)).release()
    assert [path.name for path in out.iterdir()] == ["run.json"]
    assert json.loads((out / "run.json").read_text())["status"] == "running"


def test_a_second_process_is_kept_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And deletes nothing of the first one's, also what looks like a leftover."""
    monkeypatch.setattr(run_folder, "WAIT_S", 0.0)
    program = (
        "import fcntl, os, sys, time; fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX);"
        "print('locked', flush=True); time.sleep(60)"
    )
    claim_run_folder(request(tmp_path)).release()
    (tmp_path / ".tmp-checkpoint-1.7").mkdir()
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(CheckpointError, match="another process is training in it"):
            claim_run_folder(request(tmp_path, overwrite=True))
        assert (tmp_path / ".tmp-checkpoint-1.7").exists()
        other.kill()
    claim_run_folder(request(tmp_path, overwrite=True)).release()
    assert not (tmp_path / ".tmp-checkpoint-1.7").exists()
