"""SchedulerMixin: schedules as closed forms of the exact number of steps."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from eft.trainer.hooks import TrainerHooks


class SchedulerMixin(TrainerHooks):
    """Builds the schedule once per `train()`."""

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler | Any:
        """The schedule over `num_training_steps` optimizer steps; a second `train()` builds a new one."""
        if self.lr_scheduler is None:
            if optimizer is None:
                # A loss scaler swaps the plain optimizer's `step`, which the schedule watches.
                optimizer = self.plain_optimizer() if self.accelerator.scaler is None else self.optimizer
            self.lr_scheduler = self.parts.scheduler(optimizer, num_training_steps)
            # Trainer drops the schedule before the next `train()` only where this is set.
            self._created_lr_scheduler = True
        return self.lr_scheduler
