"""What the trainer does around a step: the same numbers and events as upstream's way, and no waiting for the device."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainerCallback, TrainingArguments

from eft.trainer.trainer import EftTrainer
from tests.functional.conftest import MakeTrainer
from tests.functional.reference import token_rows
from tests.tiny_models import tiny_model

READS = ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero")
"""What makes the host wait for the device, whoever asks: `.item()`, `if tensor`, `torch.equal`, a mask as an index."""

EVENTS = tuple(name for name in vars(TrainerCallback) if name.startswith("on_"))


class UpstreamsWay(EftTrainer):
    """Takes upstream's path through every hook that has a shorter one."""

    _is_simple_engine = False

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        prepared: dict[str, Any] = Trainer._prepare_inputs(self, inputs)
        return prepared


def trained(trainer: EftTrainer) -> dict[str, Tensor]:
    trainer.train()
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


@pytest.mark.parametrize("keys", [{}, {"max_grad_norm": 0.0}, {"optimizer": "lion_pytorch"}, {"bf16": True}])
def test_the_short_way_gives_upstreams_numbers(make_trainer: MakeTrainer, keys: dict[str, Any]) -> None:
    keys = {"num_epochs": 2, "logging_steps": 1, "save_strategy": "no", **keys}
    ours, theirs = make_trainer(**keys), make_trainer(trainer_class=UpstreamsWay, **keys)
    expected = trained(theirs)
    assert isinstance(theirs.optimizer, AcceleratedOptimizer)
    weights = trained(ours)
    assert not isinstance(ours.optimizer, AcceleratedOptimizer)
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    logged = [
        [{name: row.get(name) for name in ("loss", "grad_norm", "learning_rate")} for row in trainer.state.log_history]
        for trainer in (ours, theirs)
    ]
    assert logged[0] == logged[1]


def test_a_second_training_follows_the_same_path(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(max_steps=2, save_strategy="no")
    trainer.train()
    first = trainer.plain_optimizer()
    trainer.train()
    assert trainer.optimizer is first


class Recorder(TrainerCallback):
    """Names of the events in their order."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __getattribute__(self, name: str) -> Any:
        if name in EVENTS:
            return lambda *args, **kwargs: self.names.append(name)
        return super().__getattribute__(name)


def upstream_events(folder: Path, steps: int, accumulation: int) -> list[str]:
    """Events of a plain Trainer that logs, evaluates and saves after each of its steps."""
    ids = torch.arange(2, 10)
    rows = [{"input_ids": ids, "labels": ids}] * (steps * accumulation)
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=accumulation,
        max_steps=steps,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    recorder = Recorder()
    trainer = Trainer(tiny_model("llama"), arguments, train_dataset=rows, eval_dataset=rows[:1], callbacks=[recorder])
    trainer.train()
    return recorder.names


def test_every_event_fires_in_upstreams_order(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    recorder = Recorder()
    trainer = make_trainer(
        token_rows(6),
        token_rows(1),
        sample_packing=False,
        gradient_accumulation_steps=2,
        max_steps=3,
        logging_steps=1,
        val_set_size=0.1,
        eval_steps=1,
        save_steps=1,
    )
    trainer.add_callback(recorder)
    trainer.train()
    expected = upstream_events(tmp_path / "upstream", 3, 2)
    assert expected.pop(0) == "on_init_end"  # ours was added after that
    assert recorder.names == expected
    assert {"on_substep_end", "on_pre_optimizer_step", "on_optimizer_step", "on_evaluate", "on_save"} <= set(expected)


class Reads(TorchDispatchMode):
    """Counts what would make the host wait for a device, by operator."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() in READS:
            self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))


class Window(TrainerCallback):
    """Counts reads from one step's end to a later one's."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last
        self.reads = Reads()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.first:
            self.reads.__enter__()
        elif state.global_step == self.last:
            self.reads.__exit__(None, None, None)


class ReadsEveryLoss(EftTrainer):
    """What upstream's filter for NaN does."""

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        assert not torch.isnan(loss)
        return loss


def reads_between_logs(make_trainer: MakeTrainer, **keys: Any) -> Counter[str]:
    """Reads over four steps of two micro-batches, none of which logs; the audit after step 3 is over."""
    keys = {"max_steps": 12, "logging_steps": 10, "save_strategy": "no", "bf16": True, **keys}
    trainer = make_trainer(token_rows(60), **keys)
    window = Window(4, 8)
    trainer.add_callback(window)
    trainer.train()
    return window.reads.counts


@pytest.mark.parametrize("keys", [{}, {"gradient_checkpointing": True}, {"loss_watchdog_threshold": 50.0}])
def test_nothing_is_read_back_between_two_logged_steps(make_trainer: MakeTrainer, keys: dict[str, Any]) -> None:
    assert reads_between_logs(make_trainer, **keys) == Counter()


def test_a_read_per_micro_batch_is_seen(make_trainer: MakeTrainer) -> None:
    counts = reads_between_logs(make_trainer, trainer_class=ReadsEveryLoss)
    assert sum(counts.values()) == 8


class Waits(TrainerCallback):
    """torch's own warnings about waiting for the device, from one step's end to a later one's."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last
        self.catcher = warnings.catch_warnings(record=True)
        self.found: list[warnings.WarningMessage] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.first:
            self.found = self.catcher.__enter__() or []
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
        elif state.global_step == self.last:
            torch.cuda.set_sync_debug_mode("default")
            self.catcher.__exit__(None, None, None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_host_never_waits_for_a_gpu_between_two_logged_steps(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(token_rows(60), max_steps=12, logging_steps=10, save_strategy="no", bf16=True)
    waits = Waits(4, 8)
    trainer.add_callback(waits)
    trainer.train()
    assert [f"{wait.filename}:{wait.lineno}: {wait.message}" for wait in waits.found] == []
