"""The optimizer applied in the backward pass, one tensor at a time, so that the gradients never exist all at once.

A hook on each parameter runs as soon as its gradient is complete: it lets the optimizer step over this one parameter,
by the same code, and drops the gradient. When the trainer steps the optimizer at the end of the step no gradient is
left, and the step only advances what the optimizer counts per group. So the update, the optimizer's state and its
checkpoints are those of the ordinary step, bit for bit. Lv et al. 2023, "Full Parameter Fine-tuning for Large Language
Models with Limited Resources" (LOMO), fuse SGD in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from eft.core.errors import ConfigError


def check_updates_in_backward(accumulation: int, world_size: int) -> None:
    """Raise ConfigError where gradients are not complete at the end of one backward pass of one process."""
    if accumulation > 1:
        raise ConfigError(
            f"optimizer_in_backward: gradients would be added up over {accumulation} micro-batches. Set "
            "`micro_batch_size` to the global batch, or remove `optimizer_in_backward`."
        )
    if world_size > 1:
        raise ConfigError(
            f"optimizer_in_backward: gradients are averaged over {world_size} processes after the backward pass. Start "
            "one process, or remove `optimizer_in_backward`."
        )


class UpdatesInBackward:
    """Builds an optimizer and, while attached, lets it update each parameter in the backward pass."""

    def __init__(self, build: Callable[[nn.Module], Optimizer]) -> None:
        """`build` makes the optimizer of a model. It must treat every tensor by itself."""
        self._build = build
        self._optimizer: Optimizer | None = None
        self._handles: list[RemovableHandle] = []
        self._is_paused = False

    @property
    def build(self) -> Callable[[nn.Module], Optimizer]:
        """What makes the optimizer, for a look at it elsewhere."""
        return self._build

    def __call__(self, model: nn.Module) -> Optimizer:
        """The optimizer over the trainable parameters of `model`."""
        self._optimizer = self._build(model)
        return self._optimizer

    def attach(self) -> None:
        """From now on, until `detach`, a backward pass over the model is also its update."""
        assert self._optimizer is not None, "the optimizer is built first"
        self.detach()
        for number, group in enumerate(self._optimizer.param_groups):
            update = _Update(self, self._optimizer, number)
            self._handles += [parameter.register_post_accumulate_grad_hook(update) for parameter in group["params"]]

    def detach(self) -> None:
        """Give the model back as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @property
    def is_paused(self) -> bool:
        """Whether gradients are dropped unused."""
        return self._is_paused

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, backward passes change no weight; while attached, gradients are dropped all the same."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False


class _Update:
    """What happens to a parameter of one group when its gradient is there."""

    def __init__(self, updates: UpdatesInBackward, optimizer: Optimizer, group: int) -> None:
        self._updates = updates
        self._optimizer = optimizer
        self._group = group

    def __call__(self, parameter: Tensor) -> None:
        if not self._updates.is_paused:
            groups = self._optimizer.param_groups
            # A group of its own: what the step counts in it is thrown away, since the trainer's own step counts for
            # the whole group.
            self._optimizer.param_groups = [{**groups[self._group], "params": [parameter]}]
            try:
                self._optimizer.step()
            finally:
                self._optimizer.param_groups = groups
        parameter.grad = None
