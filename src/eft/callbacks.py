"""Callbacks of a run: which are used (CALLBACKS: a predicate on the config and a factory each), and what they do.

Metrics trackers (TensorBoard, W&B, MLflow, Trackio) are Trainer's own, switched on by `report_to`.
"""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from rich.control import Control
from rich.segment import ControlType
from transformers import EarlyStoppingCallback, TrainerCallback

from eft.config.root import TrainConfig
from eft.core.errors import PromiseBroken
from eft.core.records import PromiseResult
from eft.models.compile import CompileCounts
from eft.models.probes import TrainedTensorAudit
from eft.optim.optimizers import silent_steps
from eft.optim.schedulers import warmup_of
from eft.runtime.metrics import MetricsWriter

logger = logging.getLogger(__name__)

AUDIT_STEP = 3
"""LoRA's A factor has no gradient while B is zero, so one step is too early to expect every tensor to have moved."""


COMPILED_BY = 10
"""By this step of a run the rows have shown what they are like, and nothing should be compiled any more."""


@dataclass
class RunOutcome:
    """How the run ended, and what was proven on the way; filled by callbacks, read by `run.train`."""

    reason: str = "finished"
    signal_number: int | None = None
    failed: bool = False
    """The weights are not worth exporting: the watchdog stopped the run."""
    promises: list[PromiseResult] = field(default_factory=list)


@dataclass(frozen=True)
class CallbackContext:
    """What callbacks need of the run."""

    output_dir: Path
    outcome: RunOutcome
    check_keys_read: Callable[[], PromiseResult]
    """Promise E8, asked when everything has been set up."""
    console: Console | None
    """Where the progress line goes; None: nowhere."""


class MetricsFile(TrainerCallback):
    """Writes every logged row to metrics.jsonl, each step once, also across resumes."""

    def __init__(self, config: TrainConfig, context: CallbackContext) -> None:
        self.folder = context.output_dir
        self.with_rates = config.include_tkps
        self.writer: MetricsWriter | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Drop rows of steps that a killed run logged after its last checkpoint."""
        if state.is_world_process_zero:
            self.writer = MetricsWriter(self.folder, resume_step=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """One JSON line."""
        if self.writer is None or not logs or "train_runtime" in logs:
            return
        row = {name: value for name, value in logs.items() if self.with_rates or "per_second" not in name}
        self.writer.write({"step": state.global_step, **row})


class ProgressLine(TrainerCallback):
    """One line: step, loss, learning rate, tokens/s, time left. Redrawn in place on a terminal, sparse elsewhere."""

    def __init__(self, config: TrainConfig, context: CallbackContext) -> None:
        assert context.console is not None
        self.console = context.console
        self.start = time.monotonic()
        self.first_step = 0
        self.last_print = -math.inf
        self.is_open = False
        """Whether the line on the terminal is still to be redrawn or ended."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self.start, self.first_step = time.monotonic(), state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Redraw after every logged step, every ten seconds where lines cannot be redrawn."""
        if not state.is_world_process_zero or not logs:
            return
        if "eval_loss" in logs:
            self._print(f"step {state.global_step:,}  held-out loss {logs['eval_loss']:.4f}", stay=True)
        elif "loss" in logs:
            last = state.global_step >= args.max_steps
            if self.console.is_terminal or last or time.monotonic() - self.last_print > 10:
                self._print(self._line(args.max_steps, state.global_step, logs), stay=last)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the line of a run that stopped early."""
        if self.is_open:
            self.console.print()
            self.is_open = False

    def _line(self, total: int, step: int, logs: dict[str, Any]) -> str:
        elapsed = time.monotonic() - self.start
        left = elapsed / max(step - self.first_step, 1) * (total - step)
        rate = f"  {logs['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in logs else ""
        return (
            f"step {step:,}/{total:,}  epoch {logs.get('epoch', 0.0):.2f}  loss {logs['loss']:.4f}  "
            f"lr {logs['learning_rate']:.2e}{rate}  {_clock(left)} left"
        )

    def _print(self, text: str, *, stay: bool) -> None:
        self.last_print = time.monotonic()
        if self.console.is_terminal:
            # As control codes, because rich strips them off texts; cut, because a wrapped line cannot be redrawn.
            self.console.control(Control(ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 2)))
            text = text[: self.console.width - 1]
            self.is_open = not stay
        self.console.print(text, end="" if self.is_open else "\n", highlight=False, soft_wrap=True)


class StopOnSignal(TrainerCallback):
    """Ctrl-C and SIGTERM: finish the step, write a full checkpoint, stop. A second signal stops at once."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, config: TrainConfig, context: CallbackContext) -> None:
        self.outcome = context.outcome
        self.before: dict[int, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the signals over; only the main thread may."""
        self.outcome.signal_number, self.outcome.reason, self.outcome.failed = None, "finished", False
        try:
            self.before = {number: signal.signal(number, self._remember) for number in self.SIGNALS}
        except ValueError:
            self.before = {}

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.outcome.signal_number is not None:
            raise KeyboardInterrupt
        self.outcome.signal_number = number

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Save and stop at the first step boundary after the signal."""
        if self.outcome.signal_number is not None and state.global_step < args.max_steps:
            self.outcome.reason = f"stopped by {signal.Signals(self.outcome.signal_number).name}"
            # No extra row in the log: the open logging window goes into the checkpoint (E3).
            control.should_save = control.should_training_stop = True
        return control

    def release(self) -> None:
        """Give the signals back."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}


class LossWatchdog(TrainerCallback):
    """Stops a run whose loss stays above a threshold, or is not a number, for `patience` logged losses in a row."""

    def __init__(self, config: TrainConfig, context: CallbackContext) -> None:
        assert config.loss_watchdog_threshold is not None
        self.threshold = config.loss_watchdog_threshold
        self.patience = config.loss_watchdog_patience
        self.outcome = context.outcome
        self.bad = 0

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        """Judge each training loss once."""
        if not logs or "loss" not in logs:
            return control
        # NaN compares false with everything, so ask for what is good.
        self.bad = 0 if logs["loss"] <= self.threshold else self.bad + 1
        if self.bad >= self.patience:
            self.outcome.reason = (
                f"loss watchdog: loss {logs['loss']:.4g} above {self.threshold:g} for {self.bad} logged steps"
            )
            self.outcome.failed = True
            control.should_training_stop = True
        return control


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


class Profiler(TrainerCallback):
    """Records some steps with torch.profiler; the Chrome trace goes to `output_dir`/profile."""

    def __init__(self, config: TrainConfig, context: CallbackContext) -> None:
        assert config.profiler_steps is not None
        self.first = config.profiler_steps_start
        self.count = config.profiler_steps
        self.path = context.output_dir / "profile" / "trace.json"
        self.profile: torch.profiler.profile | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start at the first profiled step."""
        if self.profile is None and state.global_step == self.first:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self.profile = torch.profiler.profile(activities=activities)
            self.profile.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop after the last one and write the trace."""
        if self.profile is not None and state.global_step >= self.first + self.count:
            self._write()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say so where the run never came to the first profiled step."""
        if self.profile is None and self.first >= state.global_step:
            logger.warning("profiler_steps_start: %d, but the run ended at step %d", self.first, state.global_step)

    def release(self) -> None:
        """Write what there is when the run ends earlier."""
        if self.profile is not None:
            self._write()

    def _write(self) -> None:
        assert self.profile is not None
        self.profile.stop()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.profile.export_chrome_trace(str(self.path))
        self.profile = None
        self.first = -1


class CompileReport(TrainerCallback):
    """Says what `torch_compile` has compiled, and warns when it does not come to an end."""

    def __init__(self, config: TrainConfig, context: CallbackContext) -> None:
        self.console = context.console
        self.start = self.last = CompileCounts.now()
        self.first_step = 0
        self.is_over = False
        """Whether a warning was given; one is enough."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count from here."""
        self.start = self.last = CompileCounts.now()
        self.first_step, self.is_over = state.global_step, False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Print the counts once the first rows are through; later ones should not change them."""
        done, now = state.global_step - self.first_step, CompileCounts.now()
        if done in (1, COMPILED_BY) or (state.global_step == args.max_steps and done < COMPILED_BY):
            self._say(state.global_step, now.since(self.start))
        elif done > COMPILED_BY and now.graphs > self.last.graphs and not self.is_over:
            self.is_over = True
            logger.warning(
                "torch_compile: still compiling at step %d (%d graphs since step %d); TORCH_LOGS=recompiles shows why",
                state.global_step,
                now.since(self.start).graphs,
                self.first_step,
            )
        self.last = now

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluation has graphs of its own, without gradients."""
        self.last = CompileCounts.now()

    def _say(self, step: int, counts: CompileCounts) -> None:
        breaks = counts.breaks.total()
        text = f"torch_compile: {counts.graphs} graphs, {breaks} graph breaks after step {step:,}"
        logger.info("%s%s", text, "".join(f"; {reason}" for reason in counts.breaks))
        if self.console is not None:
            self.console.print(text, highlight=False)


class StartChecks(TrainerCallback):
    """At the first step: every key the user set was read (E8). After step 3: what should train trains, nothing else."""

    def __init__(self, config: TrainConfig, context: CallbackContext) -> None:
        self.config = config
        self.context = context
        self.audit: TrainedTensorAudit | None = None
        self.audit_at = 0
        self.certain_at = 0
        """From this step on a tensor that never changed is at fault, whatever the reason."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Check the config, remember the weights."""
        self._record(self.context.check_keys_read())
        # Asked only now: looking at keys here must not count as using them.
        quiet = max(state.global_step, silent_steps(self.config))
        self.audit_at = quiet + AUDIT_STEP
        self.certain_at = max(quiet, warmup_of(self.config, args.max_steps)) + AUDIT_STEP
        if self.audit_at <= args.max_steps:
            self.audit = TrainedTensorAudit(model)
            self.audit.start()

    def on_step_end(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Compare; once more after the warm-up where its first learning rates may be too small to tell."""
        if self.audit is None or state.global_step < self.audit_at:
            return
        result = self.audit.check()
        if state.global_step < self.certain_at and result.numbers["moved"] == 0 and self._is_rounded(model, optimizer):
            self.audit_at = self.certain_at
            return
        if result.status == "fail" and self.config.bfloat16 and result.numbers["moved"] == 0:
            result = self._kept_in_fp32(result, model, optimizer)
        self.audit = None
        self._record(result)

    def _kept_in_fp32(self, result: PromiseResult, model: Any, optimizer: Any) -> PromiseResult:
        """In bf16 a tensor may take long to show its first update; none is lost meanwhile (`bf16_update`)."""
        if not self._is_rounded(model, optimizer):
            return result
        idle = int(result.numbers["idle"])
        detail = f"{idle} of {int(result.numbers['trainable'])} tensors were updated by less than a bf16 step so far"
        return PromiseResult(result.promise, result.title, "pass", detail, result.numbers)

    def _is_rounded(self, model: Any, optimizer: Any) -> bool:
        """Whether some tensors did get gradients, only that their updates were below the last bit of their weights."""
        assert self.audit is not None
        parameters, updated = dict(model.named_parameters()), optimizer.state
        # Optimizers keep state from a parameter's first gradient on; plain SGD keeps none, and cannot tell.
        return bool(self.audit.idle) and all(not updated or parameters[name] in updated for name in self.audit.idle)

    def _record(self, result: PromiseResult) -> None:
        self.context.outcome.promises.append(result)
        if result.status == "fail":
            raise PromiseBroken(f"{result.promise} {result.title}: {result.detail}")


Factory = Callable[[TrainConfig, CallbackContext], TrainerCallback]

CALLBACKS: tuple[tuple[Callable[[TrainConfig, CallbackContext], bool], Factory], ...] = (
    (lambda config, context: True, StartChecks),
    (lambda config, context: True, StopOnSignal),
    (lambda config, context: config.torch_compile, CompileReport),
    (lambda config, context: config.loss_watchdog_threshold is not None, LossWatchdog),
    (
        lambda config, context: config.early_stopping_patience is not None,
        lambda config, context: EarlyStopping(config.early_stopping_patience or 1, context.outcome),
    ),
    (lambda config, context: config.profiler_steps is not None, Profiler),
    (lambda config, context: True, MetricsFile),
    (lambda config, context: context.console is not None, ProgressLine),
)
"""In the order in which they are called."""


def build_callbacks(config: TrainConfig, context: CallbackContext) -> Iterable[TrainerCallback]:
    """The callbacks that this config asks for."""
    return [factory(config, context) for wanted, factory in CALLBACKS if wanted(config, context)]


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
