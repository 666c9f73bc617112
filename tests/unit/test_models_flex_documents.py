"""Flex attention over documents: its forward, on the CPU, against the same layer document by document.

Its backward has no CPU kernel; tests/gpu compares gradients.
"""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from torch import Tensor, nn

from eft.models import document_attention as kernels

LENGTHS = (5, 1, 130, 44)


def layer_of(
    window: int | None, chunk: int | None, softcap: float | None, sinks: Tensor | None, groups: int
) -> kernels._Layer:
    module = nn.Module()
    module.num_key_value_groups = groups
    return kernels._Layer(module, 0.0, 0.3, window, chunk, softcap, sinks)


# Without a compiler torch says that flex attention is slow, which is all the same to a test.
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize(("window", "chunk"), [(None, None), (3, None), (None, 4), (140, None)])
def test_forward_equals_each_document_alone(
    softcap: float | None, with_sinks: bool, window: int | None, chunk: int | None
) -> None:
    torch.manual_seed(0)
    tokens = sum(LENGTHS)
    query, key, value = torch.randn(1, 4, tokens, 16), torch.randn(1, 2, tokens, 16), torch.randn(1, 2, tokens, 16)
    layer = layer_of(window, chunk, softcap, torch.randn(4) if with_sinks else None, groups=2)
    bounds = [0, *accumulate(LENGTHS)]
    expected = kernels._per_document(layer, query, key, value, bounds)
    with torch.no_grad():
        found = kernels._flex(layer, query, key, value, torch.tensor(bounds, dtype=torch.int32))
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 2e-6 * expected.abs().max()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_block_masks_are_made_once_per_forward_and_kind_of_layer() -> None:
    query = torch.randn(1, 2, 12, 16)
    bounds = torch.tensor([0, 5, 12], dtype=torch.int32)
    with torch.no_grad(), kernels.packed_forward():
        for window in (None, 3, None, 3):
            kernels._flex(layer_of(window, None, 2.0, None, groups=1), query, query, query, bounds)
        state = kernels._packed.get()
        assert state is not None
        assert set(state.blocks) == {(None, None), (3, None)}
    assert kernels._packed.get() is None


def test_a_cpu_never_takes_it() -> None:
    query = torch.randn(1, 2, 12, 16, dtype=torch.bfloat16)
    assert not layer_of(None, None, 2.0, None, groups=1).runs_on_flex(query)
