"""What stands between a step's gradients and its update: the watchdog's decisions, carried out in the training loop."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl

from eft.config.logging import LoggingConfig
from eft.data.sample_set import SampleSet
from eft.parallel.state_dict import whole_tensor
from eft.runtime.watchdog import ROLLBACKS, LateNumbers, Verdict, Watchdog, WatchRules

if TYPE_CHECKING:
    from eft.trainer.trainer import EftTrainer

logger = logging.getLogger(__name__)

ROWS_NAMED = 8


class StepGuard(TrainerCallback):
    """Judges every step before its update, leaves updates out, ends the training where it cannot go on."""

    def __init__(self, trainer: EftTrainer, watchdog: Watchdog) -> None:
        self.trainer = trainer
        self.watchdog = watchdog
        self.verdict: Verdict | None = None
        """Why the last training ended, where a fault ended it."""
        self._numbers = LateNumbers()
        self._step = 0
        self._loss_before: Tensor | None = None
        self._held: list[dict[str, Any]] | None = None
        self._masked: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Judge anew."""
        self.verdict, self._held, self._masked, self._step = None, None, None, 0
        self._numbers.clear()

    def begins(self, step: int) -> bool:
        """A micro-batch of `step` (1-based) is next; returns whether it is passed over, without a forward pass."""
        if step != self._step:
            self._step = step
            rules = self.watchdog.rules
            if rules.skips or rules.threshold is not None:
                self._loss_before = self.trainer._tr_loss.clone()
        return bool(self.watchdog.left_out) and self.watchdog.is_passed_over(step)

    def judge(self, norm: Any) -> None:
        """All gradients of the step are there, and the update comes next. `norm`: of all gradients, a scalar."""
        watchdog, trainer = self.watchdog, self.trainer
        if watchdog.left_out and watchdog.is_passed_over(self._step):
            self._hold()
            return
        if not watchdog.rules.is_on:
            return
        loss = trainer._tr_loss if self._loss_before is None else trainer._tr_loss - self._loss_before
        if self._loss_before is not None and trainer.accelerator.num_processes > 1:
            loss = trainer.accelerator.reduce(loss, reduction="mean")
        # A loss scaler meets infinite gradients all the time, on purpose.
        has_norm = trainer.parts.has_gradient_norm and trainer.accelerator.scaler is None
        norm = whole_tensor(torch.as_tensor(norm, device=loss.device)) if has_norm else loss
        self._numbers.send(self._step, torch.stack([loss.float(), norm.float()]))
        if watchdog.rules.skips:
            self._leave_out_if(watchdog.rules.faulty(loss, norm))

    def _leave_out_if(self, fault: Tensor) -> None:
        """Mask the update on the device where the optimizer can; elsewhere the host looks, which on a GPU waits."""
        trainer, optimizer = self.trainer, self.trainer.plain_optimizer()
        assert self._loss_before is not None
        if fault.is_cuda and getattr(optimizer, "_step_supports_amp_scaling", False):
            # What a loss scaler hands to torch's fused optimizers: their kernels then write nothing.
            optimizer.grad_scale, optimizer.found_inf = None, fault.float()
            self._masked = optimizer
        elif not bool(fault):
            return
        else:
            self._hold()
        trainer._tr_loss.copy_(torch.where(fault, self._loss_before, trainer._tr_loss))

    def _hold(self) -> None:
        """Without gradients a step of the optimizer changes nothing but what it counts per group."""
        self.trainer.model_wrapped.zero_grad(set_to_none=True)
        groups = self.trainer.plain_optimizer().param_groups
        self._held = [{name: value for name, value in group.items() if name != "params"} for group in groups]

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the counts back."""
        if self._held is not None:
            for group, before in zip(self.trainer.plain_optimizer().param_groups, self._held, strict=True):
                for name in group.keys() - before.keys() - {"params"}:
                    del group[name]
                group.update(before)
            self._held = None
        if self._masked is not None:
            del self._masked.grad_scale, self._masked.found_inf
            self._masked = None

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        """Judge what has arrived: the step before, and this one before it is saved, evaluated or logged."""
        step = int(state.global_step)
        settles = control.should_save or control.should_evaluate or control.should_log or step >= args.max_steps
        for number, (loss, norm) in self._numbers.receive(step + 1 if settles else step):
            known = len(self.watchdog.left_out)
            self.verdict = self.watchdog.judge(number, loss, norm)
            for entry in self.watchdog.left_out[known:]:
                logger.warning("%s; its update was left out. %s", entry.why, self._rows(entry.step))
            if self.verdict is not None:
                control.should_save = control.should_evaluate = False
                control.should_training_stop = True
                logger.warning("%s. %s", self.verdict.why, self._rows(number))
                if self.verdict.action == "stop":
                    self.watchdog.fail(self.verdict.why)
                break
        return control

    def checkpoint_to_return_to(self) -> str | None:
        """After a training: the checkpoint from which to go on, past the data at fault; None: it is really over."""
        verdict, trainer = self.verdict, self.trainer
        if verdict is None or verdict.action != "rollback":
            return None
        store = trainer.parts.checkpoint
        store.wait()
        first = verdict.steps[0]
        found = store.newest_complete(before=first).path
        if found is None or self.watchdog.rollbacks >= ROLLBACKS:
            lack = "no complete checkpoint lies before it" if found is None else f"{ROLLBACKS} returns are enough"
            self.watchdog.fail(f"{verdict.why}; {lack}")
            return None
        store.set_aside(first)
        self.watchdog.pass_over(verdict)
        numbers = ", ".join(f"{step:,}" for step in verdict.steps)
        logger.warning("going back to %s; the data of step %s will be passed over", found.name, numbers)
        return str(found)

    def ledger(self) -> list[dict[str, Any]]:
        """Every step that changed nothing, with the samples that were not trained on; for ledger.json."""
        entries = []
        for entry in sorted(self.watchdog.left_out, key=lambda entry: entry.step):
            ids, tokens = self._samples(entry.step)
            facts = {"step": entry.step, "how": entry.how, "why": entry.why, "tokens": tokens}
            entries.append({**facts, "samples": ids, "rows": [self._origin(index) for index in ids]})
        return entries

    def _rows(self, step: int) -> str:
        ids, _ = self._samples(step)
        named = ", ".join(self._origin(index) for index in ids[:ROWS_NAMED])
        more = f" and {len(ids) - ROWS_NAMED:,} more" if len(ids) > ROWS_NAMED else ""
        return f"Its samples: {named}{more}." if ids else ""

    def _samples(self, step: int) -> tuple[list[int], int]:
        """The samples of a step, none where a stream no longer knows them, and its tokens."""
        assert self.trainer.plan is not None
        planned = self.trainer.plan.step(step - 1)
        return [int(index) for ids in planned.bins for index in ids], int(planned.tokens)

    def _origin(self, index: int) -> str:
        assert self.trainer.plan is not None
        dataset = self.trainer.plan.dataset
        return str(dataset.origin(index)) if isinstance(dataset, SampleSet) else f"sample {index}"


def watch_rules(config: LoggingConfig) -> WatchRules:
    """Which steps are at fault, and what follows."""
    if config.loss_watchdog_threshold is None:
        return WatchRules(config.nonfinite_action)
    return WatchRules(
        config.nonfinite_action,
        config.loss_watchdog_action,
        config.loss_watchdog_threshold,
        config.loss_watchdog_patience,
    )
