"""When a training is about to begin: try every phase, write down what it takes, stop where something is too much."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn
from transformers import TrainerCallback

from eft.core.atomic import TEMPORARY_MARK, write_json
from eft.core.constants import CHECKPOINT_PREFIX, MEMORY_FILE
from eft.core.errors import ConfigError
from eft.optim.state_size import gradient_bytes, held_state_bytes
from eft.preflight.disk import DiskNeed, disk_advice
from eft.preflight.exercise import Exercise, Measured, unchanged
from eft.preflight.settings import RunShape, cheaper_eval_sizes, cheaper_settings, present_setting, written
from eft.runtime.memory import Gauge, HostMemory
from eft.runtime.weights import live_weights, save_weights
from eft.trainer.trainer import EftTrainer

logger = logging.getLogger(__name__)

TRIAL_SECONDS = 90.0
"""How long to look for a setting that fits."""


@dataclass(eq=False)
class Preflight(TrainerCallback):
    """Tries the costliest micro-batch, the largest evaluation batch and one save when a training begins."""

    shape: RunShape
    gauge: Gauge
    """Of the memory that the model is trained in."""
    state_bytes: Callable[[nn.Module], int]
    """Bytes of the optimizer state of a model."""
    paused: Callable[[], AbstractContextManager[None]]
    """Inside, backward passes update nothing."""
    output_dir: Path
    save_total_limit: int | None
    save_copies: bool
    """`save_asynchronously`: what is saved is copied in host memory first."""
    console: Console | None = None
    host: Gauge = field(default_factory=HostMemory)
    free_disk: Callable[[Path], int] = field(default=lambda path: shutil.disk_usage(path).free)
    trainer: EftTrainer | None = None
    """Set by the builder, once there is one."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Try all phases, and put everything back.

        Raises:
            ConfigError: a phase does not fit; the message names it and the cheapest setting that does.
        """
        trainer = self.trainer
        assert trainer is not None
        kept = self.state_bytes(trainer.model)
        exercise = Exercise(trainer, self.gauge, max(0, kept - held_state_bytes(trainer.optimizer)), self.paused)
        with unchanged(trainer):
            phases = {"training step": self._training(exercise)}
            if trainer.flow.evaluate_at or args.eval_on_start:
                phases["evaluation"] = self._evaluation(exercise)
            phases["save"] = self._save(exercise, kept)
        if args.should_save:
            sizes = {"gradients": gradient_bytes(trainer.model), "optimizer_state": kept}
            write_json(self.output_dir / MEMORY_FILE, {"device": str(args.device), **sizes, "phases": phases})

    def _training(self, exercise: Exercise) -> dict[str, Any]:
        measured = exercise.training_step(present_setting(self.shape))
        if not measured.fits:
            raise ConfigError(_too_much("the training step", measured) + self._cheaper_step(exercise))
        return self._report("training step", measured, exercise.pending)

    def _cheaper_step(self, exercise: Exercise) -> str:
        """The first of the cheaper settings that fits, as advice."""
        end = time.monotonic() + TRIAL_SECONDS
        tried = []
        for setting in cheaper_settings(self.shape):
            measured = exercise.training_step(setting)
            if measured.fits:
                assert measured.needed is not None
                return f" The cheapest setting that fits: {written(setting.keys)} ({_size(measured.needed)})."
            tried.append(written(setting.keys))
            if time.monotonic() > end:
                break
        return (
            f" Nothing that was tried fits{f', not even {tried[-1]}' if tried else ''}; the optimizer's state alone "
            f"takes {_size(exercise.pending)}. Train an adapter (`adapter: lora`), fewer layers (`train_top_layers`), "
            "or a smaller model."
        )

    def _evaluation(self, exercise: Exercise) -> dict[str, Any]:
        splits = exercise.trainer.eval_dataset
        datasets = list(splits.values()) if isinstance(splits, dict) else [splits]
        measured = exercise.evaluation(datasets, self.shape.eval_batch_size)
        if measured.fits:
            return self._report("evaluation", measured, exercise.pending)
        for size in cheaper_eval_sizes(self.shape):
            smaller = exercise.evaluation(datasets, size)
            if smaller.fits:
                assert smaller.needed is not None
                advice = f" The cheapest setting that fits: `eval_batch_size: {size}` ({_size(smaller.needed)})."
                break
        else:
            advice = " No `eval_batch_size` fits: hold out shorter rows, or set `eval_strategy: no`."
        raise ConfigError(_too_much("the evaluation", measured) + advice)

    def _save(self, exercise: Exercise, state_bytes: int) -> dict[str, Any]:
        """Look for room on the disk, then write the weights once, and delete them."""
        trainer = exercise.trainer
        need = self._disk_need(trainer, state_bytes)
        self.output_dir.mkdir(parents=True, exist_ok=True)
        free = self.free_disk(self.output_dir)
        if need.total > free:
            keys = disk_advice(need, free)
            raise ConfigError(
                f"preflight: the saves do not fit. {_count(need.at_once, 'checkpoint')} of {_size(need.each)} and the "
                f"export ({_size(need.weights)}) take {_size(need.total)}, but {_size(free)} are free in "
                f"{self.output_dir}. "
                + (f"Set {written(keys)}, or" if keys else "Free some, or")
                + " choose another `output_dir`."
            )
        copies = need.each if self.save_copies else 0
        measured = exercise.saving(lambda: self._write_weights(trainer), self.host, copies)
        if not measured.fits:
            raise ConfigError(_too_much("a save", measured) + _save_advice(self.save_copies))
        self._say("save", f"{_count(need.at_once, 'checkpoint')} of {_size(need.each)}, {_size(free)} free on the disk")
        disk = {"bytes": need.each, "at_once": need.at_once, "export": need.weights, "free": free}
        return {**_numbers(measured), **disk}

    def _disk_need(self, trainer: EftTrainer, state_bytes: int) -> DiskNeed:
        files = live_weights(trainer.model).values()
        present = [step for step in self.output_dir.glob(f"{CHECKPOINT_PREFIX}*") if step.is_dir()]
        return DiskNeed(
            weights=sum(tensor.nbytes for tensors in files for tensor in tensors.values()),
            optimizer=0 if trainer.args.save_only_model else state_bytes,
            saves=sum(step > trainer.state.global_step for step in trainer.flow.save_at),
            present=len(present),
            limit=self.save_total_limit,
            keeps_best=trainer.flow.save_best,
        )

    def _write_weights(self, trainer: EftTrainer) -> None:
        folder = self.output_dir / f"{TEMPORARY_MARK}preflight.{os.getpid()}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            save_weights(folder, trainer.model)
        except OSError as error:
            raise ConfigError(f"preflight: a save into {self.output_dir} fails: {error}") from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _report(self, phase: str, measured: Measured, pending: int) -> dict[str, Any]:
        assert measured.needed is not None
        what, work = measured.what, "gradients and activations" if measured.what["step"] else "activations"
        where = f"step {what['step']:,}: " if what["step"] else ""
        self._say(
            phase,
            f"{_size(measured.needed - pending)} for {work} ({where}{_count(what['bins'], 'bin')}, "
            f"{what['tokens']:,} tokens) and {_size(pending)} for the optimizer, of {_size(measured.available)}",
        )
        return {**_numbers(measured), **what}

    def _say(self, phase: str, text: str) -> None:
        logger.info("preflight: %s: %s", phase, text)
        if self.console is not None:
            self.console.print(f"preflight: {phase}: {text}", highlight=False)


def _too_much(phase: str, measured: Measured) -> str:
    """What does not fit, and by how much."""
    what = measured.what
    batch = ""
    if what:
        where = f"step {what['step']:,}, " if what["step"] else ""
        batch = f"; its largest batch: {where}{_count(what['bins'], 'bin')}, {what['tokens']:,} tokens"
    available = _size(measured.available)
    if measured.needed is None:
        return f"preflight: {phase} does not fit: it needs more than the {available} that are available{batch}."
    return f"preflight: {phase} does not fit: it needs {_size(measured.needed)}, {available} are available{batch}."


def _save_advice(copies: bool) -> str:
    return " Set `save_asynchronously: false`." if copies else " Free some of the host's memory."


def _numbers(measured: Measured) -> dict[str, Any]:
    return {
        "needed": measured.needed,
        "available": measured.available,
        "seconds": round(measured.seconds, 3),
    }


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:,.1f} MiB"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
