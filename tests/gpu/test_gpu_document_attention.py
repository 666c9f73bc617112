"""The variable-length kernels against the written-out attention of each document, in bf16 on a CUDA machine."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from eft.models import document_attention as kernels

pytestmark = pytest.mark.gpu
BOUNDS = [0, 33, 34, 200, 233]


def outputs_and_gradients(layer: kernels._Layer, inputs: list[Tensor], *, flash: bool) -> list[Tensor]:
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    if flash:
        assert layer.runs_on_flash(leaves[0], leaves[2])
        bounds = torch.tensor(BOUNDS, dtype=torch.int32, device="cuda")
        output = kernels._flash(layer, *leaves, bounds, 166)
    else:
        output = kernels._per_document(layer, *leaves, BOUNDS)
    return [output, *torch.autograd.grad(output.square().sum(), leaves)]


@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("groups", [1, 4])
def test_flash_is_as_close_to_fp64_as_sdpa(window: int | None, groups: int) -> None:
    torch.manual_seed(0)
    module = nn.Module()
    module.num_key_value_groups = groups
    layer = kernels._Layer(module, 0.0, None, window, None, None, None)
    shapes = [(1, 8, BOUNDS[-1], 64), (1, 8 // groups, BOUNDS[-1], 64), (1, 8 // groups, BOUNDS[-1], 64)]
    inputs = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes]
    exact = outputs_and_gradients(layer, [tensor.double() for tensor in inputs], flash=False)
    stock = outputs_and_gradients(layer, inputs, flash=False)
    ours = outputs_and_gradients(layer, inputs, flash=True)
    for reference, sdpa, flash in zip(exact, stock, ours, strict=True):
        assert (flash.double() - reference).norm() <= 1.5 * (sdpa.double() - reference).norm()


@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("window", [None, 16])
def test_flex_is_as_close_to_fp64_as_eager(window: int | None, softcap: float | None) -> None:
    """Sinks and soft-capped scores, with gradients, also of the sinks."""
    torch.manual_seed(0)
    module = nn.Module()
    module.num_key_value_groups = 4
    shapes = [(1, 8, BOUNDS[-1], 64), (1, 2, BOUNDS[-1], 64), (1, 2, BOUNDS[-1], 64), (8,)]
    inputs = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes]

    def run(dtype: torch.dtype, *, flex: bool) -> list[Tensor]:
        leaves = [tensor.to(dtype).requires_grad_() for tensor in inputs]
        layer = kernels._Layer(module, 0.0, None, window, None, softcap, leaves[3])
        if flex:
            assert layer.runs_on_flex(leaves[0])
            output = kernels._flex(layer, *leaves[:3], torch.tensor(BOUNDS, dtype=torch.int32, device="cuda"))
        else:
            output = kernels._per_document(layer, *leaves[:3], BOUNDS)
        return [output, *torch.autograd.grad(output.square().sum(), leaves)]

    exact, eager, found = (
        run(torch.float64, flex=False),
        run(torch.bfloat16, flex=False),
        run(torch.bfloat16, flex=True),
    )
    for reference, stock, ours in zip(exact, eager, found, strict=True):
        assert (ours.double() - reference).norm() <= 1.5 * (stock.double() - reference).norm()
