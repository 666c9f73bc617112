"""The loss of trained tokens whose logits are there already: for heads whose own arithmetic is not known.

K trained tokens, V vocabulary entries. `loss.linear` needs no logits at all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from eft.loss.objectives import (
    NLL,
    Groups,
    Objective,
    add_to_groups,
    arithmetic_dtype,
    row_blocks,
    token_losses,
    weighted_sum,
)


def trainable_token_loss(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    objective: Objective = NLL,
    groups: Groups | None = None,
) -> Tensor:
    """Σ weight · loss over all rows, the loss being −log softmax(logits)[target] unless `objective` says more.

    logits [K, V] of any floating dtype, targets int64 [K] in 0..V-1, weights float [K] ≥ 0 or None for 1 → a scalar,
    fp32 (fp64 for fp64 logits). The arithmetic is fp32 in blocks of rows and the sum fp64; the gradient is rounded
    once, into one [K, V] buffer of the logits' dtype. With K = 0 it is 0, connected to the graph. No gradient
    reaches the weights. `groups`: sums that are kept on the way, of which no gradient is taken.
    """
    assert logits.ndim == 2, logits.shape
    assert targets.shape == logits.shape[:1], (targets.shape, logits.shape)
    assert weights is None or weights.shape == targets.shape, weights.shape
    loss: Tensor = _TrainableTokenLoss.apply(logits, targets, weights, objective, groups)  # type: ignore[no-untyped-call]  # torch's has no types
    return loss


class _TrainableTokenLoss(Function):
    """Row blocks forwards and backwards; only the logits themselves are kept in between."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        weights: Tensor | None,
        objective: Objective,
        groups: Groups | None,
    ) -> Tensor:
        dtype = arithmetic_dtype(logits.dtype)
        total = torch.zeros((), dtype=torch.float64, device=logits.device)
        for rows in row_blocks(logits):
            values = logits[rows].to(dtype, copy=True, memory_format=torch.contiguous_format)
            losses = token_losses(values, targets[rows], None, objective=objective, gradient=False)
            chosen = None if weights is None else weights[rows]
            total += weighted_sum(losses, chosen)
            if groups is not None:
                add_to_groups(groups, rows, losses, chosen)
        ctx.save_for_backward(logits, targets, weights)
        ctx.objective = objective
        return total.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits, targets, weights = ctx.saved_tensors
        gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
        for rows in row_blocks(logits):
            in_place = logits.dtype == upstream.dtype
            values = gradient[rows] if in_place else torch.empty_like(gradient[rows], dtype=upstream.dtype)
            values.copy_(logits[rows])
            chosen = None if weights is None else weights[rows]
            token_losses(values, targets[rows], chosen, objective=ctx.objective, gradient=True)
            values *= upstream
            if not in_place:
                gradient[rows] = values
        return gradient, None, None, None, None
