"""What is summed over the trained tokens, row by row: cross-entropy, label smoothing, z-loss, weights by entropy.

One row z holds the V numbers that the output head gives for one token, t is its target and w its weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_BLOCK_ELEMENTS_CPU = 1 << 19
"""Numbers worked on at once by one thread, so that their fp32 copy stays in its cache (2 MiB)."""
_BLOCK_ELEMENTS_GPU = 1 << 26
"""The same where launches cost more than memory (256 MiB)."""


@dataclass(frozen=True)
class Objective:
    """The loss of one token with logits y, Z = Σ exp(y): −(1 − ε)·log p[t] − ε/V · Σ log p + ζ · log² Z."""

    label_smoothing: float = 0.0
    """ε: Szegedy et al. 2016, §7, as torch's `cross_entropy` and transformers' `label_smoothing_factor` have it."""
    z_loss: float = 0.0
    """ζ: PaLM (Chowdhery et al. 2022), §5, takes 1e-4."""
    entropy_power: float | None = None
    """α: the loss of a token counts (H / ln k)^α times, H being the entropy of the model's own k likeliest tokens.

    Entropy-adaptive fine-tuning (Diao et al. 2026): tokens that the model is sure of, right or wrong, pull less. The
    factor has no gradient. None: every token counts once.
    """
    entropy_tokens: int = 20
    """k ≥ 2."""


NLL = Objective()
"""Nothing but −log p[t]."""


@dataclass(frozen=True)
class LogitShape:
    """Logits from what the head multiplies: y = scale · z, or y = softcap · tanh(scale · z / softcap)."""

    scale: float = 1.0
    softcap: float | None = None


RAW = LogitShape()
"""The head's own output."""


def token_losses(
    values: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    *,
    objective: Objective = NLL,
    shape: LogitShape = RAW,
    gradient: bool,
) -> Tensor:
    """Losses [R] of R tokens, without their weights. `values` is overwritten.

    values [R, V] contiguous, float32 or float64: the head's output; afterwards d Σ w·loss / d values if `gradient`,
    else of no meaning. targets int64 [R] in 0..V-1; weights [R] or None for 1. The losses have the dtype of `values`.
    """
    width = values.shape[1]
    slope = _shape_logits(values, shape, gradient)
    highest = values.amax(1)
    wanted = values.gather(1, targets[:, None]).squeeze(1)
    mean = values.mean(1) if objective.label_smoothing else None
    share = None if objective.entropy_power is None else entropy_weights(values, objective)

    # Overwritten in place on the CPU only: there the kernel reads a row before it writes it.
    probabilities = torch.softmax(values, 1, out=values if values.device.type == "cpu" else None)
    # The most likely token has probability 1 / Σ exp(y − highest).
    log_sum = -probabilities.amax(1).log()
    losses = (highest - wanted) + log_sum
    if mean is not None:
        losses += objective.label_smoothing * (wanted - mean)
    log_z = highest + log_sum
    if objective.z_loss:
        losses += objective.z_loss * log_z.square()
    if share is not None:
        losses *= share
        weights = share if weights is None else weights.to(share.dtype) * share
    if not gradient:
        return losses

    factors = None if weights is None else weights.to(values.dtype)[:, None]
    pull = 1.0 - objective.label_smoothing
    if objective.z_loss:
        probabilities *= (1 + 2 * objective.z_loss * log_z)[:, None]
    if objective.label_smoothing:
        probabilities -= objective.label_smoothing / width
    probabilities.scatter_add_(1, targets[:, None], probabilities.new_full((len(values), 1), -pull))
    if factors is not None:
        probabilities *= factors
    if slope is not None:
        probabilities *= slope
    if shape.scale != 1.0:
        probabilities *= shape.scale
    if probabilities is not values:
        values.copy_(probabilities)
    return losses


def entropy_weights(logits: Tensor, objective: Objective) -> Tensor:
    """The factor [R] of each token's loss, of the dtype of `logits` [R, V], between 0 and 1."""
    assert objective.entropy_power is not None
    top = logits.topk(min(objective.entropy_tokens, logits.shape[1]), 1).values
    entropy = top.logsumexp(1) - (top.softmax(1) * top).sum(1)
    return (entropy.clamp_min(0.0) / math.log(top.shape[1])).pow(objective.entropy_power)


def _shape_logits(values: Tensor, shape: LogitShape, gradient: bool) -> Tensor | None:
    """Turn the head's output into logits in place; returns d logits / d (scale · values) where that is not 1."""
    if shape.scale != 1.0:
        values *= shape.scale
    if shape.softcap is None:
        return None
    values.div_(shape.softcap).tanh_()
    slope = values.square().neg_().add_(1.0) if gradient else None
    values *= shape.softcap
    return slope


def weighted_sum(losses: Tensor, weights: Tensor | None) -> Tensor:
    """Σ weight · loss in fp64, a scalar."""
    return losses.double().sum() if weights is None else losses.double() @ weights.double()


Groups = tuple[Tensor, Tensor]
"""(int64 [K] in 0..G-1, the group of each token; float64 [G], to which each group's Σ weight · loss is added)."""


def add_to_groups(groups: Groups, rows: slice, losses: Tensor, weights: Tensor | None) -> None:
    """Add the losses [R] of the tokens in `rows` to the sums of their groups; nothing waits for the device."""
    members, totals = groups
    weighted = losses.double() if weights is None else losses.double() * weights.double()
    totals.index_add_(0, members[rows], weighted)


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which losses of values of `dtype` are computed: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def row_blocks(values: Tensor) -> Iterator[slice]:
    """Slices of the rows of `values` [R, V], each of a bounded number of elements."""
    rows, width = values.shape
    limit = _BLOCK_ELEMENTS_CPU * torch.get_num_threads() if values.device.type == "cpu" else _BLOCK_ELEMENTS_GPU
    size = max(1, limit // max(1, width))
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))
