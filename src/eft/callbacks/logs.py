"""The numbers of a run as they come: into metrics.jsonl, and as one line on the terminal."""

from __future__ import annotations

import math
import time
from typing import Any

from rich.control import Control
from rich.segment import ControlType
from transformers import TrainerCallback

from eft.callbacks.context import CallbackContext
from eft.config.root import TrainConfig
from eft.runtime.metrics import MetricsWriter


class MetricsFile(TrainerCallback):
    """Writes every logged row to metrics.jsonl, each step once, also across resumes."""

    def __init__(self, config: TrainConfig, context: CallbackContext) -> None:
        self.folder = context.output_dir
        self.console = context.console
        self.with_rates = config.include_tkps
        self.writer: MetricsWriter | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Drop rows of steps that a killed run logged after its last checkpoint, and say how many those are."""
        if not state.is_world_process_zero:
            return
        step = state.global_step
        evaluated = any(row["step"] == step and "eval_loss" in row for row in state.log_history)
        self.writer = MetricsWriter(self.folder, resume_step=step, keep_evaluation=evaluated)
        if self.writer.lost_steps and self.console is not None:
            lost = f"{self.writer.lost_steps:,} steps after checkpoint-{step} are trained again: they were not saved."
            self.console.print(lost, highlight=False)

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


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
