"""Averaged weights, to evaluate and export, without ever touching the training iterate for good (D12).

Schedule-free optimizers keep three points: z (the plain iterate), x (their average, the weights to evaluate and export)
and y = (1 - β)·z + β·x, where gradients are taken and which is what the model's parameters hold. Only y and z are
stored; x is worked out from them. The libraries' own `eval()` overwrites y by x and `train()` goes back: the round trip
changes some last bits, so that training with evaluations would differ from training without.

`weight_average` keeps an average of any optimizer's weights in its state: exponential (Polyak and Juditsky 1992) or
with equal shares (Izmailov et al. 2018, "Averaging Weights Leads to Wider Optima and Better Generalization").
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer

from eft.optim.bf16 import MASTER

AVERAGE = "average"
"""Entry of a parameter's optimizer state: the fp32 average of its weights."""
AVERAGED = "averaged_steps"
"""Entry of a parameter's optimizer state: how often it was updated."""


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


class WeightAverage:
    """Mixed into an optimizer class, in front of it: its state also holds an average of each parameter's weights.

    A parameter without a gradient (an expert that no token chose) is not updated, and its average stays too.
    """

    averaged = False
    """Whether the parameters hold their averages right now, inside `evaluation_weights`."""
    param_groups: list[dict[str, Any]]
    state: Any

    def average_by(self, kind: Literal["ema", "mean"], decay: float, start: int) -> None:
        """Exponential by `decay`, or with equal shares; a parameter's first `start` updates are left out."""
        self.kind, self.decay, self.start = kind, decay, start

    def step(self, closure: None = None) -> None:
        """One update of every parameter that has a gradient, and of its average."""
        assert closure is None, "no optimizer here evaluates the loss again"
        super().step()  # type: ignore[misc]  # an optimizer comes next in the order of bases
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._follow(parameter, self.state[parameter])

    @torch.no_grad()
    def _follow(self, parameter: nn.Parameter, state: dict[str, Any]) -> None:
        weights = state.get(MASTER, parameter).float()
        count = state.get(AVERAGED, 0) + 1
        state[AVERAGED] = count
        if count <= self.start + 1:
            state[AVERAGE] = weights.clone()
        else:
            share = 1 - self.decay if self.kind == "ema" else 1 / (count - self.start)
            state[AVERAGE].lerp_(weights, share)


def with_weight_average(optimizer: type[Optimizer]) -> Any:
    """A subclass of `optimizer`, of the same name, that averages weights. Call its `average_by` once."""
    members = {"__module__": optimizer.__module__, "__doc__": optimizer.__doc__}
    return type(optimizer.__name__, (WeightAverage, optimizer), members)


def is_schedule_free(optimizer: Optimizer | None) -> bool:
    """Whether the optimizer averages instead of decaying its learning rate."""
    return isinstance(_plain(optimizer), TrainingIterate)


def is_averaged(optimizer: Optimizer | None) -> bool:
    """Whether `weight_average` is kept in the optimizer's state."""
    return isinstance(_plain(optimizer), WeightAverage)


def _plain(optimizer: Optimizer | None) -> Any:
    """The optimizer itself, out of accelerate's wrapper."""
    return optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer


def _averaging(optimizer: Optimizer | None) -> Any:
    """The optimizer itself where the weights to evaluate differ from those that are trained; None for any other."""
    plain = _plain(optimizer)
    return plain if isinstance(plain, TrainingIterate | WeightAverage) else None


@torch.no_grad()
def averaged_parameters(optimizer: Optimizer) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Every parameter that has been trained with its average x, as a new tensor of the parameter's dtype.

    Schedule-free: x = y + (1 - 1/β)·(z - y), in fp32 at least.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if AVERAGE in state:
                yield parameter, state[AVERAGE].to(parameter.device, parameter.dtype, copy=True)
            elif "z" in state:
                beta = group["betas"][0] if "betas" in group else group["momentum"]
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
    plain = _averaging(optimizer)
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
    plain = _averaging(optimizer)
    state = model.state_dict(keep_vars=True)
    averages: dict[int, Tensor] = {}
    if plain is not None and not plain.averaged:
        averages = {id(parameter): average for parameter, average in averaged_parameters(plain)}
    return {name: averages.get(id(value), value.detach()) for name, value in state.items()}
