"""Resuming with other settings: refused with the list of differences, or continued with them by `--allow-change`."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from eft import run
from eft.core.errors import CheckpointError
from eft.runtime.checkpoint import CheckpointStore, verify_manifest, write_manifest
from eft.trainer.trainer import EftTrainer
from tests.functional.conftest import MakeConfig, MakeTrainer
from tests.functional.reference import token_rows
from tests.functional.test_resume_edges import Signal

KEYS = {"max_steps": 6, "save_steps": 2, "optimizer": "adamw_torch_fused", "weight_decay": 0.0}


@pytest.fixture
def interrupted(make_config: MakeConfig, tmp_path: Path) -> Path:
    """A run of six steps that was stopped after four."""
    out = tmp_path / "out"
    run.train(make_config(**KEYS))
    shutil.rmtree(out / "checkpoint-6")
    record = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps({**record, "status": "interrupted"}))
    return out


def rates(out: Path) -> list[float]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row["learning_rate"] for row in rows if "loss" in row]


CHANGED = {"learning_rate": 2e-3, "weight_decay": 0.1, "max_steps": 8}


def test_the_differences_are_listed_and_the_way_out_is_named(make_config: MakeConfig, interrupted: Path) -> None:
    with pytest.raises(CheckpointError) as error:
        run.train(make_config(**{**KEYS, **CHANGED}))
    for text in ("learning_rate: 0.01 → 0.002", "weight_decay: 0.0 → 0.1", "max_steps: 6 → 8", "--allow-change"):
        assert text in str(error.value)
    assert (interrupted / "checkpoint-4").is_dir()


def test_the_run_goes_on_with_its_own_settings(make_config: MakeConfig, interrupted: Path) -> None:
    before = rates(interrupted)[:4]
    console = Console(record=True, width=200)
    _, _, trainer = run.train(make_config(**{**KEYS, **CHANGED}), allow_change=True, console=console)
    assert trainer.state.global_step == 8
    text = console.export_text()
    assert "from checkpoint-4, with other settings from here on:" in text
    assert "learning_rate: 0.01 → 0.002" in text
    assert rates(interrupted)[:4] == before
    # A cosine over the eight steps that are run now, of the rate that is set now, at the step that was reached.
    expected = [2e-3 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / 8)).item()) for step in range(4, 8)]
    assert rates(interrupted)[4:] == pytest.approx(expected, rel=1e-5)
    assert trainer.plain_optimizer().param_groups[0]["weight_decay"] == 0.1
    steps = {float(state["step"]) for state in trainer.plain_optimizer().state.values()}
    assert steps == {8.0}, "the moments were kept"
    assert json.loads((interrupted / "run.json").read_text())["identity"]["learning_rate"] == 2e-3


def test_an_equal_config_needs_no_permission_and_gets_the_same_bits(make_config: MakeConfig, interrupted: Path) -> None:
    copy = interrupted.with_name("copy")
    shutil.copytree(interrupted, copy)
    run.train(make_config(**KEYS))
    run.train(make_config(**KEYS, output_dir=str(copy)), allow_change=True)
    for name in ("model.safetensors", "optimizer.safetensors", "scheduler.json"):
        one, other = (folder / "checkpoint-6" / name for folder in (interrupted, copy))
        assert one.read_bytes() == other.read_bytes(), name


def test_other_data_are_refused_even_so(make_config: MakeConfig, interrupted: Path) -> None:
    """Another plan would repeat and omit samples, which no permission makes right."""
    with pytest.raises(CheckpointError, match="another plan"):
        run.train(make_config(**{**KEYS, "sequence_len": 48}), allow_change=True)


def test_a_named_checkpoint_of_other_settings(
    make_config: MakeConfig, interrupted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keys = {**KEYS, "weight_decay": 0.1, "resume_from_checkpoint": str(interrupted / "checkpoint-2")}
    new = make_config(**keys, output_dir=str(tmp_path / "new"))
    with pytest.raises(CheckpointError, match=r"weight_decay: 0\.0 → 0\.1[\s\S]*--allow-change"):
        run.train(new)
    with caplog.at_level(logging.WARNING):
        _, _, trainer = run.train(new, allow_change=True)
    assert trainer.state.global_step == 6
    assert "is continued with other settings: weight_decay: 0.0 → 0.1" in caplog.text


# ---- what is missing is named ----------------------------------------------------------------------------------------


def without(folder: Path, name: str) -> Path:
    """A copy of a checkpoint that was never given the file `name`: its manifest agrees with the rest."""
    copy = folder.with_name("copy") / folder.name
    shutil.copytree(folder, copy)
    (copy / name).unlink()
    manifest = json.loads((copy / "manifest.json").read_text())
    extra = {key: value for key, value in manifest.items() if key not in ("format", "kind", "files")}
    write_manifest(copy, kind="checkpoint", extra=extra)
    return copy


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "optimizer.safetensors",
        "optimizer.json",
        "rng_0.json",
        "rng_0.safetensors",
        "progress.json",
        "trainer_state.json",
        "scheduler.json",
    ],
)
def test_a_missing_part_is_named(name: str, make_trainer: MakeTrainer, tmp_path: Path) -> None:
    make_trainer(token_rows(14), max_steps=2, save_steps=1).train()
    folder = without(tmp_path / "out" / "checkpoint-1", name)
    verify_manifest(folder)
    named = "holds no optimizer state" if name == "scheduler.json" else rf"{name}: missing"
    with pytest.raises(CheckpointError, match=named):
        make_trainer(token_rows(14), max_steps=2).train(resume_from_checkpoint=str(folder))


class Unpickled(Exception):  # noqa: N818
    """Somebody has loaded a pickle."""


class Trap:
    def __reduce__(self) -> Any:
        return (_spring, ())


def _spring() -> None:
    raise Unpickled


def test_no_pickle_in_a_checkpoint_is_opened(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    """Files of the names that Trainer reads would run whatever somebody has put into them."""
    import pickle

    make_trainer(token_rows(14), max_steps=2, save_steps=1).train()
    folder = tmp_path / "out" / "checkpoint-1"
    for name in ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth", "rng_state_0.pth", "pytorch_model.bin"):
        (folder / name).write_bytes(pickle.dumps(Trap()))
    with pytest.raises(Unpickled):
        pickle.loads((folder / "scaler.pt").read_bytes())
    trainer: EftTrainer = make_trainer(token_rows(14), max_steps=2)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    with pytest.raises(CheckpointError, match=r"scaler\.json: missing"):
        trainer.train(resume_from_checkpoint=str(folder))
    trainer = make_trainer(token_rows(14), max_steps=2)
    assert trainer.train(resume_from_checkpoint=str(folder)).global_step == 2


def test_the_loss_scale_of_fp16_goes_into_the_checkpoint(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = make_trainer(token_rows(14), max_steps=2)
    trainer.train()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=77)
    scaler.scale(torch.ones(()))
    trainer.accelerator.scaler = scaler
    trainer.state.global_step = 7
    trainer._save_checkpoint(trainer.model)
    trainer.parts.checkpoint.wait()
    other = torch.amp.GradScaler("cpu")
    trainer.accelerator.scaler = other
    trainer._load_scaler(str(tmp_path / "out" / "checkpoint-7"))
    assert (other.get_scale(), other.get_growth_interval()) == (8.0, 77)


# ---- what is kept ----------------------------------------------------------------------------------------------------


def test_milestones_are_kept(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    make_trainer(token_rows(14), max_steps=10, save_steps=1, save_total_limit=2, save_keep_every=4).train()
    assert CheckpointStore(tmp_path / "out", save_total_limit=None).steps() == [4, 8, 9, 10]


def test_a_stopped_run_says_how_it_is_continued(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    """SIGTERM with `save_only_model`: the last checkpoint is a full one all the same."""
    trainer = make_trainer(token_rows(14), max_steps=5, save_steps=1, save_only_model=True)
    trainer.add_callback(Signal(3))
    trainer.train()
    found = CheckpointStore(tmp_path / "out", save_total_limit=None).newest_complete()
    assert found.path == tmp_path / "out" / "checkpoint-3"
