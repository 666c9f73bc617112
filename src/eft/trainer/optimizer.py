"""OptimizerMixin: the optimizer of the table, over our parameter groups."""

from __future__ import annotations

from torch import nn
from torch.optim import Optimizer

from eft.trainer.hooks import TrainerHooks


class OptimizerMixin(TrainerHooks):
    """Builds the optimizer once per trainer."""

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """The optimizer over the trainable parameters of `model` (default: the trainer's own)."""
        if self.optimizer is None:
            self.optimizer = self.parts.optimizer(self.model if model is None else model)
        created: Optimizer = self.optimizer
        return created
