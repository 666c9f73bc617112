"""E3 across world sizes: one run on 1, 2, 4 and 1 processes over gloo, each continuing the one before it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from eft.builder import HFCausalTrainerBuilder
from eft.config.load import config_from_mapping
from eft.runtime.checkpoint import verify_manifest
from tests.distributed.ranks import Ranks
from tests.functional.reference import SampleRecorder, token_rows
from tests.tiny import tiny_tokenizer
from tests.tiny_models import tiny_model

STEPS = 8
STOPS = (2, 4, 6, STEPS)
"""After which step each part ends: on 1, 2, 4 and 1 processes."""
GLOBAL_BATCH = 4
ROWS = token_rows(40)


class StopAfter(TrainerCallback):
    """Saves and stops, as a signal does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if state.global_step == self.step < STEPS:
            control.should_save = control.should_training_stop = True
        return control


@dataclass
class Part:
    """What one process saw of its part of the run."""

    fed: list[list[int]]
    """Row numbers of each of its micro-batches."""
    rows: list[dict[str, float]]
    """All logged steps, also those before this part."""


def train_part(rank: int, folder: str, stop: int, resume: int | None, keys: dict[str, Any]) -> Part:
    """One process of one part, which ends after step `stop`."""
    config = config_from_mapping(
        {
            "base_model": "in memory",
            "datasets": [{"path": "in memory"}],
            "output_dir": folder,
            "sequence_len": 64,
            "sample_packing": True,
            "micro_batch_size": 1,
            "global_batch_size": GLOBAL_BATCH,
            "max_steps": STEPS,
            "learning_rate": 1e-2,
            "bf16": False,
            "save_steps": 1000,
            "verify_saves": "never",
            "preflight": False,
            **keys,
        }
    )
    builder = HFCausalTrainerBuilder(config, tiny_model("llama"), tiny_tokenizer())
    builder.train_dataset = ROWS
    trainer = builder.build()
    trainer.add_callback(StopAfter(stop))
    packing: Any = trainer.parts.packing
    recorder = SampleRecorder(packing.collator, ROWS)
    trainer.parts.packing = replace(packing, collator=recorder)
    trainer.train(resume_from_checkpoint=None if resume is None else f"{folder}/checkpoint-{resume}")
    return Part(recorder.micro_batches, [row for row in trainer.state.log_history if "loss" in row])


def per_step(parts: list[Part], micro_batches: int) -> list[list[int]]:
    """Sorted row numbers of each step, of all processes together."""
    starts = range(0, len(parts[0].fed), micro_batches)
    return [
        sorted(row for part in parts for batch in part.fed[at : at + micro_batches] for row in batch) for at in starts
    ]


@dataclass
class Outcome:
    """Of a whole run."""

    samples: list[list[int]]
    rows: list[dict[str, float]]
    folder: Path


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """All of it on one process."""
    folder = tmp_path_factory.mktemp("straight")
    part = train_part(0, str(folder), STEPS, None, {})
    return Outcome(per_step([part], GLOBAL_BATCH), part.rows, folder)


@pytest.fixture(scope="module")
def elastic(tmp_path_factory: pytest.TempPathFactory, two: Ranks, four: Ranks) -> Outcome:
    """1 → 2 → 4 → 1; the last part in other micro-batches of the same global batch."""
    folder = tmp_path_factory.mktemp("elastic")
    first = train_part(0, str(folder), STOPS[0], None, {})
    second = two.run(train_part, str(folder), STOPS[1], STOPS[0], {})
    third = four.run(train_part, str(folder), STOPS[2], STOPS[1], {})
    last = train_part(0, str(folder), STOPS[3], STOPS[2], {"micro_batch_size": 2})
    samples = per_step([first], 4) + per_step(second, 2) + per_step(third, 1) + per_step([last], 2)
    return Outcome(samples, last.rows, folder)


def test_the_same_samples_are_in_every_step(straight: Outcome, elastic: Outcome) -> None:
    assert len(straight.samples) == STEPS
    assert elastic.samples == straight.samples


def test_losses_gradients_and_learning_rates_are_within_e2(straight: Outcome, elastic: Outcome) -> None:
    assert [row["step"] for row in elastic.rows] == list(range(1, STEPS + 1))
    for row, expected in zip(elastic.rows, straight.rows, strict=True):
        assert row["learning_rate"] == expected["learning_rate"]
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)


def test_every_process_wrote_its_share(elastic: Outcome) -> None:
    """The files do not depend on the processes, but for the generators, of which each has its own."""
    for world_size, stop in zip((1, 2, 4, 1), STOPS, strict=True):
        names = set(verify_manifest(elastic.folder / f"checkpoint-{stop}")["files"])
        assert {name for name in names if name.startswith("rng_")} == {
            f"rng_{rank}.{kind}" for rank in range(world_size) for kind in ("json", "safetensors")
        }
        assert {"model.safetensors", "optimizer.safetensors", "optimizer.json", "scheduler.json"} <= names
    assert not list(elastic.folder.glob(".tmp-*"))
