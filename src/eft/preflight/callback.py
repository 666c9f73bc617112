"""When a training is about to begin: try every phase, write down what it takes, stop where something is too much."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn
from transformers import TrainerCallback

from eft.core.atomic import TEMPORARY_MARK, write_json
from eft.core.constants import CHECKPOINT_PREFIX, MEMORY_FILE
from eft.core.errors import ConfigError
from eft.optim.state_size import gradient_bytes, held_state_bytes
from eft.parallel.group import from_all, from_first_rank
from eft.preflight.disk import DiskNeed, disk_advice
from eft.preflight.exercise import Exercise, Measured, OutOfMemoryHere, unchanged
from eft.preflight.settings import RunShape, cheaper_eval_sizes, cheaper_settings, present_setting, written
from eft.runtime.draft import SHARD_BYTES, Draft
from eft.runtime.memory import Gauge, HostMemory
from eft.runtime.sharding import ONE_PROCESS, Sharding
from eft.runtime.weights import add_weights, live_weights
from eft.trainer.trainer import EftTrainer

logger = logging.getLogger(__name__)

TRIAL_SECONDS = 90.0
"""How long to look for a setting that fits."""
_LISTED = 4


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
    sharding: Sharding = ONE_PROCESS
    """Who writes what of a save."""
    shards: int = 1
    """Processes over which weights, gradients and optimizer state are spread."""
    jointly: bool = False
    """See `Exercise`."""
    console: Console | None = None
    host: Gauge = field(default_factory=HostMemory)
    free_disk: Callable[[Path], int] = field(default=lambda path: shutil.disk_usage(path).free)
    trainer: EftTrainer | None = None
    """Set by the builder, once there is one."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Try all phases, and put everything back. Every process does, and all agree on what the fullest has found.

        Raises:
            ConfigError: a phase does not fit; the message names it and the cheapest setting that does.
        """
        trainer = self.trainer
        assert trainer is not None
        kept = self.state_bytes(trainer.model)
        pending = max(0, kept - held_state_bytes(trainer.optimizer)) // self.shards
        exercise = Exercise(trainer, self.gauge, pending, self.paused, self.jointly)
        with unchanged(trainer):
            phases = {"training step": self._training(exercise)}
            if trainer.flow.evaluate_at or args.eval_on_start:
                phases["evaluation"] = self._evaluation(exercise)
            phases["save"] = self._save(exercise, kept)
        if args.should_save:
            held = {"gradients": gradient_bytes(trainer.model), "optimizer_state": kept}
            sizes = {name: num_bytes // self.shards for name, num_bytes in held.items()}
            write_json(self.output_dir / MEMORY_FILE, {"device": str(args.device), **sizes, "phases": phases})

    def _training(self, exercise: Exercise) -> dict[str, Any]:
        measured = self._fullest("the training step", lambda: exercise.training_step(present_setting(self.shape)))
        if not measured.fits:
            advice = self._untried() if self.jointly else self._cheaper_step(exercise)
            raise ConfigError(self._too_much("the training step", measured) + advice)
        return self._report("training step", measured, exercise.pending)

    def _cheaper_step(self, exercise: Exercise) -> str:
        """The first of the cheaper settings that fits, as advice."""
        end = time.monotonic() + TRIAL_SECONDS
        tried = []
        for setting in cheaper_settings(self.shape):
            measured = fullest(exercise.training_step(setting))
            if measured.fits:
                assert measured.needed is not None
                return f" The cheapest setting that fits: {written(setting.keys)} ({_size(measured.needed)})."
            tried.append(written(setting.keys))
            if any(from_all(time.monotonic() > end)):
                break
        return (
            f" Nothing that was tried fits{f', not even {tried[-1]}' if tried else ''}; the optimizer's state alone "
            f"takes {_size(exercise.pending)}. Train an adapter (`adapter: lora`), fewer layers (`train_top_layers`), "
            "or a smaller model."
        )

    def _evaluation(self, exercise: Exercise) -> dict[str, Any]:
        splits = exercise.trainer.eval_dataset
        datasets = list(splits.values()) if isinstance(splits, dict) else [splits]
        measured = self._fullest("the evaluation", lambda: exercise.evaluation(datasets, self.shape.eval_batch_size))
        if measured.fits:
            return self._report("evaluation", measured, exercise.pending)
        for size in cheaper_eval_sizes(self.shape):
            smaller = self._fullest("the evaluation", partial(exercise.evaluation, datasets, size))
            if smaller.fits:
                assert smaller.needed is not None
                advice = f" The cheapest setting that fits: `eval_batch_size: {size}` ({_size(smaller.needed)})."
                break
        else:
            advice = " No `eval_batch_size` fits: hold out shorter rows, or set `eval_strategy: no`."
        raise ConfigError(self._too_much("the evaluation", measured) + advice)

    def _save(self, exercise: Exercise, state_bytes: int) -> dict[str, Any]:
        """Look for room on the disk, then write the weights once, and delete them."""
        trainer = exercise.trainer
        self.output_dir.mkdir(parents=True, exist_ok=True)
        need, free = from_first_rank(lambda: (self._disk_need(trainer, state_bytes), self.free_disk(self.output_dir)))
        if need.total > free:
            keys = disk_advice(need, free)
            raise ConfigError(
                f"preflight: the saves do not fit. {_count(need.at_once, 'checkpoint')} of {_size(need.each)} and the "
                f"export ({_size(need.weights)}) take {_size(need.total)}, but {_size(free)} are free in "
                f"{self.output_dir}. "
                + (f"Set {written(keys)}, or" if keys else "Free some, or")
                + " choose another `output_dir`."
            )
        copies = sum(map(self._own_share, (need.weights, need.optimizer))) if self.save_copies else 0
        measured = self._fullest(
            "a save", lambda: exercise.saving(lambda: self._write_weights(trainer), self.host, copies)
        )
        if not measured.fits:
            raise ConfigError(self._too_much("a save", measured) + _save_advice(self.save_copies))
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
        folder = self.output_dir / f"{TEMPORARY_MARK}preflight.{self.sharding.rank}.{os.getpid()}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            draft = Draft(sharding=self.sharding)
            add_weights(draft, trainer.model)
            draft.write(folder)
        except OSError as error:
            raise ConfigError(f"preflight: a save into {self.output_dir} fails: {error}") from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _own_share(self, num_bytes: int) -> int:
        """Of tensors that are saved in files of SHARD_BYTES, which the processes write in turn."""
        files = -(-num_bytes // SHARD_BYTES)
        return len(range(self.sharding.rank, files, self.sharding.world_size)) * min(num_bytes, SHARD_BYTES)

    def _fullest(self, phase: str, measure: Callable[[], Measured]) -> Measured:
        """What the process that comes nearest to its limit has measured; all know it."""
        try:
            return fullest(measure())
        except OutOfMemoryHere as error:
            raise ConfigError(self._too_much(phase, error.measured) + self._untried()) from error

    def _untried(self) -> str:
        """Advice where no process can try alone."""
        cheaper = (written(setting.keys) for setting in cheaper_settings(self.shape))
        return f" Cheaper, from the least to the most effect, not tried: {'; '.join(islice(cheaper, _LISTED))}."

    def _too_much(self, phase: str, measured: Measured) -> str:
        return _too_much(phase, measured, of_several=self.sharding.world_size > 1)

    def _report(self, phase: str, measured: Measured, pending: int) -> dict[str, Any]:
        assert measured.needed is not None
        what, work = measured.what, "gradients and activations" if measured.what["step"] else "activations"
        where = f"step {what['step']:,}: " if what["step"] else ""
        where = f"rank {measured.rank}, {where}" if self.sharding.world_size > 1 else where
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


def fullest(measured: Measured) -> Measured:
    """Of what all processes have measured, by what is left."""
    return min(from_all(measured), key=lambda each: -1 if each.needed is None else each.available - each.needed)


def _too_much(phase: str, measured: Measured, *, of_several: bool) -> str:
    """What does not fit, and by how much."""
    what = measured.what
    phase, batch = f"{phase} of rank {measured.rank}" if of_several else phase, ""
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
        "rank": measured.rank,
    }


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:,.1f} MiB"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
