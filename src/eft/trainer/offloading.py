"""ActivationOffloadingMixin: activations wait in host memory for the backward pass."""

from __future__ import annotations

import contextlib

from eft.trainer.hooks import TrainerHooks


class ActivationOffloadingMixin(TrainerHooks):
    """Runs the forward pass inside the offloading context."""

    def compute_loss_context_manager(self) -> contextlib.ExitStack:
        """Upstream's contexts, then ours."""
        stack: contextlib.ExitStack = super().compute_loss_context_manager()
        stack.enter_context(self.parts.offloading(parameters=self.model.parameters()))
        return stack
