"""What autograd keeps of a forward pass, found out on tensors that have shapes and dtypes but no numbers.

The decoder runs as it will, autocast too, on fake tensors. Where its kernels look at numbers or have no fake form, one
of the same shapes stands in that keeps what they keep: attention, and the products of experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.moe import ExpertsInterface
from transformers.integrations.sdpa_attention import repeat_kv

from eft.core.errors import ModelError
from eft.models.attention import base_of
from eft.models.experts import in_autocast_dtype

_TRACED = "eft_traced"


class TracingError(ModelError):
    """The forward pass looks at numbers."""


def saved_sizes(model: PreTrainedModel, tokens: int, autocast_dtype: torch.dtype | None = None) -> list[int]:
    """Bytes of every tensor that is kept for the backward pass of the decoder over one row of `tokens`.

    Weights apart, but with the copies of them that autocast makes. `model` may be on the meta device.

    Raises:
        TracingError: the family's forward pass needs more than shapes; says what.
    """
    base = base_of(model)
    decoder = base.get_decoder()
    sizes: dict[int, int] = {}
    with FakeTensorMode(allow_non_fake_inputs=True), _stand_ins(base):
        tensors = {name: _fake(tensor) for name, tensor in [*decoder.named_parameters(), *decoder.named_buffers()]}
        own = {tensor.untyped_storage()._cdata for tensor in tensors.values()}
        alive: list[Tensor] = []

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                sizes[storage._cdata] = int(storage.nbytes())
                alive.append(tensor)  # or its storage's number may come twice
            return tensor

        ids = torch.zeros((1, tokens), dtype=torch.int64)
        # A prebuilt mask is taken as it is; without one the values of the positions are looked at.
        inputs = {"input_ids": ids, "position_ids": ids, "attention_mask": torch.zeros((1, 1, 1, 1))}
        autocast = torch.autocast("cpu", dtype=autocast_dtype or torch.bfloat16, enabled=autocast_dtype is not None)
        # A foreign forward pass may fail in any way; the text is the reason we give.
        try:
            with autocast, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                functional_call(decoder, tensors, (), {**inputs, "use_cache": False})
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            raise TracingError(
                f"{type(base).__name__} without its numbers: {type(error).__name__}: {reason}"
            ) from error
    return list(sizes.values())


def _fake(tensor: Tensor) -> Tensor:
    """Inside a FakeTensorMode: the same on the CPU."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", requires_grad=tensor.requires_grad)


class _KeptByAttention(torch.autograd.Function):
    """Has the shape of attention and keeps what its kernels keep: queries, keys, values, output, one number a row."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty((*query.shape[:-1], value.shape[-1]))
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1]))
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        raise AssertionError("only the forward pass is traced")


class _KeptByProduct(torch.autograd.Function):
    """Has the shape of a grouped matrix product, and keeps its operands."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, width: int) -> Tensor:
        ctx.save_for_backward(rows, weight)
        return rows.new_empty((len(rows), width))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        raise AssertionError("only the forward pass is traced")


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    groups = query.shape[1] // key.shape[1]
    output = _KeptByAttention.apply(query, repeat_kv(key, groups), repeat_kv(value, groups))  # type: ignore[no-untyped-call]  # torch's has no types
    return output.transpose(1, 2).contiguous(), None


def _experts(module: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """As transformers' `grouped_mm`: every token's row once for each of its experts; all experts' weights at once."""
    module = in_autocast_dtype(module, hidden.device)
    rows = hidden[torch.arange(chosen.numel()) // chosen.shape[-1]]
    inner = _product(module, rows, module.gate_up_proj if module.has_gate else module.up_proj)
    inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    outer = _product(module, inner, module.down_proj) * weights.reshape(-1, 1)
    outer = outer[torch.arange(len(outer))]  # back in the order of the tokens
    return outer.view(*chosen.shape, -1).sum(1).to(hidden.dtype)


def _product(module: Any, rows: Tensor, weight: Tensor) -> Tensor:
    width = weight.shape[-1] if module.is_transposed else weight.shape[-2]
    product: Tensor = _KeptByProduct.apply(rows.to(weight.dtype), weight, width)  # type: ignore[no-untyped-call]  # torch's has no types
    return product


@contextmanager
def _stand_ins(base: PreTrainedModel) -> Iterator[None]:
    attention, experts = base.config._attn_implementation, base.config._experts_implementation
    AttentionInterface.register(_TRACED, _attention)
    AttentionMaskInterface.register(_TRACED, lambda *args, **kwargs: None)
    ExpertsInterface.register(_TRACED, _experts)
    base.set_attn_implementation(_TRACED)
    base.set_experts_implementation(_TRACED)
    try:
        yield
    finally:
        base.set_attn_implementation(attention)
        base.set_experts_implementation(experts)
