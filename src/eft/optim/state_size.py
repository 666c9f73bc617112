"""How much memory gradients and an optimizer's state will take, before the first step has allocated any."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from eft.optim.averaging import is_averaged
from eft.optim.bf16 import Fp32Updates

_PRIMES = (5, 7, 11, 13, 17)
"""Lengths of the dimensions of a stand-in: state of one of these lengths belongs to that dimension."""


@runtime_checkable
class KnowsItsState(Protocol):
    """An optimizer whose state depends on more than the number of dimensions."""

    def state_bytes(self, parameter: nn.Parameter, group: dict[str, Any]) -> int:
        """Bytes that it will keep for `parameter`."""
        ...


def optimizer_state_bytes(build: Callable[[nn.Module], Optimizer], model: nn.Module) -> int:
    """Bytes of the state of `build(model)` over all trainable parameters, as held by this process.

    Found out, not looked up: an optimizer that `build` makes takes two steps on a tiny parameter of each kind
    (group, dimensions, dtype), and what it then keeps is scaled up dimension by dimension.
    """
    optimizer = build(model)
    groups = optimizer.param_groups
    if isinstance(optimizer, KnowsItsState):
        pairs = [(parameter, group) for group in groups for parameter in group["params"]]
        return sum(optimizer.state_bytes(*pair) + _beside(optimizer, pair[0]) for pair in pairs)
    total = 0
    for group in groups:
        kinds = Counter((tuple(parameter.shape), parameter.dtype) for parameter in group["params"])
        settings = {name: value for name, value in group.items() if name != "params"}
        kept = {kind: _kept(optimizer, settings, *kind) for kind in {(len(shape), dtype) for shape, dtype in kinds}}
        total += sum(
            count * sum(_scaled(state, shape) for state in kept[len(shape), dtype])
            for (shape, dtype), count in kinds.items()
        )
    return total


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


def _beside(optimizer: Optimizer, parameter: nn.Parameter) -> int:
    """Bytes of the fp32 weights and averages that are kept beside the optimizer's own state."""
    has_master = isinstance(optimizer, Fp32Updates) and optimizer.update == "fp32_master"
    copies = int(is_averaged(optimizer)) + int(has_master and parameter.dtype == torch.bfloat16)
    return 4 * copies * parameter.numel()


def _kept(optimizer: Optimizer, settings: dict[str, Any], dimensions: int, dtype: torch.dtype) -> list[Tensor]:
    """The tensors that the optimizer keeps for a parameter of `_PRIMES` lengths in a group of these settings."""
    parameter = nn.Parameter(torch.ones(_PRIMES[:dimensions], dtype=dtype))
    optimizer.param_groups = [{**settings, "params": [parameter]}]
    if isinstance(optimizer, Fp32Updates):
        optimizer.prepare(optimizer.update, optimizer.seed)
    for _ in range(2):
        parameter.grad = torch.full_like(parameter, 0.01)
        optimizer.step()
    return [value for value in optimizer.state[parameter].values() if isinstance(value, Tensor)]


def _scaled(state: Tensor, shape: tuple[int, ...]) -> int:
    """Bytes of the state that a parameter of `shape` has in the place of the stand-in's `state`."""
    lengths = dict(zip(_PRIMES, shape, strict=False))
    return state.element_size() * math.prod(lengths.get(length, length) for length in state.shape)
