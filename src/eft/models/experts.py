"""Products of experts in the dtype of autocast, as every other matrix product.

transformers computes all experts of a layer at once by `grouped_mm`, which torch has outside autocast's list and which
takes the dtype of the weights: with fp32 weights `bf16: true` would change nothing there. The registered function below
is transformers' own, given its weights in autocast's dtype. In fp64, the dtype of comparisons, which is unknown to
`grouped_mm`, the family's own code computes expert after expert.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ExpertsInterface, grouped_mm_experts_forward

GROUPED_EXPERTS = "eft_grouped_mm"
_STOCK = "grouped_mm"
_OWN = "eager"


def install_experts(base: PreTrainedModel) -> None:
    """Let experts that `grouped_mm` computes follow autocast; those of other implementations stay as they are."""
    ExpertsInterface.register(GROUPED_EXPERTS, grouped_experts)
    _replace(base, _STOCK, GROUPED_EXPERTS)


@contextmanager
def eager_experts(base: PreTrainedModel) -> Iterator[None]:
    """Inside it the family's own code computes the experts, one after the other, by products that autocast knows."""
    installed = base.get_experts_implementation()
    _replace(base, GROUPED_EXPERTS, _OWN)
    try:
        yield
    finally:
        base.set_experts_implementation(installed)


def _replace(base: PreTrainedModel, old: str, new: str) -> None:
    """In the model and in every model inside it that has a config of its own."""
    current = base.get_experts_implementation()
    base.set_experts_implementation({part: new if name == old else name for part, name in current.items()})


def grouped_experts(module: nn.Module, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """transformers' `grouped_mm` forward of an experts module; in fp64 that of its family.

    hidden [tokens, H], chosen int64 [tokens, K], weights [tokens, K] → [tokens, H] in the dtype of `hidden`.
    """
    if module.down_proj.dtype == torch.float64:
        own = inspect.unwrap(type(module).forward)  # transformers wraps it to choose among implementations
        return cast("Tensor", own(module, hidden, chosen, weights))
    view = in_autocast_dtype(module, hidden.device)
    return cast("Tensor", grouped_mm_experts_forward(view, hidden, chosen, weights))


def in_autocast_dtype(module: nn.Module, device: torch.device) -> Any:
    """`module` itself, or a view of it whose floating tensors are in autocast's dtype while that is on."""
    if not torch.is_autocast_enabled(device.type):
        return module
    return _Cast(module, torch.get_autocast_dtype(device.type))


class _Cast:
    """A module to read from. Its tensors are cast when they are read, with gradients to the originals."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        self._module = module
        self._dtype = dtype

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        return value.to(self._dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
