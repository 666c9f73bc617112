"""Ends before the last step: because somebody asks for it, or because the model no longer gets better."""

from __future__ import annotations

import logging
from typing import Any

from transformers import EarlyStoppingCallback, TrainerCallback

from eft.callbacks.context import CallbackContext, RunOutcome
from eft.config.root import TrainConfig
from eft.parallel.group import is_first_rank
from eft.runtime.stop import EvaluationStopped, StopRequest, stop_file_of

logger = logging.getLogger(__name__)


class StopOnRequest(TrainerCallback):
    """Signals and the stop file: finish the step, write a full checkpoint, stop. A second signal stops at once.

    An evaluation is given up, and made again by the continued run; a save that is under way is finished and is the
    last. So no step is lost, and the run stops as soon as a checkpoint of its last step is on the disk.
    """

    def __init__(self, config: TrainConfig, context: CallbackContext) -> None:
        self.outcome = context.outcome
        self.request = StopRequest(
            stop_file_of(config.stop_file, config.output_dir), looks_for_file=is_first_rank(), agree=context.agree
        )
        self.step = self.saved_step = 0
        self.is_over = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Listen from here on."""
        self.outcome.start()
        self.step = self.saved_step = state.global_step
        self.is_over = False
        self.request.listen()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Save and stop at the first step boundary after the request; a run that is over anyway ends as it would."""
        self.step = state.global_step
        is_over = control.should_training_stop or state.global_step >= args.max_steps
        if self.request.is_agreed() and not is_over:
            self._stop(control)
            # No extra row in the log: the open logging window goes into the checkpoint (E3).
            control.should_save, control.should_evaluate = True, False
        return control

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Whoever asks may not have the patience for an evaluation; the trainer saves instead."""
        if self.request.is_listening and self.request.is_agreed():
            self._stop(control)
            raise EvaluationStopped

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """What was just written is all that is wanted where the request came during a save."""
        self.saved_step = state.global_step
        can_go_on = not args.save_only_model and state.global_step < args.max_steps
        if self.request.is_agreed() and can_go_on and not control.should_training_stop:
            self._stop(control)
        return control

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Not reached by a run that is stopped at once."""
        self.is_over = True

    def _stop(self, control: Any) -> None:
        self.outcome.reason, self.outcome.exit_code = f"stopped by {self.request.reason}", self.request.code
        control.should_training_stop = True

    def release(self) -> None:
        """Give the signals back."""
        lost = self.step - self.saved_step
        if self.request.code and lost and not self.is_over:
            logger.warning("stopped at once: %d steps since the last checkpoint are lost", lost)
        self.request.release()


class EarlyStopping(EarlyStoppingCallback):
    """Upstream's, which also tells why the run ended."""

    def __init__(self, early_stopping_patience: int, outcome: RunOutcome | None = None) -> None:
        super().__init__(early_stopping_patience)
        self.outcome = outcome or RunOutcome()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count anew in a new run; do not go on with one that had been stopped when its checkpoint was written."""
        super().on_train_begin(args, state, control, **kwargs)
        if state.global_step == 0:
            self.early_stopping_patience_counter = 0
        control.should_training_stop |= self._is_over(args)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        """Count evaluations without a better metric."""
        if f"eval_{args.metric_for_best_model.removeprefix('eval_')}" not in metrics:
            return  # one of several held-out sets, and not the one that decides
        super().on_evaluate(args, state, control, metrics, **kwargs)
        self._is_over(args)

    def _is_over(self, args: Any) -> bool:
        if self.early_stopping_patience_counter < self.early_stopping_patience:
            return False
        metric, patience = args.metric_for_best_model, self.early_stopping_patience
        self.outcome.reason = f"early stopping: {metric} has not improved for {patience} evaluations"
        return True
