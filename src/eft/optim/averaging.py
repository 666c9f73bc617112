"""Averaged weights of schedule-free optimizers, without ever touching the training iterate for good (D12).

Such an optimizer keeps three points: z (the plain iterate), x (their average, the weights to evaluate and export) and
y = (1 - β)·z + β·x, where gradients are taken and which is what the model's parameters hold. Only y and z are stored;
x is worked out from them. The libraries' own `eval()` overwrites y by x and `train()` goes back: the round trip
changes some last bits, so that training with evaluations would differ from training without.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer

from eft.optim.bf16 import MASTER


class TrainingIterate:
    """Mixed into a schedule-free optimizer, in front of the library's class: the parameters stay at y.

    transformers' Trainer calls `train()` at every step and `eval()` at every evaluation; both do nothing here.
    """

    averaged = False
    """Whether the parameters hold x right now, inside `evaluation_weights`."""

    def train(self) -> None:
        """Nothing to do: the parameters are at y already."""

    def eval(self) -> None:
        """Nothing to do: evaluation weights come from `evaluation_weights`."""


def is_schedule_free(optimizer: Optimizer | None) -> bool:
    """Whether the weights to evaluate differ from the weights that are trained."""
    return _schedule_free(optimizer) is not None


def _schedule_free(optimizer: Optimizer | None) -> Any:
    """The schedule-free optimizer itself, out of accelerate's wrapper; None for any other."""
    plain = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
    return plain if isinstance(plain, TrainingIterate) else None


@torch.no_grad()
def averaged_parameters(optimizer: Optimizer) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Every parameter that has been trained with its average x, as a new tensor of the parameter's dtype.

    x = y + (1 - 1/β)·(z - y), in fp32 at least.
    """
    for group in optimizer.param_groups:
        beta = group["betas"][0] if "betas" in group else group["momentum"]
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if "z" in state:
                precise = torch.promote_types(parameter.dtype, torch.float32)
                # A bf16 parameter may have its weights in fp32 beside it.
                y, z = state.get(MASTER, parameter).detach().to(precise), state["z"].to(parameter.device, precise)
                yield parameter, torch.lerp(y, z, 1 - 1 / beta).to(parameter.dtype)


@contextmanager
def evaluation_weights(optimizer: Optimizer | None) -> Iterator[None]:
    """While active, the model holds the weights to evaluate; afterwards it holds the training iterate, bit for bit.

    Costs a copy of the trained parameters. Nothing happens for other optimizers, None, or inside another
    `evaluation_weights` of the same optimizer.
    """
    plain = _schedule_free(optimizer)
    if plain is None or plain.averaged:
        yield
        return
    backup: list[tuple[nn.Parameter, Tensor]] = []
    try:
        plain.averaged = True
        for parameter, average in averaged_parameters(plain):
            backup.append((parameter, parameter.detach().clone()))
            _overwrite(parameter, average)
        yield
    finally:
        for parameter, trained in backup:
            _overwrite(parameter, trained)
        plain.averaged = False


@torch.no_grad()
def _overwrite(parameter: nn.Parameter, value: Tensor) -> None:
    parameter.copy_(value)


def evaluation_state_dict(optimizer: Optimizer | None, model: nn.Module) -> dict[str, Tensor]:
    """The model's state dict with averaged weights, for export; the live weights are not touched.

    Tensors that are not averaged share memory with the model. Tied names share one tensor.
    """
    plain = _schedule_free(optimizer)
    state = model.state_dict(keep_vars=True)
    averages: dict[int, Tensor] = {}
    if plain is not None and not plain.averaged:
        averages = {id(parameter): average for parameter, average in averaged_parameters(plain)}
    return {name: averages.get(id(value), value.detach()) for name, value in state.items()}
