"""The preflight of several processes: each tries its own costliest rows, what one lacks ends all with one message."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.spawn import ProcessException, start_processes

from eft.core.atomic import TEMPORARY_MARK
from eft.core.errors import ConfigError
from eft.preflight.callback import Preflight
from eft.runtime.memory import Peak
from eft.trainer.trainer import EftTrainer
from eft.verify.ranks import as_rank
from tests.distributed.ranks import Ranks, forget_devices
from tests.distributed.training import build, settings, train
from tests.functional.reference import token_rows
from tests.functional.test_preflight import LIMITLESS, CountedMemory

MODES: dict[str, dict[str, Any]] = {
    "DDP": {},
    "FSDP2": {"fsdp_version": 2},
    "CP": {"context_parallel_size": 2},
}
KEYS: dict[str, Any] = {"max_steps": 3, "test_datasets": [{"path": "given"}], "eval_steps": 2}
EVALS = token_rows(7, longest=24, seed=9)


@pytest.mark.parametrize("mode", ["DDP", "FSDP2", pytest.param("CP", marks=pytest.mark.slow)])
def test_a_run_is_the_same_with_and_without(mode: str, two: Ranks, tmp_path: Path) -> None:
    found = []
    for preflight in (False, True):
        keys = settings(tmp_path / f"out-{preflight}", preflight=preflight, **KEYS, **MODES[mode])
        found.append(two.run(train, "llama lora dropout", keys, EVALS)[0])
    expected, got = found
    assert got.losses == expected.losses
    assert got.evals == expected.evals
    assert all(torch.equal(got.weights[name], tensor) for name, tensor in expected.weights.items())
    assert not list((tmp_path / "out-True").glob(f"{TEMPORARY_MARK}*"))
    phases = json.loads((tmp_path / "out-True" / "memory.json").read_text())["phases"]
    assert list(phases) == ["training step", "evaluation", "save"]
    assert all(0 <= phase["needed"] < phase["available"] for phase in phases.values())


class OnePassFails(CountedMemory):
    """As an accelerator does it: out of memory in the middle of a pass."""

    @contextmanager
    def measured(self, budget: int, model: nn.Module) -> Iterator[Peak]:
        with super().measured(budget, model) as peak:
            raise torch.OutOfMemoryError("CUDA out of memory")
            yield peak


def with_limit(keys: dict[str, Any], limit: int, gauge: type[CountedMemory]) -> tuple[EftTrainer, CountedMemory]:
    trainer = build("llama", keys)
    (preflight,) = [found for found in trainer.callback_handler.callbacks if isinstance(found, Preflight)]
    preflight.gauge = memory = gauge(trainer, limit)
    return trainer, memory


def counted(rank: int, keys: dict[str, Any], limits: list[int], gauges: list[type[CountedMemory]]) -> tuple[str, int]:
    """What the run said where it ended, and what its costliest micro-batch took."""
    trainer, memory = with_limit(keys, limits[rank], gauges[rank])
    try:
        trainer.train()
    except ConfigError as error:
        return str(error), trainer.state.global_step
    return "", memory.needed[0] + memory.held[0]


@pytest.mark.parametrize("gauge", [CountedMemory, OnePassFails])
def test_what_one_process_lacks_is_said_by_all(gauge: type[CountedMemory], two: Ranks, tmp_path: Path) -> None:
    """Gradients are not averaged in the trial, so nobody waits for a process that has run out of memory."""
    keys = settings(tmp_path / "out", preflight=True, max_steps=3)
    both = [CountedMemory, CountedMemory]
    free = two.run(counted, keys, [LIMITLESS, LIMITLESS], both)
    assert [said for said, _ in free] == ["", ""]
    limits = [LIMITLESS, free[1][1] - 1] if gauge is CountedMemory else [LIMITLESS, LIMITLESS]
    answers = two.run(counted, keys, limits, [CountedMemory, gauge])
    assert len(set(answers)) == 1
    message, steps = answers[0]
    assert steps == 0
    assert message.startswith("preflight: the training step of rank 1 does not fit: it needs")
    if gauge is CountedMemory:
        assert "fits: `gradient_checkpointing: true`, `gradient_checkpointing_every: 2` (" in message


def sharded_rank(rank: int, keys: dict[str, Any], folder: str) -> None:
    """A process of its own, as a launcher starts it."""
    torch.set_num_threads(1)
    forget_devices()
    with as_rank(rank, 2, Path(folder, "meeting")):
        trainer, _ = with_limit(keys, LIMITLESS, OnePassFails if rank == 1 else CountedMemory)
        trainer.train()


def test_where_all_work_together_the_one_that_fails_ends_the_others(tmp_path: Path) -> None:
    """Rank 0 waits for weights of rank 1; whoever has started them ends it, and shows the first message."""
    keys = settings(tmp_path / "out", preflight=True, max_steps=3, **MODES["FSDP2"])
    with pytest.raises(ProcessException) as caught:
        start_processes(sharded_rank, (keys, str(tmp_path)), 2, start_method="fork")
    message = str(caught.value).strip().splitlines()[-1]
    assert "ConfigError: preflight: the training step of rank 1 does not fit: it needs more than" in message
    assert "not tried: `gradient_checkpointing: true`, `gradient_checkpointing_every: 2`; " in message
