"""D2: the YAML of a run that is continued by other processes is the same, and so is the global batch."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from eft import run
from eft.core.errors import CheckpointError, ConfigError
from tests.distributed.ranks import RankError, Ranks
from tests.functional.conftest import MakeConfig, MakeTrainer

KEYS: dict[str, Any] = {"gradient_accumulation_steps": 4, "max_steps": 4, "save_steps": 2, "adam_epsilon": 1e-3}


def losses(folder: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def train(rank: int, values: dict[str, Any]) -> tuple[int, int, str]:
    """The whole command; what the trainer accumulated, the global batch, and what was said."""
    console = Console(file=io.StringIO(), width=200) if rank == 0 else None
    _, _, trainer = run.train(values, console=console)
    said = "" if console is None else console.file.getvalue()  # type: ignore[attr-defined]  # a StringIO
    return trainer.args.gradient_accumulation_steps, trainer.plan.global_batch_size, said  # type: ignore[union-attr]


@pytest.fixture
def stopped(make_config: MakeConfig, tmp_path: Path) -> tuple[dict[str, Any], dict[int, float]]:
    """A run of one process as a kill after step 3 leaves it; its keys, and the losses of all four steps."""
    config = make_config(**KEYS)
    run.train(config)
    return interrupted(config.model_dump(mode="json"), tmp_path / "out")


def interrupted(values: dict[str, Any], folder: Path) -> tuple[dict[str, Any], dict[int, float]]:
    found = losses(folder)
    shutil.rmtree(folder / "checkpoint-4")
    (folder / "run.json").write_text((folder / "run.json").read_text().replace("finished", "interrupted"))
    return values, found


def test_two_and_four_processes_keep_the_global_batch_of_one(
    stopped: tuple[dict[str, Any], dict[int, float]], two: Ranks, four: Ranks
) -> None:
    values, expected = stopped
    folder = Path(values["output_dir"])
    for group in (two, four):
        answers = group.run(train, values)
        assert {answer[:2] for answer in answers} == {(4 // group.world_size, 4)}
        assert "The global batch stays 4, as checkpoint-2 has it: accumulation" in answers[0][2]
        assert f"(the config alone would make it {4 * group.world_size} here)" in answers[0][2]
        assert losses(folder) == pytest.approx(expected, rel=1e-5)
        assert json.loads((folder / "plan.json").read_text())["global_batch_size"] == 4
        interrupted(values, folder)
    # What several have continued, one continues with nothing to be said.
    accumulation, batch, said = train(0, values)
    assert (accumulation, batch) == (4, 4)
    assert "The global batch stays" not in said


def test_processes_that_cannot_make_it_up_are_told_which_can(
    make_config: MakeConfig, tmp_path: Path, two: Ranks
) -> None:
    config = make_config(**{**KEYS, "gradient_accumulation_steps": 3})
    run.train(config)
    values, _ = interrupted(config.model_dump(mode="json"), tmp_path / "out")
    with pytest.raises(RankError, match="micro_batch_size: the checkpoint's global batch of 3") as caught:
        two.run(train, values)
    assert "so that their product is one of 1, 3." in str(caught.value)


def test_smaller_micro_batches_are_accumulated(stopped: tuple[dict[str, Any], dict[int, float]]) -> None:
    """Whoever halves the micro-batch because memory ran out gets the same run."""
    values, expected = stopped
    accumulation, batch, _ = train(0, {**values, "micro_batch_size": 2})
    assert (accumulation, batch) == (2, 4)
    assert losses(Path(values["output_dir"])) == pytest.approx(expected, rel=1e-5)


def test_another_global_batch_is_refused_even_where_change_is_allowed(
    stopped: tuple[dict[str, Any], dict[int, float]],
) -> None:
    values, _ = stopped
    other = {**values, "global_batch_size": 8, "gradient_accumulation_steps": None}
    with pytest.raises(CheckpointError, match="global_batch_size: None → 8"):
        run.train(other)
    with pytest.raises(ConfigError, match="global_batch_size: 8, but the checkpoint was trained with 4; set it back"):
        run.train(other, allow_change=True)


def test_a_trainer_of_ones_own_names_the_keys(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"max_steps": 4, "save_steps": 2}
    make_trainer(gradient_accumulation_steps=4, **keys).train()
    with pytest.raises(
        CheckpointError, match=r"a global batch of 4 bins, this trainer has 2\. Set `global_batch_size: 4`"
    ):
        make_trainer(gradient_accumulation_steps=2, **keys).train(str(tmp_path / "out" / "checkpoint-2"))
