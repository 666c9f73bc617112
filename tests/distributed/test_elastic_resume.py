"""E3 across world sizes: one run on 1, 2, 4 and 1 processes over gloo, each continuing the one before it.

Ten steps in fp32 add up rounding, so E2 is shown twice: as it stands, in the first step after each resume, where both
sides start from the same bits; and over all steps in fp64, where what is left is what is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainerCallback

from eft.builder import HFCausalTrainerBuilder
from eft.config.load import config_from_mapping
from eft.runtime.checkpoint import verify_manifest
from eft.trainer.dtypes import DtypeLedger
from eft.trainer.trainer import EftTrainer
from tests.distributed.ranks import Ranks
from tests.functional.reference import SampleRecorder, token_rows
from tests.tiny import tiny_tokenizer
from tests.tiny_models import tiny_model

STEPS = 8
STOPS = (2, 4, 6, STEPS)
"""After which step each part ends: on 1, 2, 4 and 1 processes."""
GLOBAL_BATCH = 4
ROWS = token_rows(40)
FP32 = (1e-6, 1e-5)
"""E2: loss, relative; gradient of each tensor, ‖Δ‖ ÷ max(‖g_t‖, 1e-3 · ‖g‖)."""
FP64 = (1e-12, 1e-11)
"""The same of a single step in fp64."""
TRAJECTORY = 1e-11
"""Relative, of losses and gradient norms of eight steps in fp64; absolute, of the weights (about 0.15) after them."""


class Recorded(EftTrainer):
    """Keeps its share of the loss of each micro-batch, in the dtype that the model computes in."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.shares: list[float] = []

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self.shares.append(float(loss) / self.parts.parallel.gradient_ranks)
        return loss


class OwnCount(EftTrainer):
    """A fault: the second process divides by the tokens of its own share."""

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> float | None:
        weight = super()._get_num_items_in_batch(batch_samples, device)
        if self.args.process_index != 1:
            return weight
        return float(sum(batch["num_trained"] for batch in batch_samples)) * self.parts.parallel.gradient_ranks


class LostRow(EftTrainer):
    """A fault: the second process forgets the last document of each of its rows that has several."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        packing: Any = self.parts.packing
        collate = packing.collator
        if self.args.process_index == 1:
            self.parts.packing = replace(packing, collator=lambda bins: collate([part[:-1] or part for part in bins]))


@dataclass
class Stop(TrainerCallback):
    """Ends after a step, as a signal does; keeps the gradients of that step."""

    step: int
    saves: bool
    gradients: dict[str, Tensor] = field(default_factory=dict)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            pairs = ((name.removeprefix("module."), p.grad) for name, p in model.named_parameters())
            self.gradients = {name: gradient.clone() for name, gradient in pairs if gradient is not None}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if state.global_step == self.step < STEPS:
            control.should_save, control.should_training_stop = self.saves, True
        return control


@dataclass
class Part:
    """What one process saw of its part of the run."""

    fed: list[list[int]]
    """Row numbers of each of its micro-batches."""
    losses: list[float]
    """Its share of the loss of each of its micro-batches."""
    rows: list[dict[str, float]]
    """All logged steps, also those before this part."""
    gradients: dict[str, Tensor]
    """Of the last step."""


def train_part(
    rank: int, output: str, source: str | None, stop: int, trainer_class: type[EftTrainer], keys: dict[str, Any]
) -> Part:
    """One process of a part, which ends after step `stop`; `fp64` among the keys: all weights are."""
    keys = dict(keys)
    model = tiny_model("llama")
    wide = keys.pop("fp64", False)
    config = config_from_mapping(
        {
            "base_model": "in memory",
            "datasets": [{"path": "in memory"}],
            "output_dir": output,
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
    builder = HFCausalTrainerBuilder(config, model.double() if wide else model, tiny_tokenizer())
    builder.train_dataset = ROWS
    builder.trainer_class = type("RecordedTrainer", (Recorded, trainer_class), {})
    trainer = builder.build()
    if wide:
        trainer.remove_callback(DtypeLedger)
    end = Stop(stop, saves=keys.get("save_strategy") != "no")
    trainer.add_callback(end)
    packing: Any = trainer.parts.packing
    recorder = SampleRecorder(packing.collator, ROWS)
    trainer.parts.packing = replace(packing, collator=recorder)
    assert isinstance(trainer, Recorded)
    trainer.train(resume_from_checkpoint=source)
    rows = [row for row in trainer.state.log_history if "loss" in row]
    return Part(recorder.micro_batches, trainer.shares, rows, end.gradients)


def per_step(parts: list[Part], micro_batches: int) -> tuple[list[list[int]], list[float]]:
    """Sorted row numbers and loss of each step, of all processes together."""
    starts = range(0, len(parts[0].fed), micro_batches)
    samples = [
        sorted(row for part in parts for batch in part.fed[at : at + micro_batches] for row in batch) for at in starts
    ]
    return samples, [sum(sum(part.losses[at : at + micro_batches]) for part in parts) for at in starts]


@dataclass
class Outcome:
    """Of a whole run."""

    samples: list[list[int]]
    losses: list[float]
    rows: list[dict[str, float]]
    folder: Path


def straight_run(folder: Path, **keys: Any) -> Outcome:
    """All of it on one process."""
    part = train_part(0, str(folder), None, STEPS, EftTrainer, keys)
    return Outcome(*per_step([part], GLOBAL_BATCH), part.rows, folder)


def elastic_run(
    folder: Path, two: Ranks, four: Ranks, trainer_class: type[EftTrainer] = EftTrainer, **keys: Any
) -> Outcome:
    """1 → 2 → 4 → 1; the last part in other micro-batches of the same global batch."""
    checkpoints = [None, *(f"{folder}/checkpoint-{stop}" for stop in STOPS)]
    arguments = [(str(folder), checkpoints[number], stop, trainer_class) for number, stop in enumerate(STOPS)]
    first = [train_part(0, *arguments[0], keys)]
    second = two.run(train_part, *arguments[1], keys)
    third = four.run(train_part, *arguments[2], keys)
    last = [train_part(0, *arguments[3], {**keys, "micro_batch_size": 2})]
    found = [per_step(parts, size) for parts, size in ((first, 4), (second, 2), (third, 1), (last, 2))]
    samples = [step for part, _ in found for step in part]
    return Outcome(samples, [loss for _, part in found for loss in part], last[0].rows, folder)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """In fp64, on one process."""
    return straight_run(tmp_path_factory.mktemp("straight"), fp64=True)


@pytest.fixture(scope="module")
def elastic(tmp_path_factory: pytest.TempPathFactory, two: Ranks, four: Ranks) -> Outcome:
    """In fp64, on several."""
    return elastic_run(tmp_path_factory.mktemp("elastic"), two, four, fp64=True)


@pytest.fixture(scope="module")
def elastic_fp32(tmp_path_factory: pytest.TempPathFactory, two: Ranks, four: Ranks) -> Outcome:
    """In fp32, on several."""
    return elastic_run(tmp_path_factory.mktemp("elastic32"), two, four)


def trajectory_gaps(got: Outcome, expected: Outcome) -> list[str]:
    """Where two runs in fp64 differ."""
    found = [] if got.samples == expected.samples else ["other samples"]
    for step, (loss, wanted) in enumerate(zip(got.losses, expected.losses, strict=True), start=1):
        if not abs(loss - wanted) <= TRAJECTORY * abs(wanted):
            found.append(f"loss of step {step}: {loss!r}, not {wanted!r}")
    for row, wanted_row in zip(got.rows, expected.rows, strict=True):
        if row["learning_rate"] != wanted_row["learning_rate"]:
            found.append(f"learning rate of step {row['step']}")
        if not abs(row["grad_norm"] - wanted_row["grad_norm"]) <= TRAJECTORY * wanted_row["grad_norm"]:
            found.append(f"gradient norm of step {row['step']}")
    weights, wanted_weights = (
        load_file(run.folder / f"checkpoint-{STEPS}/model.safetensors") for run in (got, expected)
    )
    assert {tensor.dtype for tensor in weights.values()} == {torch.float64}
    for name, tensor in wanted_weights.items():
        if not float((weights[name] - tensor).abs().max()) <= TRAJECTORY:
            found.append(f"weights {name}")
    return found


def test_all_steps_on_1_2_4_and_1_processes_are_those_of_one(straight: Outcome, elastic: Outcome) -> None:
    assert len(straight.samples) == STEPS
    assert [row["step"] for row in elastic.rows] == list(range(1, STEPS + 1))
    assert trajectory_gaps(elastic, straight) == []


@pytest.mark.parametrize("fault", [OwnCount, LostRow])
def test_a_faulty_process_shows_in_the_steps(
    fault: type[EftTrainer], straight: Outcome, two: Ranks, four: Ranks, tmp_path: Path
) -> None:
    found = trajectory_gaps(elastic_run(tmp_path, two, four, fault, fp64=True), straight)
    assert found[0].startswith("loss of step 3:")
    assert any(gap.startswith("weights") for gap in found)


def step_gaps(got: Sequence[Part], expected: Part, limits: tuple[float, float], micro_batches: int) -> list[str]:
    """Where one step of several processes differs from the same on one process, by E2."""
    (samples, losses), (wanted_samples, wanted_losses) = per_step(list(got), micro_batches), per_step([expected], 4)
    found = [] if samples == wanted_samples else ["other samples"]
    if not abs(losses[0] - wanted_losses[0]) <= limits[0] * abs(wanted_losses[0]):
        found.append(f"loss {losses[0]!r}, not {wanted_losses[0]!r}")
    whole = float(torch.stack([gradient.norm() for gradient in expected.gradients.values()]).norm())
    assert got[0].gradients.keys() == expected.gradients.keys()
    assert whole > 0.01
    for name, wanted in expected.gradients.items():
        limit = limits[1] * max(float(wanted.norm()), 1e-3 * whole)
        found += [
            f"{name} of rank {n}"
            for n, part in enumerate(got)
            if not float((part.gradients[name] - wanted).norm()) <= limit
        ]
    return found


def one_step(
    group: Ranks | None, source: Path, trainer_class: type[EftTrainer] = EftTrainer, **keys: Any
) -> list[Part]:
    """The step after a checkpoint; without clipping, which would hide a common factor."""
    stop = int(source.name.rpartition("-")[2]) + 1
    keys = {"save_strategy": "no", "save_steps": None, "max_grad_norm": 0, **keys}
    arguments = (str(source.parent / "nothing"), str(source), stop, trainer_class, keys)
    return [train_part(0, *arguments)] if group is None else group.run(train_part, *arguments)


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
def test_the_first_step_after_each_resume_is_that_of_one_process(
    precision: str, elastic: Outcome, elastic_fp32: Outcome, two: Ranks, four: Ranks
) -> None:
    """E2 as it stands: the same weights and moments, the same samples, on 2 and on 4 processes and on one."""
    wide = precision == "fp64"
    folder, limits = (elastic.folder, FP64) if wide else (elastic_fp32.folder, FP32)
    for group, stop in ((two, STOPS[0]), (four, STOPS[1]), (None, STOPS[2])):
        source = folder / f"checkpoint-{stop}"
        more = {"micro_batch_size": 2} if group is None else {}
        got = one_step(group, source, fp64=wide, **more)
        micro_batches = GLOBAL_BATCH // (len(got) * more.get("micro_batch_size", 1))
        assert step_gaps(got, one_step(None, source, fp64=wide)[0], limits, micro_batches) == []


@pytest.mark.parametrize("fault", [OwnCount, LostRow])
def test_a_faulty_process_shows_in_one_step(fault: type[EftTrainer], elastic_fp32: Outcome, two: Ranks) -> None:
    source = elastic_fp32.folder / f"checkpoint-{STOPS[0]}"
    found = step_gaps(one_step(two, source, fault), one_step(None, source)[0], FP32, 2)
    assert len(found) > 10  # every weight


def test_the_same_samples_are_in_every_step_in_fp32(straight: Outcome, elastic_fp32: Outcome) -> None:
    assert elastic_fp32.samples == straight.samples
    for loss, expected in zip(elastic_fp32.losses, straight.losses, strict=True):
        assert loss == pytest.approx(expected, rel=1e-5)


def test_every_process_wrote_its_share(elastic: Outcome) -> None:
    """The files do not depend on the processes, but for the generators, of which each has its own."""
    for world_size, stop in zip((1, 2, 4, 1), STOPS, strict=True):
        names = set(verify_manifest(elastic.folder / f"checkpoint-{stop}")["files"])
        assert {name for name in names if name.startswith("rng_")} == {
            f"rng_{rank}.{kind}" for rank in range(world_size) for kind in ("json", "safetensors")
        }
        assert {"model.safetensors", "optimizer.safetensors", "optimizer.json", "scheduler.json"} <= names
    assert not list(elastic.folder.glob(".tmp-*"))
