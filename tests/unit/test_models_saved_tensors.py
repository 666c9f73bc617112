"""What autograd would keep, found out without numbers, against what it does keep."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from eft.models.attention import boundary_inputs, install_attention, packed_forward, packing_support
from eft.models.experts import install_experts
from eft.models.saved_tensors import TracingError, saved_sizes
from tests.tiny_models import FAMILIES, tiny_model

TOKENS = 300
WITHOUT_SCORES = [
    *[
        "llama",
        "qwen2",
        "qwen3",
        "qwen3_moe",
        "mixtral",
        "olmo2",
        "llama4_text",
        "phimoe",
        "olmoe",
        "granite",
        "smollm3",
    ]
]
"""Families whose attention on the CPU keeps no matrix of scores, as none does on a GPU."""


def kept(model: PreTrainedModel, autocast_dtype: torch.dtype | None) -> int:
    """Bytes, measured."""
    install_attention(model, "eft")
    install_experts(model)
    support = packing_support(model)
    bounds = torch.tensor([0, TOKENS], dtype=torch.int32)
    row: dict[str, Any] = {
        "input_ids": torch.randint(3, 100, (1, TOKENS)),
        "position_ids": torch.arange(TOKENS)[None],
        **dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), bounds),
        **dict.fromkeys(("max_length_q", "max_length_k"), TOKENS),
    }
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    found: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in own:
            found[tensor.untyped_storage()._cdata] = tensor
        return tensor

    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast_dtype is not None)
    with packed_forward(), autocast, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(**boundary_inputs(support, model, row), use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values())


@pytest.mark.parametrize("autocast_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("family", WITHOUT_SCORES)
def test_not_less_than_is_kept_and_little_more(family: str, autocast_dtype: torch.dtype | None) -> None:
    """More where the attention of one document spares the repeated keys and values that a row of several has."""
    model = tiny_model(family)
    before = model.config._attn_implementation, model.config._experts_implementation
    traced = sum(saved_sizes(model, TOKENS, autocast_dtype))
    assert (model.config._attn_implementation, model.config._experts_implementation) == before
    assert 1 <= traced / kept(model, autocast_dtype) < 1.2


@pytest.mark.parametrize("family", sorted({*FAMILIES} - {"bloom"}))
def test_every_family_without_weights(family: str) -> None:
    model = tiny_model(family)
    expected = saved_sizes(model, 48)
    assert saved_sizes(model.to("meta"), 48) == expected
    assert sum(expected) > 48 * model.config.hidden_size * 4 * model.config.num_hidden_layers


def test_what_looks_at_numbers_is_named() -> None:
    with pytest.raises(TracingError, match="BloomForCausalLM without its numbers: ValueError"):
        saved_sizes(tiny_model("bloom"), 48)


def test_weights_are_not_counted() -> None:
    model = tiny_model("llama")
    assert sum(saved_sizes(model, 2)) < sum(parameter.nbytes for parameter in model.parameters()) / 4
