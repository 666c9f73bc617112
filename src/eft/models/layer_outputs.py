"""What each layer of a model puts out, so that a fault can be told by the layer where it begins."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

LayerOutputs = dict[str, list[Tensor]]
"""Name of a layer → its outputs, float32 or wider [T, H], one per call."""


@contextmanager
def record_layers(model: nn.Module) -> Iterator[LayerOutputs]:
    """Record what the layers of the model's longest stack put out, for one row at a time."""
    outputs: LayerOutputs = {}
    stacks = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    name, stack = max(stacks, key=lambda entry: len(entry[1]), default=("", nn.ModuleList()))
    hooks = [
        layer.register_forward_hook(partial(_keep, outputs, f"{name}.{index}")) for index, layer in enumerate(stack)
    ]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def _keep(outputs: LayerOutputs, name: str, layer: nn.Module, inputs: Any, output: Any) -> None:
    hidden = output[0] if isinstance(output, tuple) else output
    if isinstance(hidden, Tensor) and hidden.ndim == 3:
        row = hidden[0].detach()
        outputs.setdefault(name, []).append(row.to(torch.promote_types(row.dtype, torch.float32)))


def first_layer_apart(one: LayerOutputs, other: LayerOutputs, *, limit: float, start: int = 0) -> str:
    """`, first in NAME`: the layer whose outputs from token `start` on differ by more than `limit` of its largest.

    Empty where no layer does. Where `other` is of several shorter rows, they count as one row, end to end.
    """
    for name, rows in one.items():
        others = other.get(name, [])
        joined = [torch.cat(others[index :: len(rows)]) for index in range(len(rows)) if len(others) >= len(rows)]
        for left, right in zip(rows, joined, strict=False):
            if left.shape == right.shape and not (left - right)[start:].abs().max() <= limit * left.abs().max():
                return f", first in {name}"
    return ""
