"""What `torch_compile` has compiled, said once, and again where it does not come to an end."""

from __future__ import annotations

import logging
from typing import Any

from transformers import TrainerCallback

from eft.callbacks.context import CallbackContext
from eft.config.root import TrainConfig
from eft.models.compile import CompileCounts

logger = logging.getLogger(__name__)

COMPILED_BY = 10
"""By this step of a run the rows have shown what they are like, and nothing should be compiled any more."""


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
