"""Losses weighted by entropy: against a plain program, and exactly none of it in the gradient of the factor."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from eft.loss import objectives
from eft.loss.head import trainable_token_loss
from eft.loss.linear import head_loss
from eft.loss.objectives import Objective
from eft.verify.exact import PlainObjective


def plain(logits: Tensor, targets: Tensor, power: float, tokens: int, smoothing: float = 0.0) -> Tensor:
    top = logits.detach().topk(min(tokens, logits.shape[1])).values.softmax(-1)
    factor = (-(top * top.log()).sum(-1) / math.log(top.shape[-1])) ** power
    return factor * F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)


@pytest.mark.parametrize("rows_at_once", [1, 1 << 19])
@pytest.mark.parametrize(("power", "tokens"), [(1.0, 20), (0.5, 5), (2.0, 1000), (0.0, 2)])
def test_equals_a_plain_program(power: float, tokens: int, rows_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objectives, "_BLOCK_ELEMENTS_CPU", rows_at_once)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(30, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    head = torch.nn.Linear(16, 100, bias=False, dtype=torch.float64)
    targets = torch.randint(0, 100, (30,), generator=generator)
    weights = torch.rand(30, generator=generator, dtype=torch.float64)
    objective = Objective(label_smoothing=0.1, entropy_power=power, entropy_tokens=tokens)
    expected = (weights * plain(head(hidden), targets, power, tokens, 0.1)).sum()
    gradients = torch.autograd.grad(expected, [hidden, head.weight])
    for loss in (
        head_loss(hidden, head, targets, weights, objective=objective),
        trainable_token_loss(head(hidden), targets, weights, objective=objective),
    ):
        torch.testing.assert_close(loss, expected)
        for ours, theirs in zip(torch.autograd.grad(loss, [hidden, head.weight]), gradients, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_the_factor_is_between_none_and_one() -> None:
    unsure, sure = torch.zeros(1, 50), torch.zeros(1, 50)
    sure[0, 3] = 1e4
    for logits, factor in ((unsure, 1.0), (sure, 0.0)):
        loss = trainable_token_loss(logits, torch.tensor([7]), objective=Objective(entropy_power=1.0))
        whole = trainable_token_loss(logits, torch.tensor([7]))
        assert loss.item() == pytest.approx(factor * whole.item(), abs=1e-6)


def test_the_yardstick_of_verify_is_the_same() -> None:
    logits, targets = torch.randn(9, 40), torch.randint(0, 40, (9,))
    ours = trainable_token_loss(logits, targets, objective=Objective(0.1, 1e-3, 1.5, 7))
    assert ours.item() == pytest.approx(PlainObjective(0.1, 1e-3, 1.5, 7)(logits, targets).sum().item(), rel=1e-5)
