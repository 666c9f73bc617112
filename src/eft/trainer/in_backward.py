"""The callback that lets the optimizer work in the backward pass, for as long as a training lasts."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from eft.optim.in_backward import UpdatesInBackward


class AttachUpdates(TrainerCallback):
    """Attaches when a training begins and detaches when it is over, also by an error (`parts.Holder`)."""

    def __init__(self, updates: UpdatesInBackward) -> None:
        self.updates = updates

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The optimizer exists by now."""
        self.updates.attach()

    def release(self) -> None:
        """Whoever uses the model next finds no hooks on it."""
        self.updates.detach()
