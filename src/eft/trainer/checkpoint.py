"""CheckpointSaveMixin: checkpoints that are wholly there or not there, without pickles (D17)."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from eft.core.errors import CheckpointError
from eft.runtime.stop import EvaluationStopped
from eft.trainer.hooks import TrainerHooks

SCHEDULER_FILE = "scheduler.json"
SCALER_FILE = "scaler.json"
PROGRESS_FILE = "progress.json"
STATE_FILE = "trainer_state.json"
PROBE_TOKENS = 64
"""Of the document that a save is tried on."""


class CheckpointSaveMixin(TrainerHooks):
    """Owns the whole of saving and loading; upstream's writes in place and restarts silently when a part is missing."""

    def _maybe_log_save_evaluate(
        self,
        tr_loss: Tensor,
        grad_norm: Tensor | float | None,
        model: nn.Module,
        trial: Any,
        epoch: float,
        ignore_keys_for_eval: list[str] | None,
        start_time: float,
        learning_rate: float | None = None,
    ) -> None:
        """Upstream's, after every step; a save beside the training that failed ends the run here, not at the next."""
        self.parts.checkpoint.raise_failure()
        numbers = (tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, learning_rate)
        try:
            super()._maybe_log_save_evaluate(*numbers)
        except EvaluationStopped:
            # What is logged stays logged; the checkpoint comes now, the evaluation when the run is continued.
            self.control.should_evaluate, self.control.should_save = False, True
            super()._maybe_log_save_evaluate(*numbers)

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        """Write `checkpoint-<step>` atomically: weights, optimizer, schedule, generators, progress, trainer state.

        Every process takes part, each with its share of the tensors and its own generators.
        """
        step = int(self.state.global_step)
        self.store_flos()
        best = self.state.best_global_step
        if best and (best == step or self.parts.checkpoint.path(best).is_dir()):
            self.state.best_model_checkpoint = str(self.parts.checkpoint.path(best))
        # A run that is being stopped is to be continued, whatever `save_only_model` says.
        stopping = self.control.should_training_stop and step < self.args.max_steps
        resumable = stopping or not self.args.save_only_model
        extra = {"resumable": resumable, "config": self.parts.fingerprint, "plan": self.plan.fingerprint}
        # Only a resumed run can come to a step that it has saved before.
        keep = self._initial_global_step > 0
        with self.parts.meter.paused():
            check = None
            # Of a model in parts no process can compute alone: all give theirs.
            takes_part = self.args.should_save or self.parts.parallel.is_sharded
            if self.parts.probe_save is not None and takes_part:
                ids = [int(token) for token in self.plan.dataset.sample(0).input_ids[:PROBE_TOKENS]]
                facts, check = self.parts.probe_save(self.model, self.processing_class, ids)
                extra |= facts
            fill = partial(self._fill_checkpoint, resumable=resumable)
            self.parts.checkpoint.save(step, best, extra, keep=keep, fill=fill, check=check)
            self.accelerator.wait_for_everyone()

    def _fill_checkpoint(self, draft: Any, *, resumable: bool) -> None:
        self.parts.checkpoint.add_weights(draft, self.model)
        if self.processing_class is not None:
            draft.add_files(self.processing_class.save_pretrained)
        if resumable:
            self.parts.checkpoint.add_optimizer(draft, self.model, self.plain_optimizer())
            draft.add_json(SCHEDULER_FILE, self.lr_scheduler.state_dict())
            if self.accelerator.scaler is not None:
                draft.add_json(SCALER_FILE, self.accelerator.scaler.state_dict())
            self.parts.add_rng(draft)
        draft.add_json(PROGRESS_FILE, self.progress_state())
        self.state.stateful_callbacks = self.callback_states()
        draft.add_json(STATE_FILE, asdict(self.state))

    def check_parts(self, folder: Path) -> None:
        """Raise CheckpointError where `folder` lacks something that a resumed run needs, before anything is loaded."""
        if not (folder / SCHEDULER_FILE).is_file():
            raise CheckpointError(
                f"{folder}: holds no optimizer state, so it cannot be resumed (was it written with `save_only_model`?)."
                " To start a new run from these weights, set `base_model` to this folder."
            )
        for name in (PROGRESS_FILE, STATE_FILE):
            _read_json(folder / name)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Put the checkpoint's weights, bit for bit, into the live model."""
        self.parts.checkpoint.load_weights(Path(resume_from_checkpoint), self.model if model is None else model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Restore both, or raise: a missing part never means a fresh start."""
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        self.parts.checkpoint.load_optimizer(folder, self.model, self.plain_optimizer())
        schedule = _read_json(folder / SCHEDULER_FILE)
        if self.parts.checkpoint.allow_change:
            self.parts.checkpoint.place_scheduler(self.lr_scheduler, schedule["last_epoch"])
        else:
            self.lr_scheduler.load_state_dict(schedule)
        self._find_best_model(folder.parent)

    def _load_scaler(self, checkpoint: str | None) -> None:
        """The scale of fp16's losses, without a pickle."""
        if checkpoint is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(_read_json(Path(checkpoint, SCALER_FILE)))

    def _find_best_model(self, elsewhere: Path) -> None:
        """Name the best checkpoint where it lies now: in this run's folder, or beside the one that is resumed.

        Raises:
            CheckpointError: `load_best_model_at_end` will need it and it is gone.
        """
        best = self.state.best_global_step
        if not best:
            return
        own = self.parts.checkpoint.path(best)
        found = next((path for path in (own, elsewhere / own.name) if path.is_dir()), None)
        if found is None and self.args.load_best_model_at_end:
            raise CheckpointError(f"{own}: missing; `load_best_model_at_end` needs it, the best model so far.")
        self.state.best_model_checkpoint = None if found is None else str(found)

    def _load_best_model(self) -> None:
        """Put the best checkpoint's weights into the model at the end of the training.

        And its optimizer state: the weights of a schedule-free optimizer are evaluated and exported through it.
        """
        self.parts.checkpoint.wait()
        self.accelerator.wait_for_everyone()
        folder = Path(self.state.best_model_checkpoint)
        self.parts.checkpoint.load_weights(folder, self.model)
        if not self.args.save_only_model:
            self.parts.checkpoint.load_optimizer(folder, self.model, self.plain_optimizer())


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: missing, so the run cannot be continued from here.") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: broken: {error}") from error
    return value
