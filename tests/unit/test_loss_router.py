"""The load balance of each document, against transformers' own of that document alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from eft.loss.router import load_balance

LENGTHS, EXPERTS, LAYERS = (5, 1, 9), 6, 3


def draw(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        (2 * torch.randn(sum(LENGTHS), EXPERTS, generator=generator)).to(dtype).requires_grad_() for _ in range(LAYERS)
    ]


def numbers() -> Tensor:
    return torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_each_document_has_the_loss_that_it_has_alone(top_k: int) -> None:
    layers = draw()
    measured = load_balance(layers, numbers(), len(LENGTHS), top_k)
    alone = torch.stack(
        [
            load_balancing_loss_func(tuple(layer.split(LENGTHS)[index] for layer in layers), EXPERTS, top_k)
            for index in range(len(LENGTHS))
        ]
    )
    assert measured.dtype == torch.float32
    assert torch.allclose(measured, alone, rtol=1e-6, atol=0)
    shares = torch.tensor([0.2, 0.3, 0.5])
    ours = torch.autograd.grad(measured @ shares, layers)
    theirs = torch.autograd.grad(alone @ shares, layers)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-9)


def test_tokens_of_no_document_count_nothing() -> None:
    layers = draw()
    inside = numbers()
    inside[6:] = 2
    measured = load_balance(layers, inside, 2, 2)
    shorter = load_balance([layer[:6] for layer in layers], inside[:6], 2, 2)
    assert torch.equal(measured, shorter)
    for gradient in torch.autograd.grad(measured.sum(), layers):
        assert not gradient[6:].any()
        assert gradient[:6].any()


def test_no_documents_at_all_is_a_connected_zero() -> None:
    layers = draw()
    measured = load_balance(layers, torch.zeros(sum(LENGTHS), dtype=torch.int64), 0, 2)
    assert measured.shape == (0,)
    (gradient, *_) = torch.autograd.grad(measured.sum(), layers)
    assert not gradient.any()


def test_an_even_router_gives_the_number_of_experts_per_token() -> None:
    logits = torch.eye(EXPERTS) * 50
    measured = load_balance([logits], torch.zeros(EXPERTS, dtype=torch.int64), 1, 1)
    assert measured.item() == pytest.approx(1.0)


def test_the_softmax_is_fp32() -> None:
    layers = draw(torch.bfloat16)
    wide = [layer.detach().float() for layer in layers]
    assert torch.equal(load_balance(layers, numbers(), 3, 2), load_balance(wide, numbers(), 3, 2))
