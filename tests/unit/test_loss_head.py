"""The weighted cross-entropy of trainable tokens against torch's own, and its memory and edges."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from eft.loss import objectives
from eft.loss.head import trainable_token_loss


def draw(rows: int = 50, vocabulary: int = 300, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = (8 * torch.randn(rows, vocabulary, generator=generator)).to(dtype).requires_grad_()
    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    return logits, targets, torch.rand(rows, generator=generator)


@pytest.fixture(params=[1, 1000, 1 << 19], ids=["row by row", "uneven chunks", "one chunk"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(objectives, "_BLOCK_ELEMENTS_CPU", request.param)
    return int(request.param)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("weighted", [False, True])
def test_equals_torch_cross_entropy(weighted: bool) -> None:
    logits, targets, weights = draw()
    chosen = weights if weighted else None
    loss = trainable_token_loss(logits, targets, chosen)
    (ours,) = torch.autograd.grad(loss / 7, logits)
    reference = F.cross_entropy(logits.double(), targets, reduction="none")
    reference = (reference * weights).sum() if weighted else reference.sum()
    (theirs,) = torch.autograd.grad(reference / 7, logits)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(reference.item(), rel=1e-6)
    plain = F.cross_entropy(logits.detach(), targets, reduction="none")
    assert loss.item() == pytest.approx((plain * weights if weighted else plain).sum().item(), rel=1e-6)
    assert (ours - theirs).norm() <= 1e-6 * theirs.norm()


@pytest.mark.usefixtures("chunk")
def test_gradcheck() -> None:
    logits, targets, weights = draw(6, 9, torch.float64)
    assert torch.autograd.gradcheck(lambda x: trainable_token_loss(x, targets), logits)
    assert torch.autograd.gradcheck(lambda x: trainable_token_loss(x, targets, weights), logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    """Loss and gradient are those of fp32 arithmetic on the same logits; only the gradient is rounded."""
    logits, targets, weights = draw(dtype=dtype)
    loss = trainable_token_loss(logits, targets, weights)
    (loss / 7).backward()
    exact = logits.detach().double().requires_grad_()
    reference = (F.cross_entropy(exact, targets, reduction="none") * weights).sum()
    (reference / 7).backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(reference.item(), rel=1e-6)
    assert logits.grad is not None
    assert exact.grad is not None
    assert logits.grad.dtype == dtype
    expected = exact.grad.to(dtype).double()
    assert (logits.grad.double() - expected).abs().max() <= torch.finfo(dtype).eps * exact.grad.abs().max() / 4


def test_no_rows_is_a_connected_zero() -> None:
    hidden, weight = torch.randn(0, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    loss = trainable_token_loss(hidden @ weight.T, torch.empty(0, dtype=torch.int64))
    assert loss.requires_grad
    assert loss.item() == 0.0
    loss.backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.zeros(9, 4))


def test_zero_weight_and_extreme_logits() -> None:
    logits = torch.tensor([[1e30, -1e30, 0.0], [80.0, -80.0, 0.0]], requires_grad=True)
    loss = trainable_token_loss(logits, torch.tensor([0, 1]), torch.tensor([1.0, 0.0]))
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad is not None
    assert torch.equal(logits.grad, torch.zeros(2, 3))


def test_strided_logits_and_no_gradient() -> None:
    logits, targets, _ = draw()
    expected = trainable_token_loss(logits, targets)
    turned = logits.detach().T.contiguous().T.requires_grad_()
    loss = trainable_token_loss(turned, targets)
    assert torch.equal(loss, expected)
    loss.backward()
    expected.backward()
    assert turned.grad is not None
    assert logits.grad is not None
    assert torch.equal(turned.grad, logits.grad)
    with torch.no_grad():
        assert torch.equal(trainable_token_loss(logits, targets), expected)
    with pytest.raises(AssertionError):
        trainable_token_loss(logits, targets[:-1])


class _LargestOutput(TorchDispatchMode):
    """Records the sizes in bytes of what operators return."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not func.is_view:
            self.sizes.append(result.numel() * result.element_size())
        return result


def test_one_buffer_of_the_logits_dtype_and_chunks_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objectives, "_BLOCK_ELEMENTS_CPU", 3000)
    logits, targets, _ = draw(200, 1000, torch.bfloat16)
    with _LargestOutput() as record:
        trainable_token_loss(logits, targets).backward()
    sizes = sorted(record.sizes)
    assert sizes[-1] == 200 * 1000 * 2, "the gradient, in bf16"
    assert sizes[-2] <= 3000 * 4 * torch.get_num_threads(), "everything else is a chunk in fp32"
