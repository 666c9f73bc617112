"""How much memory gradients and an optimizer's state will take, before the first step has allocated any."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

_PRIMES = (5, 7, 11, 13, 17)
"""Lengths of the dimensions of a stand-in: state of one of these lengths belongs to that dimension."""


def optimizer_state_bytes(build: Callable[[nn.Module], Optimizer], model: nn.Module) -> int:
    """Bytes of the state of `build(model)` over all trainable parameters, as held by this process.

    Found out, not looked up: an optimizer that `build` makes takes two steps on a tiny parameter of each kind
    (dimensions, dtype), and what it then keeps is scaled up dimension by dimension.
    """
    kinds = Counter(
        (tuple(parameter.shape), parameter.dtype) for parameter in model.parameters() if parameter.requires_grad
    )
    kept = {kind: _kept(build, *kind) for kind in {(len(shape), dtype) for shape, dtype in kinds}}
    return sum(
        count * sum(_scaled(state, shape) for state in kept[len(shape), dtype])
        for (shape, dtype), count in kinds.items()
    )


def gradient_bytes(model: nn.Module) -> int:
    """Bytes of all gradients of `model` at once, in the dtypes that they have."""
    return sum(
        parameter.numel() * (parameter.grad_dtype or parameter.dtype).itemsize
        for parameter in model.parameters()
        if parameter.requires_grad
    )


def held_state_bytes(optimizer: Optimizer) -> int:
    """Bytes of the state that `optimizer` holds already: after a resume, all of it."""
    states = (value for state in optimizer.state.values() for value in state.values())
    return sum(value.nbytes for value in states if isinstance(value, Tensor))


def _kept(build: Callable[[nn.Module], Optimizer], dimensions: int, dtype: torch.dtype) -> list[Tensor]:
    """The tensors that the optimizer keeps for a parameter of `_PRIMES` lengths."""
    stand_in = nn.Module()
    parameter = nn.Parameter(torch.ones(_PRIMES[:dimensions], dtype=dtype))
    stand_in.register_parameter("weight", parameter)
    optimizer = build(stand_in)
    for _ in range(2):
        parameter.grad = torch.full_like(parameter, 0.01)
        optimizer.step()
    return [value for value in optimizer.state[parameter].values() if isinstance(value, Tensor)]


def _scaled(state: Tensor, shape: tuple[int, ...]) -> int:
    """Bytes of the state that a parameter of `shape` has in the place of the stand-in's `state`."""
    lengths = dict(zip(_PRIMES, shape, strict=False))
    return state.element_size() * math.prod(lengths.get(length, length) for length in state.shape)
