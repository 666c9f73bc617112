"""Some steps recorded with torch.profiler."""

from __future__ import annotations

import logging
from typing import Any

import torch
from transformers import TrainerCallback

from eft.callbacks.context import CallbackContext
from eft.config.root import TrainConfig

logger = logging.getLogger(__name__)


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
