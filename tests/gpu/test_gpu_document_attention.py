"""The variable-length kernels against the written-out attention of each document, in bf16 on a CUDA machine."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from eft.models import document_attention as kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
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
