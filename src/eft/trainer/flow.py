"""When to log, evaluate, save and stop: from the plan, not from Trainer's idea of an epoch (DESIGN D1, D13)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from eft.config.root import TrainConfig
from eft.trainer.parts import FlowRules, PlanLike


def flow_rules(config: TrainConfig) -> FlowRules:
    """When to log, evaluate and save, with the defaults that users expect: each epoch, where nothing else is said."""
    save_strategy = config.save_strategy or ("steps" if config.save_steps is not None else "epoch")
    saves_per_epoch = config.saves_per_epoch
    if saves_per_epoch is None and save_strategy == "epoch":
        saves_per_epoch = 1
    eval_strategy = config.eval_strategy or ("steps" if config.eval_steps is not None else "epoch")
    evals_per_epoch = config.evals_per_epoch
    if evals_per_epoch is None and eval_strategy == "epoch":
        evals_per_epoch = 1
    saving, evaluating = save_strategy != "no", eval_strategy != "no"
    best = save_strategy == "best" or config.load_best_model_at_end
    return FlowRules(
        logging_steps=config.logging_steps,
        eval_every=config.eval_steps if evaluating else None,
        evals_per_epoch=evals_per_epoch if evaluating and config.eval_steps is None else None,
        save_every=config.save_steps if saving else None,
        saves_per_epoch=saves_per_epoch if saving and config.save_steps is None else None,
        save_first_step=config.save_first_step and saving,
        save_at_end=saving,
        save_best=best and saving,
    )


def marks(every: float | None, per_epoch: int | None, epoch_ends: list[int], total_steps: int) -> frozenset[int]:
    """The steps at which something periodic happens.

    `every` ≥ 1 is a number of steps, below 1 a share of all steps; `per_epoch` splits every epoch evenly, its last mark
    being the epoch's last step. Both None: never.
    """
    if every is not None:
        # Through the decimal text: 0.07 of 100 steps are 7 steps, and 0.07 × 100 is above 7 in binary.
        interval = int(every) if every >= 1 else math.ceil(Fraction(str(every)) * total_steps)
        return frozenset(range(interval, total_steps + 1, interval))
    if per_epoch is None:
        return frozenset()
    result = set()
    for start, end in zip([0, *epoch_ends], epoch_ends, strict=False):
        for part in range(1, per_epoch + 1):
            result.add(start + math.ceil((end - start) * part / per_epoch))
    result.discard(0)
    return frozenset(result)


@dataclass(frozen=True)
class Flow:
    """The steps at which the run logs, evaluates and saves, and where it ends."""

    logging_steps: int
    evaluate_at: frozenset[int]
    save_at: frozenset[int]
    total_steps: int
    save_best: bool


def make_flow(rules: FlowRules, epoch_ends: list[int], total_steps: int, has_eval: bool) -> Flow:
    """Turn the rules into steps. The end of the run is always evaluated and saved when there is a strategy for it."""
    ends = [step for step in epoch_ends if step <= total_steps]
    if not ends or ends[-1] != total_steps:
        ends = [*ends, total_steps]
    evaluate_at: frozenset[int] = frozenset()
    if has_eval and (rules.eval_every is not None or rules.evals_per_epoch is not None):
        # Also where the interval is longer than the run.
        evaluate_at = marks(rules.eval_every, rules.evals_per_epoch, ends, total_steps) | {total_steps}
    save_at = marks(rules.save_every, rules.saves_per_epoch, ends, total_steps)
    if rules.save_first_step:
        save_at |= {1}
    if rules.save_at_end:
        save_at |= {total_steps}
    return Flow(rules.logging_steps, evaluate_at, save_at, total_steps, rules.save_best)


class FlowCallback(TrainerCallback):
    """Replaces Trainer's DefaultFlowCallback. Also keeps `state.epoch` right, which Trainer restarts on resume."""

    def __init__(self) -> None:
        self.plan: PlanLike | None = None
        self.flow: Flow | None = None

    def follow(self, plan: PlanLike, flow: Flow) -> None:
        """Use this plan from now on (a new one is made by every `train()`)."""
        self.plan, self.flow = plan, flow

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Set what is due after this optimizer step."""
        assert self.plan is not None
        assert self.flow is not None
        step = state.global_step
        state.epoch = self.plan.epoch_at(step)
        last = step >= self.flow.total_steps
        control.should_log |= last or step == 1 or step % self.flow.logging_steps == 0
        control.should_evaluate |= step in self.flow.evaluate_at
        control.should_save |= step in self.flow.save_at
        control.should_training_stop |= last
        return control

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> TrainerControl:
        """Save what is better than ever before, where the best weights are wanted."""
        if self.flow is not None and self.flow.save_best and state.global_step > 0:
            name = args.metric_for_best_model or ""
            value = (metrics or {}).get(name if name.startswith("eval_") else f"eval_{name}", math.nan)
            # Upstream's comparison, which it makes only after this event; NaN is never better.
            worst = -math.inf if args.greater_is_better else math.inf
            best = worst if state.best_metric is None else state.best_metric
            control.should_save |= value > best if args.greater_is_better else value < best
        return control
