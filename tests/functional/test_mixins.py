"""Each of the seven mixins does its job: a trainer put together without it shows what is then missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import CellType, FunctionType
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer

from eft.builder import HFCausalTrainerBuilder
from eft.core.errors import CheckpointError, PromiseBroken
from eft.models.adapters import apply_adapter
from eft.optim.schedulers import learning_rates
from eft.runtime.checkpoint import CheckpointStore, verify_manifest
from eft.runtime.offload import OffloadCounters, activation_offloading
from eft.trainer.checkpoint import CheckpointSaveMixin
from eft.trainer.offloading import ActivationOffloadingMixin
from eft.trainer.optimizer import OptimizerMixin
from eft.trainer.packing import PackingMixin
from eft.trainer.parallel import DistributedParallelMixin
from eft.trainer.parts import ParallelParts, TrainerParts
from eft.trainer.rng import RngLoaderMixin
from eft.trainer.scheduler import SchedulerMixin
from eft.trainer.trainer import EftTrainer
from tests.functional.conftest import MakeConfig, MakeTrainer
from tests.functional.reference import token_rows
from tests.tiny_models import tiny_model

MIXINS = (
    PackingMixin,
    SchedulerMixin,
    OptimizerMixin,
    RngLoaderMixin,
    CheckpointSaveMixin,
    ActivationOffloadingMixin,
    DistributedParallelMixin,
)
ROWS = token_rows(12)


def trainer_without(mixin: type) -> type[EftTrainer]:
    """EftTrainer's own body over the same bases minus one."""
    cell = CellType()
    body: dict[str, Any] = {}
    for name, value in vars(EftTrainer).items():
        if isinstance(value, FunctionType) and "__class__" in value.__code__.co_freevars:
            # `super()` looks for the class it was compiled in; that is the new one now.
            closure = tuple(
                cell if free == "__class__" else old
                for free, old in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
            )
            copy = FunctionType(value.__code__, value.__globals__, name, value.__defaults__, closure)
            copy.__kwdefaults__ = value.__kwdefaults__
            value = copy
        if name not in ("__dict__", "__weakref__"):
            body[name] = value
    made = type(f"Without{mixin.__name__}", tuple(base for base in EftTrainer.__bases__ if base is not mixin), body)
    cell.cell_contents = made
    return made


def test_the_seven_come_before_trainer() -> None:
    assert EftTrainer.__bases__ == (*MIXINS, Trainer)
    for mixin in MIXINS:
        assert not issubclass(trainer_without(mixin), mixin)
        assert issubclass(trainer_without(mixin), Trainer)


def first_batch(trainer: EftTrainer) -> dict[str, Any]:
    trainer.make_plan()
    return next(iter(trainer.get_train_dataloader()))


def test_packing(make_trainer: MakeTrainer) -> None:
    """Without it Trainer's own sampler and collator feed the model: no plan, no boundaries."""
    whole = make_trainer(ROWS)
    batch = first_batch(whole)
    assert whole.plan is not None
    assert batch["step_weight"] == whole.plan.step(0).weight
    assert len(batch["cu_seq_lens_q"]) > 2
    assert len(whole.get_train_dataloader()) == 2 * whole.plan.total_steps

    other = make_trainer(ROWS, trainer_class=trainer_without(PackingMixin))
    with pytest.raises((KeyError, ValueError, TypeError)):
        first_batch(other)["cu_seq_lens_q"]
    with pytest.raises((KeyError, ValueError, TypeError)):
        other.train()


def rates(trainer: EftTrainer) -> list[float]:
    trainer.train()
    return [row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row]


def test_scheduler(make_trainer: MakeTrainer) -> None:
    """Without it the rates are upstream's own, and a schedule that the config names is found to be unused (E8)."""
    keys: dict[str, Any] = {"max_steps": 5, "save_strategy": "no"}
    other = trainer_without(SchedulerMixin)
    whole = make_trainer(ROWS, **keys)
    expected = learning_rates(whole.parts.scheduler.args[0], 5)  # type: ignore[attr-defined]
    assert rates(whole) == expected
    assert rates(make_trainer(ROWS, trainer_class=other, **keys)) != expected
    with pytest.raises(PromiseBroken, match="`lr_scheduler`"):
        make_trainer(ROWS, trainer_class=other, lr_scheduler="rex", **keys).train()


def test_optimizer(make_trainer: MakeTrainer) -> None:
    """Without it the optimizer is upstream's own, and further keys of it are found to be unused (E8)."""
    keys: dict[str, Any] = {"max_steps": 3, "optimizer": "lion_pytorch", "save_strategy": "no"}
    for trainer_class, name in ((EftTrainer, "Lion"), (trainer_without(OptimizerMixin), "AdamW")):
        trainer = make_trainer(ROWS, trainer_class=trainer_class, **keys)
        trainer.train()
        assert type(trainer.plain_optimizer()).__name__ == name
    with pytest.raises(PromiseBroken, match="`weight_decay`"):
        make_trainer(ROWS, trainer_class=trainer_without(OptimizerMixin), weight_decay=0.1, **keys).train()


def test_rng(make_config: MakeConfig, make_trainer: MakeTrainer, tmp_path: Path) -> None:
    """Without it the generators of a checkpoint are passed over in silence, and every dropout mask after it differs."""
    config = make_config(max_steps=4, save_steps=2, adapter="lora", lora_target_linear=True, lora_dropout=0.3)

    def train(trainer_class: type[EftTrainer], checkpoint: str | None) -> list[float]:
        model = apply_adapter(tiny_model("llama"), config, seed=config.seed)
        trainer = make_trainer(ROWS, model=model, config=config, trainer_class=trainer_class)
        trainer.train(resume_from_checkpoint=checkpoint)
        return [row["loss"] for row in trainer.state.log_history if "loss" in row]

    straight = train(EftTrainer, None)
    checkpoint = str(tmp_path / "out" / "checkpoint-2")
    assert train(EftTrainer, checkpoint) == straight
    other = train(trainer_without(RngLoaderMixin), checkpoint)
    assert other[:2] == straight[:2]
    assert other[2:] != straight[2:]

    for path in (tmp_path / "out" / "checkpoint-2").glob("rng_*"):
        path.unlink()
    with pytest.raises(CheckpointError, match="rng_0"):
        train(EftTrainer, checkpoint)


def test_checkpoint(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    """Without it checkpoints hold pickles and no manifest, so that none can be told to be complete."""
    for trainer_class, folder in ((EftTrainer, "ours"), (trainer_without(CheckpointSaveMixin), "theirs")):
        make_trainer(
            ROWS, trainer_class=trainer_class, max_steps=2, save_steps=2, output_dir=str(tmp_path / folder)
        ).train()
    assert verify_manifest(tmp_path / "ours" / "checkpoint-2")["step"] == 2
    assert CheckpointStore(tmp_path / "ours", save_total_limit=None).newest_complete().path is not None

    names = {path.name for path in (tmp_path / "theirs" / "checkpoint-2").iterdir()}
    assert "optimizer.pt" in names
    assert "progress.json" not in names
    assert CheckpointStore(tmp_path / "theirs", save_total_limit=None).newest_complete().path is None


def test_activation_offloading(make_trainer: MakeTrainer) -> None:
    """With it saved activations move (here into other CPU memory) and the numbers stay; without it none moves."""
    seen: dict[type, list[OffloadCounters]] = {}
    losses: dict[type, list[float]] = {}
    other = trainer_without(ActivationOffloadingMixin)
    for trainer_class in (EftTrainer, other):
        counters = seen.setdefault(trainer_class, [])

        @contextmanager
        def recorded(into: list[OffloadCounters], **kwargs: Any) -> Iterator[OffloadCounters]:
            with activation_offloading(True, exercise=True, **kwargs) as moved:
                into.append(moved)
                yield moved

        trainer = make_trainer(ROWS, trainer_class=trainer_class, max_steps=2, save_strategy="no")
        trainer.parts.offloading = partial(recorded, counters)
        trainer.train()
        losses[trainer_class] = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(seen[EftTrainer]) == 4, "once per micro-batch"
    assert all(moved.tensors > 10 and moved.num_bytes > 10_000 for moved in seen[EftTrainer])
    assert all(moved.kept > 0 for moved in seen[EftTrainer]), "parameters stay"
    assert seen[other] == []
    assert losses[EftTrainer] == losses[other]


class ParallelBuilder(HFCausalTrainerBuilder):
    """A builder whose parallel plan has something to add."""

    def _parts(self, *args: Any) -> TrainerParts:
        parts = super()._parts(*args)
        parts.parallel = ParallelParts(arguments={"project_dir": "from the parallel plan"})
        parts.state_dict = gathered
        return parts


def gathered(model: nn.Module) -> dict[str, torch.Tensor]:
    """Stands in for weights that no single rank holds."""
    return {name: torch.full_like(value, 0.5) for name, value in model.state_dict().items()}


def test_parallel(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    """Without it the Accelerator never hears of the parallel plan, and `save_model` writes what one rank holds."""
    from safetensors.torch import load_file

    other = trainer_without(DistributedParallelMixin)
    for trainer_class, project, value in ((EftTrainer, "from the parallel plan", 0.5), (other, None, None)):
        trainer = make_trainer(ROWS, trainer_class=trainer_class, builder_class=ParallelBuilder)
        assert trainer.accelerator.project_dir == project
        folder = tmp_path / trainer_class.__name__
        trainer.save_model(str(folder))
        saved = load_file(folder / "model.safetensors")["model.norm.weight"]
        assert torch.equal(saved, torch.full_like(saved, 0.5)) == (value is not None)
