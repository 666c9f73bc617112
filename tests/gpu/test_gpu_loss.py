"""The chunked loss of the output head on a CUDA machine, whose products give fp32 sums."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eft.loss import linear
from eft.loss.linear import head_loss

pytestmark = pytest.mark.gpu
ROWS, HIDDEN, VOCABULARY = 400, 64, 5000


def plain_loss(hidden: Tensor, head: nn.Linear, targets: Tensor, weights: Tensor) -> Tensor:
    losses = F.cross_entropy(
        head(hidden).to(torch.promote_types(hidden.dtype, torch.float32)), targets, reduction="none"
    )
    return (losses * weights).sum()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk_rows", [30, 400])
def test_no_further_from_fp64_than_plain_torch(
    dtype: torch.dtype, chunk_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "CHUNK_BYTES", chunk_rows * VOCABULARY * 2)
    torch.manual_seed(0)
    head = nn.Linear(HIDDEN, VOCABULARY, bias=False, device="cuda")
    hidden = (2 * torch.randn(ROWS, HIDDEN, device="cuda")).requires_grad_()
    targets = torch.randint(0, VOCABULARY, (ROWS,), device="cuda")
    weights = torch.rand(ROWS, device="cuda")
    wide = nn.Linear(HIDDEN, VOCABULARY, bias=False, device="cuda", dtype=torch.float64)
    wide.load_state_dict(head.state_dict())
    exact = hidden.detach().double().requires_grad_()
    expected = torch.autograd.grad(plain_loss(exact, wide, targets, weights) / 7, [exact, wide.weight])
    with torch.autocast("cuda", dtype):
        plain = plain_loss(hidden, head, targets, weights)
        loss = head_loss(hidden, head, targets, weights)
    theirs = torch.autograd.grad(plain / 7, [hidden, head.weight])
    ours = torch.autograd.grad(loss / 7, [hidden, head.weight])
    for one, other, wanted in zip(ours, theirs, expected, strict=True):
        assert (one.double() - wanted).norm() <= 1.5 * (other.double() - wanted).norm()


def test_peak_memory_is_bounded_by_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "CHUNK_BYTES", 1 << 20)
    head = nn.Linear(HIDDEN, VOCABULARY, bias=False, device="cuda", dtype=torch.bfloat16)
    hidden = torch.randn(1 << 15, HIDDEN, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(0, VOCABULARY, (len(hidden),), device="cuda")
    head_loss(hidden, head, targets).backward()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    head_loss(hidden, head, targets).backward()
    assert torch.cuda.max_memory_allocated() - before < len(hidden) * VOCABULARY * 2 / 8
