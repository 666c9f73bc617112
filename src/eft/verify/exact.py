"""Exact comparisons of a live model: fp32, no dropout, every adapter factor away from zero; all put back afterwards."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eft.core.constants import IGNORE_INDEX
from eft.core.records import TokenSample
from eft.models.attention import base_of

GRADIENT_TOLERANCE = 1e-5
GRADIENT_FLOOR = 1e-3
"""A tensor's gradient is measured against its own norm, or this share of the whole gradient's norm if that is more."""

_HALF_DTYPES = (torch.bfloat16, torch.float16)
_STOCK = ("sdpa", "eager")
_FACTOR_SPREAD = 0.02
_SEED = 20_240_817


@contextmanager
def exact_arithmetic(model: nn.Module) -> Iterator[None]:
    """Inside it the model computes in fp32 without dropout, and its zero factors hold small random numbers.

    A half-precision tensor is widened and narrowed again, which changes no bit. A LoRA factor at zero would hide the
    gradient of the other one.
    """
    modes = {module: module.training for module in model.modules()}
    narrow = [(tensor, tensor.dtype) for tensor in _tensors(model) if tensor.dtype in _HALF_DTYPES]
    for tensor, _ in narrow:
        tensor.data = tensor.data.float()
    zeros = [p for p in model.parameters() if p.requires_grad and p.numel() and not p.detach().any()]
    generator = torch.Generator().manual_seed(_SEED)
    for parameter in zeros:
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * _FACTOR_SPREAD)
    try:
        with _without_dropout(model):
            yield
    finally:
        for parameter in zeros:
            parameter.data.zero_()
        for tensor, dtype in narrow:
            tensor.data = tensor.data.to(dtype)
        for module, training in modes.items():
            module.training = training
        model.zero_grad()


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    """All dropout rates at 0: those of dropout layers, and those that families keep as numbers on their modules."""
    rates: list[tuple[nn.Module, str, float]] = []
    for module in model.modules():
        names = ["p"] if isinstance(module, nn.modules.dropout._DropoutNd) else [n for n in vars(module) if "drop" in n]
        rates += [(module, name, vars(module)[name]) for name in names if isinstance(vars(module)[name], float)]
    for module, name, _ in rates:
        setattr(module, name, 0.0)
    try:
        yield
    finally:
        for module, name, rate in rates:
            setattr(module, name, rate)


@contextmanager
def stock_attention(model: nn.Module) -> Iterator[None]:
    """Inside it the model uses the attention that its family is written with, unless it has a stock one already."""
    base = base_of(model)
    installed = base.config.get_text_config()._attn_implementation
    if installed in _STOCK:
        yield
        return
    base.set_attn_implementation("eager")
    try:
        yield
    finally:
        base.set_attn_implementation(installed)


def trained_tokens(document: TokenSample, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(positions int64 [K], targets int64 [K], weights fp32 [K]) of a document: position t predicts token t + 1."""
    labels = torch.tensor(document.labels[1:], dtype=torch.int64, device=device)
    positions = torch.nonzero(labels != IGNORE_INDEX).flatten()
    weights = torch.ones(len(labels)) if document.weights is None else torch.tensor(document.weights[1:])
    return positions, labels[positions], weights.to(device)[positions]


def plain_loss(model: nn.Module, documents: Sequence[TokenSample]) -> float:
    """Σ weight · NLL ÷ Σ weight in fp32, one document at a time; its gradient is added to the parameters'.

    Nothing of eft is in here: token ids go into the model, the whole logits into torch's cross entropy.
    """
    device = next(model.parameters()).device
    total = sum(float(trained_tokens(document, device)[2].sum()) for document in documents)
    loss = 0.0
    for document in documents:
        positions, targets, weights = trained_tokens(document, device)
        ids = torch.tensor(document.input_ids, dtype=torch.int64, device=device)
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
        part = (weights * F.cross_entropy(logits[positions], targets, reduction="none")).sum() / total
        part.backward()  # type: ignore[no-untyped-call]
        loss += float(part.detach())
    return loss


def take_gradients(model: nn.Module) -> dict[str, Tensor]:
    """The accumulated gradients by name, taken off the parameters; without those that are None."""
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradients[name], parameter.grad = parameter.grad, None
    return gradients


@dataclass(frozen=True)
class GradientGap:
    """The tensor whose gradients differ most: ‖Δ‖ ÷ max(‖g_t‖, GRADIENT_FLOOR · ‖g‖)."""

    share: float
    tensor: str
    norm: float
    """‖g‖ of the expected gradient."""

    @property
    def is_small(self) -> bool:
        """Within the tolerance, and not measured against nothing. NaN is neither."""
        return self.share <= GRADIENT_TOLERANCE and self.norm > 0


def compare_gradients(measured: dict[str, Tensor], expected: dict[str, Tensor]) -> GradientGap:
    """The largest gap over all tensors; one without a gradient counts as zero."""
    norm = math.sqrt(sum(float(gradient.double().norm()) ** 2 for gradient in expected.values()))
    worst = GradientGap(0.0, "", norm)
    for name in expected.keys() | measured.keys():
        there = measured.get(name, torch.zeros(()))
        wanted = expected.get(name, torch.zeros(()))
        gap = float((there.cpu() - wanted.cpu()).double().norm())
        share = gap / max(float(wanted.double().norm()), GRADIENT_FLOOR * norm, 1e-30)
        if math.isnan(share):
            return GradientGap(share, name, norm)
        if share > worst.share:
            worst = GradientGap(share, name, norm)
    return worst
