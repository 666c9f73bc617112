"""Cross-entropy of the trainable tokens: a weighted sum, in one extra buffer of the logits' own dtype.

K trainable tokens, V vocabulary entries.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

_CHUNK_ELEMENTS_CPU = 1 << 19
"""Logits worked on at once, so that the fp32 copy stays in the cache (2 MiB)."""
_CHUNK_ELEMENTS_GPU = 1 << 26
"""The same where launches cost more than memory (256 MiB)."""


def trainable_token_loss(logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Σ weight · −log softmax(logits)[target] over all rows.

    logits [K, V] of any floating dtype, targets int64 [K] in 0..V-1, weights float [K] ≥ 0 or None for 1 → a scalar,
    fp32 (fp64 for fp64 logits). The arithmetic is fp32 in chunks of rows and the sum fp64; the gradient is rounded
    once, into one [K, V] buffer of the logits' dtype. With K = 0 it is 0, connected to the graph. No gradient
    reaches the weights.
    """
    assert logits.ndim == 2, logits.shape
    assert targets.shape == logits.shape[:1], (targets.shape, logits.shape)
    assert weights is None or weights.shape == targets.shape, weights.shape
    loss: Tensor = _TrainableTokenLoss.apply(logits, targets, weights)  # type: ignore[no-untyped-call]
    return loss


class _TrainableTokenLoss(Function):
    """Row chunks forwards and backwards; only the logits themselves are kept in between."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        total = torch.zeros((), dtype=torch.float64, device=logits.device)
        for rows in _row_chunks(logits):
            log_probabilities = torch.log_softmax(logits[rows], dim=-1, dtype=dtype)
            losses = -log_probabilities.gather(1, targets[rows, None]).squeeze(1).double()
            total += losses.sum() if weights is None else losses @ weights[rows].double()
        ctx.save_for_backward(logits, targets, weights)
        return total.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        logits, targets, weights = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        for rows in _row_chunks(logits):
            chunk, in_place = logits[rows], logits.dtype == upstream.dtype
            out = gradient[rows] if in_place else None
            # d loss / d logits = weight · (softmax − one-hot), finished in fp32 before the one rounding.
            values = torch.softmax(chunk, dim=-1, dtype=upstream.dtype, out=out)
            values.scatter_add_(1, targets[rows, None], values.new_full((len(values), 1), -1.0))
            values *= upstream if weights is None else (weights[rows, None].to(upstream.dtype) * upstream)
            if not in_place:
                gradient[rows] = values
        return gradient, None, None


def _row_chunks(logits: Tensor) -> Iterator[slice]:
    """Slices of rows, each of a bounded number of logits."""
    limit = _CHUNK_ELEMENTS_CPU if logits.device.type == "cpu" else _CHUNK_ELEMENTS_GPU
    rows = max(1, limit // max(1, logits.shape[1]))
    return (slice(start, min(start + rows, logits.shape[0])) for start in range(0, logits.shape[0], rows))
