"""E2 across topologies in fp64: what rounding may hide in fp32 (`test_equality.py`) would stand out by nine digits.

The same trainings of ten steps, with Adam's own epsilon; losses are logged through fp32 sums, so they are held to E2 as
it stands, the norms of the gradients and the weights after ten steps to 1e-12.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import MixedPrecisionPolicy

from eft.parallel.state_dict import full_tensors
from eft.trainer.dtypes import DtypeLedger
from tests.distributed.cpu_shim import CpuShimTrainer
from tests.distributed.ranks import Ranks
from tests.distributed.test_equality import MODES
from tests.distributed.training import STEPS, Seen, Trained, build, settings

LOSS_REL = 1e-6
WIDE = 1e-12
"""Of gradient norms, relative, and of weights (about 0.15), absolute; the largest measured of a weight is 2e-14."""
KEYS: dict[str, Any] = {"adam_epsilon": 1e-8}


class WideShimTrainer(CpuShimTrainer):
    """Gradients of FSDP2 are added up in fp64, too; in a run they are in fp32."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.plugin is not None:
            self.plugin.mixed_precision_policy = MixedPrecisionPolicy(reduce_dtype=torch.float64)


class OneShareTwice(WideShimTrainer):
    """A fault: the second process weighs its share a millionth too much."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs) * (1 + 1e-6 * (self.args.process_index == 1))


def train(
    rank: int, kind: str, keys: dict[str, Any], trainer_class: type[WideShimTrainer] = WideShimTrainer
) -> Trained:
    """As `training.train`, with all weights in fp64."""
    trainer = build(kind, keys, trainer_class=trainer_class)
    trainer.model.double()
    trainer.remove_callback(DtypeLedger)
    seen = Seen()
    trainer.add_callback(seen)
    trainer.train()
    weights = {name: tensor.detach().clone() for name, tensor in full_tensors(trainer.model)}
    assert {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()} == {torch.float64}
    wrapped, is_fsdp2 = type(trainer.model_wrapped).__name__, trainer.accelerator.is_fsdp2
    return Trained(seen.losses, seen.norms, [], weights if rank == 0 else {}, wrapped, is_fsdp2)


@cache
def alone(kind: str) -> Trained:
    return train(0, kind, settings(Path("/tmp/eft-alone-writes-nothing"), **KEYS))


def gaps(got: Trained, expected: Trained) -> list[str]:
    """Where two trainings differ by more than the last digits."""
    assert len(got.losses) == len(expected.losses) == STEPS
    assert got.weights.keys() == expected.weights.keys()
    found = []
    for step in range(STEPS):
        if not abs(got.losses[step] - expected.losses[step]) <= LOSS_REL * abs(expected.losses[step]):
            found.append(f"loss of step {step + 1}")
        if not abs(got.norms[step] - expected.norms[step]) <= WIDE * expected.norms[step]:
            found.append(f"gradient norm of step {step + 1}")
    largest = max((float((got.weights[name] - t).abs().max()), name) for name, t in expected.weights.items())
    print(f"largest gap of a weight: {largest[0]:.1e} in {largest[1]}")
    return found + ([f"weights of {largest[1]}"] if not largest[0] <= WIDE else [])


def check(group: Ranks, mode: str, kind: str, tmp_path: Path) -> None:
    keys = settings(tmp_path / "out", **{**KEYS, **MODES[mode][2]})
    assert gaps(group.run(train, kind, keys)[0], alone(kind)) == []


LLAMAS = ["llama", "llama lora", "llama tied"]
COVER = [("DDP 2", "llama"), ("FSDP2 2", "llama tied"), ("CP 2", "llama lora")]
OF_WHOLE_ROWS = [*(mode for mode in MODES if mode.startswith(("DDP", "FSDP2", "HSDP")) and "in parts" not in mode)]
"""Loaded in parts, the weights come after the trainer was built; where they lie is all that is different there."""
PAIRS = [
    *(
        (mode, kind)
        for mode in [*OF_WHOLE_ROWS, "CP 2", "CP 2 in FSDP2", "CP 2 × DDP 2", "TP 2"]
        for kind in [*LLAMAS, "qwen3_moe"]
    ),
    # Its norms multiply in fp32, so that a weight's gradient depends on how a row was cut.
    *((mode, "gemma3_text") for mode in OF_WHOLE_ROWS),
]
"""TP 2 × FSDP2 2 and TP 2 × DDP 2 make up gradients in fp32."""


def of_size(size: int) -> list[tuple[str, str]]:
    """The slow ones."""
    return [(mode, kind) for mode, kind in PAIRS if MODES[mode][0] == size and (mode, kind) not in COVER]


@pytest.mark.parametrize(("mode", "kind"), COVER)
def test_a_training_is_that_of_one_process(mode: str, kind: str, two: Ranks, tmp_path: Path) -> None:
    check(two, mode, kind, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "kind"), of_size(2))
def test_every_mode_of_two(mode: str, kind: str, two: Ranks, tmp_path: Path) -> None:
    check(two, mode, kind, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "kind"), of_size(4))
def test_every_mode_of_four(mode: str, kind: str, four: Ranks, tmp_path: Path) -> None:
    check(four, mode, kind, tmp_path)


def test_a_share_that_weighs_a_millionth_too_much_is_found(two: Ranks, tmp_path: Path) -> None:
    """A tenth of what the limits in fp32 would let through."""
    got = two.run(train, "llama", settings(tmp_path / "out", **KEYS), OneShareTwice)[0]
    found = gaps(got, alone("llama"))
    assert "gradient norm of step 1" in found
    assert any(gap.startswith("weights") for gap in found)
