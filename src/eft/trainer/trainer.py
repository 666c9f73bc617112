"""EftTrainer: the seven mixins over transformers' Trainer, and the hooks that are no mixin's."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, set_seed
from transformers.trainer_callback import DefaultFlowCallback, ExportableState, PrinterCallback, TrainerState
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from eft.core.errors import CheckpointError
from eft.models.probes import require_gradients
from eft.parallel.state_dict import forget_gathered
from eft.runtime.metrics import GroupLosses
from eft.runtime.stop import EvaluationStopped
from eft.trainer.checkpoint import PROGRESS_FILE, STATE_FILE, CheckpointSaveMixin
from eft.trainer.flow import Flow, FlowCallback, make_flow
from eft.trainer.guard import StepGuard
from eft.trainer.offloading import ActivationOffloadingMixin
from eft.trainer.optimizer import OptimizerMixin
from eft.trainer.packing import PackingMixin
from eft.trainer.parallel import DistributedParallelMixin
from eft.trainer.parts import Holder, PlanLike, TrainerParts
from eft.trainer.progress import GLOBAL_BATCH, Progress, load_progress
from eft.trainer.rng import RngLoaderMixin
from eft.trainer.scheduler import SchedulerMixin

_SIMPLE_ENGINES = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


class EftTrainer(
    PackingMixin,
    SchedulerMixin,
    OptimizerMixin,
    RngLoaderMixin,
    CheckpointSaveMixin,
    ActivationOffloadingMixin,
    DistributedParallelMixin,
    Trainer,
):
    """Trains on exactly the batches of a plan, with a loss over trainable tokens that the trainer owns.

    `train_dataset` and `eval_dataset` may be assigned after construction: the plan is made when `train()` starts.
    """

    # `compute_loss` divides by the global Σ weight of the step, so Trainer must not divide by the accumulation again.
    loss_is_scaled_for_ga = True

    def __init__(self, parts: TrainerParts, *, total_num_steps: int | None = None, **kwargs: Any) -> None:
        """
        Args:
            parts: the components.
            total_num_steps: optimizer steps that the caller asked for; None: what the plan gives (D8).
            kwargs: what `transformers.Trainer` takes; `args` must come from `training_args.build_training_arguments`.
        """
        self.parts = parts
        self.total_num_steps = total_num_steps
        self.plan: PlanLike | None = None
        self.totals: dict[str, float] = {}
        """Tokens, trained tokens and seconds of the training, once it is over."""
        self.flow_callback = FlowCallback()
        self.guard = StepGuard(self, parts.watchdog)
        self._unrestored: str | None = None
        """The checkpoint whose progress is still to be restored."""
        self._split_sums: dict[str, tuple[float, float]] = {}
        """(Σ weight · NLL, Σ weight) of the last evaluation of each split, by metric prefix."""
        super().__init__(**kwargs)
        self._evaluates_on_start = bool(self.args.eval_on_start)
        self.remove_callback(DefaultFlowCallback)
        self.remove_callback(PrinterCallback)
        # First, so that every other callback sees what is due at this step, and what is not fit to be saved.
        self.callback_handler.callbacks[:0] = [self.flow_callback, self.guard]

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """Plan the assigned data and train on them.

        Returns:
            TrainOutput with the global step, the mean loss over ALL steps of the run, also those before a resume, and
            the metrics.
        """
        self.make_plan()
        checkpoint = self._named_checkpoint(resume_from_checkpoint)
        # Dropout must not depend on what drew from the generators since the trainer was built.
        set_seed(self.parts.seed)
        self.parts.meter.restore({"tokens": 0, "trained_tokens": 0, "seconds": 0.0})
        try:
            output = self._train_from(checkpoint, **kwargs)
            while (earlier := self.guard.checkpoint_to_return_to()) is not None:
                output = self._train_from(earlier, **kwargs)
        except BaseException:
            self.parts.checkpoint.fail()
            raise
        finally:
            self.parts.checkpoint.wait()
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, Holder):
                    callback.release()
        # Where nothing was left to train, `_run_epoch` restored nothing.
        self._restore_progress()
        self.totals = self.parts.meter.state()
        # `_tr_loss` holds what an early exit left unlogged.
        self.progress.add(float(self._tr_loss), output.global_step)
        mean = self.progress.mean_loss(output.global_step - self.parts.watchdog.count(0, output.global_step))
        return TrainOutput(output.global_step, mean, {**output.metrics, "train_loss": mean})

    def _train_from(self, checkpoint: str | None, **kwargs: Any) -> TrainOutput:
        if checkpoint is not None:
            self.check_parts(Path(checkpoint))
        # The held-out loss of a resumed run's start is in its log already, unless that evaluation was given up.
        first = self._evaluates_on_start if checkpoint is None else self._owes_evaluation(checkpoint)
        self.args.eval_on_start = first and self._has_eval()
        self._unrestored = checkpoint
        return super().train(resume_from_checkpoint=checkpoint, **kwargs)

    def _owes_evaluation(self, checkpoint: str) -> bool:
        """Whether the evaluation at the checkpoint's step is missing: the run was asked to stop meanwhile."""
        state = TrainerState.load_from_json(str(Path(checkpoint, STATE_FILE)))
        done = any(row["step"] == state.global_step and "eval_loss" in row for row in state.log_history)
        return state.global_step in self.flow.evaluate_at and not done

    def _named_checkpoint(self, wanted: str | bool | None) -> str | None:
        """The folder to resume from; True: the newest checkpoint in `output_dir` that is complete."""
        if wanted is not True:
            return str(wanted) if wanted else None
        newest = self.parts.checkpoint.newest_complete().path
        if newest is None:
            raise CheckpointError(
                f"resume_from_checkpoint: true, but {self.args.output_dir} holds no complete checkpoint with an "
                "optimizer's state"
            )
        return str(newest)

    def _has_eval(self) -> bool:
        return self.eval_dataset is not None and len(self.eval_dataset) > 0

    def make_plan(self) -> PlanLike:
        """The plan for what is assigned to `train_dataset` now; made anew when that has changed."""
        plan = self.parts.packing.make_plan(self.train_dataset, self.total_num_steps)
        self.args.max_steps = plan.total_steps
        self.flow_callback.follow(plan, make_flow(self.parts.flow, plan.epoch_ends, plan.total_steps, self._has_eval()))
        self.plan = plan
        self.progress = Progress()
        return plan

    @property
    def flow(self) -> Flow:
        """When this run logs, evaluates and saves; known once the plan is made."""
        assert self.flow_callback.flow is not None
        return self.flow_callback.flow

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | float | None = None,
    ) -> Any:
        """Σ weight · loss of this micro-batch ÷ Σ weight of the whole global batch (E2), fp32 scalar.

        Times the number of ranks over which the engine averages gradients. Logits exist only where
        the outputs are asked for: those of the trained positions.
        """
        logits = None
        if "groups" in inputs:
            groups = inputs["groups"]
            inputs["group_totals"] = self.parts.meter.group_totals(groups.names, groups.weights, self.args.device)
        if return_outputs:
            loss_sum, logits = self.parts.loss.with_logits(model, inputs)
        else:
            loss_sum = self.parts.loss(model, inputs)
        require_gradients(loss_sum, model)
        assert num_items_in_batch is not None, "every batch of ours carries the step's weight"
        self.parts.meter.count(inputs["num_tokens"], inputs["num_trained"])
        # A step of data from elsewhere may train nothing at all: its loss is a connected zero.
        loss = loss_sum * (self.parts.parallel.gradient_ranks / num_items_in_batch if num_items_in_batch else 0.0)
        return (loss, {"logits": logits}) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> float | None:
        """The step's Σ weight over all ranks, which the plan knows: no gather, no device sync (D4)."""
        return batch_samples[0]["step_weight"] if batch_samples else None

    def _run_epoch(
        self,
        model: nn.Module,
        epoch: int,
        train_dataloader: DataLoader[Any],
        steps_in_epoch: int,
        num_update_steps_per_epoch: int,
        trial: Any,
        ignore_keys_for_eval: list[str] | None,
        start_time: float,
        resume_from_checkpoint: str | None,
        epochs_trained: int,
        steps_trained_in_current_epoch: int,
    ) -> None:
        """Upstream's loop over our one loader, after restoring what upstream forgets on resume."""
        if self.control.should_training_stop:
            return  # a callback found at the start that the run was over when the checkpoint was written
        self._restore_progress()
        self._clipped = list(model.parameters())
        if self._is_simple_engine and self.lr_scheduler.optimizer is self.plain_optimizer():
            # The wrapper asks the import system twice per step for a package whose optimizers it treats apart.
            self.optimizer = self.plain_optimizer()
        super()._run_epoch(
            model=model,
            epoch=epoch,
            train_dataloader=train_dataloader,
            steps_in_epoch=steps_in_epoch,
            num_update_steps_per_epoch=num_update_steps_per_epoch,
            trial=trial,
            ignore_keys_for_eval=ignore_keys_for_eval,
            start_time=start_time,
            resume_from_checkpoint=resume_from_checkpoint,
            epochs_trained=epochs_trained,
            steps_trained_in_current_epoch=steps_trained_in_current_epoch,
        )

    def plain_optimizer(self) -> Any:
        """The optimizer itself, out of the wrappers of accelerate and DeepSpeed."""
        plain = self.optimizer.optimizer if isinstance(self.optimizer, AcceleratedOptimizer) else self.optimizer
        return plain.optimizer if isinstance(self.optimizer, DeepSpeedOptimizerWrapper) else plain

    @cached_property
    def _is_simple_engine(self) -> bool:
        """Whether a step is `loss.backward()` and `optimizer.step()`: no loss scaler, no sharding engine."""
        simple = self.accelerator.distributed_type in _SIMPLE_ENGINES and self.args.n_gpu <= 1
        return simple and self.accelerator.scaler is None and not self.parts.parallel.is_sharded

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | float | None = None
    ) -> Tensor:
        """Upstream's, without what only other engines need: on small models that is half of a micro-batch's time."""
        if self.guard.begins(inputs["step"] + 1):
            return torch.zeros((), device=self.args.device)
        if not self._is_simple_engine:
            return super().training_step(model, inputs, num_items_in_batch)  # type: ignore[no-any-return]
        # An evaluation runs the model inside DDP, whose wrapper does not hear of it.
        if not (model.training and self.model.training):
            model.train()
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        del inputs
        self._empty_cache()
        loss.backward()
        return loss.detach()  # type: ignore[no-any-return]

    def _empty_cache(self) -> None:
        every = self.args.torch_empty_cache_steps
        if every is not None and self.state.global_step % every == 0:
            clear_device_cache()

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The batch on this rank's device; a copy out of page-locked memory does not wait for the device."""
        device = self.accelerator.device
        if self.parts.parallel.part_of_row is not None:
            inputs = self.parts.parallel.part_of_row(inputs)
        if device.type == "cpu":
            return inputs
        return {
            name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in inputs.items()
        }

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """Upstream's; where no engine has a way of its own, over a list of parameters that is made once."""
        if not self._is_simple_engine:
            return super()._clip_grad_norm(model)  # type: ignore[no-any-return]
        return nn.utils.clip_grad_norm_(self._clipped, self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Upstream's; it is the last thing before the update, which the guard may hold back."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self.guard.judge(norm)
        return norm

    def progress_state(self) -> dict[str, Any]:
        """What a resumed run needs to log the same numbers: loss sums, the open logging window, token counts."""
        window_loss = float(self._tr_loss)
        return {
            **self.progress.state(),
            "window_loss": window_loss,
            "window_start": self._globalstep_last_logged,
            "meter": self.parts.meter.state(),
            "watchdog": self.parts.watchdog.state(),
            "data": self.parts.packing.state_at(self.plan, self.state.global_step),
            "plan": self.plan.fingerprint if self.plan is not None else "",
            "total_steps": self.plan.total_steps if self.plan is not None else 0,
            GLOBAL_BATCH: self.plan.global_batch_size if self.plan is not None else 0,
        }

    def _restore_progress(self) -> None:
        """Once, before anything of the resumed training is counted."""
        checkpoint, self._unrestored = self._unrestored, None
        if checkpoint is None:
            return
        allow_change = self.parts.checkpoint.allow_change
        saved = load_progress(checkpoint, PROGRESS_FILE, self.plan, allow_change=allow_change)
        self.progress = Progress.from_state(saved)
        self._tr_loss += saved["window_loss"]
        self._globalstep_last_logged = saved["window_start"]
        self.parts.meter.restore(saved["meter"])
        self.parts.watchdog.restore(saved["watchdog"])
        self.parts.packing.restore(self.plan, self.state.global_step, saved.get("data", {}))

    def _load_callback_state(self) -> None:
        """Put the stateful callbacks back to where they were, before they hear that the training begins."""
        for callback in self._stateful_callbacks():
            stored = self.state.stateful_callbacks.get(type(callback).__name__)
            if isinstance(stored, dict):
                for name, value in stored["attributes"].items():
                    setattr(callback, name, value)

    def callback_states(self) -> dict[str, Any]:
        """State of every callback that has one, by class name."""
        return {type(callback).__name__: callback.state() for callback in [*self._stateful_callbacks(), self.control]}

    def _stateful_callbacks(self) -> Iterator[Any]:
        return (callback for callback in self.callback_handler.callbacks if isinstance(callback, ExportableState))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add token rates to a training row, keep the loss of the whole run, pass on to the callbacks."""
        if "loss" in logs:
            steps = self.state.global_step - self.progress.steps
            trained = steps - self.parts.watchdog.count(self.progress.steps, self.state.global_step)
            self.progress.add(logs["loss"] * steps, self.state.global_step)
            if trained < steps:
                logs["loss"] = logs["loss"] * steps / trained if trained else math.nan
            # Upstream subtracts the sum from itself, which leaves NaN where it was not finite.
            self._tr_loss.zero_()
            logs.update(self.parts.meter.group_losses(self._sum_over_processes))
            logs.update(self.parts.meter.rates())
            if not self.parts.has_gradient_norm:
                logs.pop("grad_norm", None)
        logs.setdefault("time", self.parts.meter.seconds)
        super().log(logs, start_time)

    def _sum_over_processes(self, values: Tensor) -> Tensor:
        return self.accelerator.reduce(values, reduction="sum")  # type: ignore[no-any-return]  # accelerate is untyped

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """6 · tokens · parameters (Kaplan et al. 2020); the parameters are counted once, not per micro-batch."""
        if not hasattr(self, "_flops_per_token"):
            self._flops_per_token = 6 * int(self.model.num_parameters(exclude_embeddings=True))
        return int(inputs["num_tokens"]) * self._flops_per_token

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Upstream's; of several named splits also the loss over all of them, which decides which model is best."""
        metrics: dict[str, float] = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        splits = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(splits, dict):
            sums = [self._split_sums[f"{metric_key_prefix}_{name}"] for name in splits]
            whole = _mean_metrics(metric_key_prefix, sum(nll for nll, _ in sums), sum(weight for _, weight in sums))
            each = {name: nll / weight for name, (nll, weight) in zip(splits, sums, strict=True) if weight}
            whole |= {f"{metric_key_prefix}_loss/{name}": loss for name, loss in each.items()}
            self.log(dict(whole))
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, whole)
            metrics.update(whole)
        return metrics

    def _evaluate(
        self, trial: Any, ignore_keys_for_eval: list[str] | None, skip_scheduler: bool = False
    ) -> dict[str, float]:
        """Upstream's; one that is given up leaves no trace, one that is made up for decides about the best model."""
        self._restore_progress()
        states, step = self.callback_states(), self.state.global_step
        try:
            metrics: dict[str, float] = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)
        except EvaluationStopped:
            self.state.stateful_callbacks = states
            self._load_callback_state()
            rows = self.state.log_history
            self.state.log_history = [row for row in rows if row["step"] != step or "loss" in row]
            if not skip_scheduler:
                raise
            return {}  # before the first step of this process: there is nothing to save
        if skip_scheduler and step > 0:
            self._determine_best_metric(metrics, trial)
            self._find_best_model(self.parts.checkpoint.path(step).parent)
        return metrics

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Σ weight · NLL ÷ Σ weight over the whole split (D13); no logits kept, no training generator touched."""
        model = self._evaluation_model()
        device = self.args.device
        total = torch.zeros((), dtype=torch.float64, device=device)
        weight, groups = 0.0, None
        with self.parts.meter.paused(), self.parts.evaluation_weights(self.optimizer):
            forget_gathered(model)
            for batch in dataloader:
                inputs = self._prepare_inputs(batch)
                if "groups" in inputs:
                    groups = groups or GroupLosses(inputs["groups"].names, device)
                    groups.count(inputs["groups"].weights)
                    inputs["group_totals"] = groups.totals
                with torch.no_grad():
                    total += self.parts.evaluation_loss(model, inputs)
                weight = inputs["step_weight"]  # of the whole split, the same in every batch
                self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        forget_gathered(model)
        # Processes that share a batch have all counted it.
        copies = self.accelerator.num_processes // self.parts.parallel.gradient_ranks
        nll = float(self.accelerator.reduce(total, reduction="sum")) / copies
        self._split_sums[metric_key_prefix] = (nll, weight)
        metrics = _mean_metrics(metric_key_prefix, nll, weight)
        if groups is not None:
            read = groups.read(self._sum_over_processes)
            metrics |= {f"{metric_key_prefix}_loss/{name}": loss for name, (loss, _) in read.items()}
        return EvalLoopOutput(
            predictions=None, label_ids=None, metrics=metrics, num_samples=self.num_examples(dataloader)
        )

    def _evaluation_model(self) -> nn.Module:
        """The wrapped model in evaluation mode, prepared for autocast also where nothing was trained yet."""
        # DeepSpeed's autocast is in its wrapper.
        model: nn.Module = self._wrap_model(self.model if self.deepspeed is None else self.deepspeed, training=False)
        if not self.accelerator._models and model is self.model:
            model = self.accelerator.prepare_model(model, evaluation_mode=True)
        model.eval()  # DeepSpeed's returns nothing
        return model


def _mean_metrics(prefix: str, nll: float, weight: float) -> dict[str, float]:
    """Loss and perplexity out of Σ weight · NLL and Σ weight; NaN where nothing is trained."""
    loss = nll / weight if weight > 0 else math.nan
    return {f"{prefix}_loss": loss, f"{prefix}_ppl": math.exp(min(loss, 700.0))}
