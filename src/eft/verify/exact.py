"""Exact comparisons of a live model: fp64, no dropout, every adapter factor away from zero; all put back afterwards.

In fp32 a deep model's gradients carry rounding errors of 1e-4 (SmolLM2-135M, norms, against fp64), and they change with
the shape of a row and the number of threads. In fp64 what is left is what is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import psutil  # type: ignore[import-untyped]  # has no types
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from eft.core.constants import IGNORE_INDEX
from eft.core.records import TokenSample
from eft.models.attention import base_of
from eft.models.compile import without_compilation
from eft.models.experts import eager_experts, install_experts
from eft.models.quantised import plain_layers

GRADIENT_FLOOR = 1e-3
"""A tensor's gradient is measured against its own norm, or this share of the whole gradient's norm if that is more."""

_STOCK = ("sdpa", "eager")
_FACTOR_SPREAD = 0.02
_SEED = 20_240_817
_MEMORY_SHARE = 0.8


@dataclass(frozen=True)
class Limits:
    """The largest differences that are rounding."""

    logits: float
    """Of the largest logit."""
    loss: float
    gradients: float
    """Per tensor: ‖Δ‖ ÷ max(‖g_t‖, GRADIENT_FLOOR · ‖g‖)."""


LIMITS = {torch.float64: Limits(1e-5, 1e-6, 1e-5), torch.float32: Limits(1e-4, 1e-5, 1e-3)}
"""By the dtype of the comparison; fp32 where fp64 does not fit into memory or lacks a kernel."""


def limits_of(model: nn.Module) -> Limits:
    """What holds inside `exact_arithmetic`."""
    return LIMITS[next(model.parameters()).dtype]


def dtype_name(model: nn.Module) -> str:
    """`fp64` or `fp32`."""
    return f"fp{torch.finfo(next(model.parameters()).dtype).bits}"


@contextmanager
def exact_arithmetic(model: nn.Module) -> Iterator[None]:
    """Inside it the model computes in fp64 without dropout, and its zero factors hold small random numbers."""
    with comparable_weights(model), widened(model):
        yield


@contextmanager
def comparable_weights(model: nn.Module) -> Iterator[None]:
    """Inside it there is no dropout, and trained tensors that were zero hold small random numbers.

    A LoRA factor at zero would hide the gradient of the other one. Leaves no gradients.
    """
    modes = {module: module.training for module in model.modules()}
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
        model.zero_grad()
        for module, training in modes.items():
            module.training = training


@contextmanager
def widened(model: nn.Module) -> Iterator[None]:
    """Inside it all weights, buffers and gradients are fp64. Widening and narrowing again changes no bit.

    Quantised layers are plain ones inside, with the weights that they stand for. Leaves no gradients.
    """
    with plain_layers(model), _in_fp64(model):
        yield


@contextmanager
def _in_fp64(model: nn.Module) -> Iterator[None]:
    narrow = [(tensor, tensor.dtype) for tensor in _floats(model) if tensor.dtype != torch.float64]
    # What sums up in another dtype than its own is to do so in the wide one.
    sums = [(p, p.grad_dtype) for p in model.parameters() if p.requires_grad and p.grad_dtype not in (None, p.dtype)]
    for parameter, _ in sums:
        parameter.grad_dtype = None
    _widen(model)
    try:
        yield
    finally:
        model.zero_grad()
        for tensor, before in narrow:
            tensor.data = tensor.data.to(before)
        for parameter, gradients in sums:
            parameter.grad_dtype = gradients


def _widen(model: nn.Module) -> None:
    """All weights and buffers to fp64; to fp32 where that needs too much memory, or a kernel does not know it."""
    if _fits_in_double(model):
        install_experts(base_of(model))  # as every trainer's are; transformers' know no fp64
        for tensor in _floats(model):
            tensor.data = tensor.data.double()
        if _runs(model):
            return
    for tensor in _floats(model):
        tensor.data = tensor.data.float()


@torch.no_grad()
def _runs(model: nn.Module) -> bool:
    """Whether the model computes at all in the dtype that it has."""
    ids = torch.zeros((1, 2), dtype=torch.int64, device=next(model.parameters()).device)
    try:
        model(input_ids=ids, use_cache=False)
    except (RuntimeError, NotImplementedError):
        return False
    return True


def _floats(model: nn.Module) -> list[Tensor]:
    return [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()]


def _fits_in_double(model: nn.Module) -> bool:
    """Whether weights and two sets of gradients in fp64 fit into the memory that is free now."""
    parameters = list(model.parameters())
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    needed = 8 * (sum(parameter.numel() for parameter in parameters) + 2 * trained)
    device = parameters[0].device
    held = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return device.type in ("cpu", "cuda") and needed - held < _MEMORY_SHARE * free


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
    """Inside it the model runs transformers' sdpa, unless it has a stock attention already.

    A family that sdpa cannot compute (sinks, soft-capped scores) stays with what it has, which works without boundaries
    too.
    """
    base = base_of(model)
    config = base.config.get_text_config()
    installed = config._attn_implementation
    soft_capped = getattr(config, "attn_logit_softcapping", None) is not None
    if installed in _STOCK or soft_capped:
        yield
        return
    try:
        base.set_attn_implementation("sdpa")
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        base.set_attn_implementation(installed)


@contextmanager
def plain_forward(model: nn.Module) -> Iterator[None]:
    """Inside it the model runs as its family has it: stock attention, expert by expert, no recomputation, no compiler.

    Activation checkpointing is off afterwards too; a trainer that wants it switches it on when it is built.
    """
    base = base_of(model)
    if base.is_activation_checkpointing:
        base.activation_checkpointing_disable()
    with stock_attention(model), eager_experts(base), without_compilation():
        yield


def trained_tokens(document: TokenSample, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(positions int64 [K], targets int64 [K], weights [K]) of a document: position t predicts token t + 1."""
    labels = torch.tensor(document.labels[1:], dtype=torch.int64, device=device)
    positions = torch.nonzero(labels != IGNORE_INDEX).flatten()
    weights = torch.ones(len(labels)) if document.weights is None else torch.tensor(document.weights[1:])
    return positions, labels[positions], weights.to(device)[positions]


@dataclass(frozen=True)
class PlainObjective:
    """What is added to the negative log-likelihood, as torch's own functions have it."""

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    entropy_power: float | None = None
    entropy_tokens: int = 20

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Losses [K] from logits [K, vocab], in fp32 at least, as transformers computes them."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = F.cross_entropy(logits, targets, reduction="none", label_smoothing=self.label_smoothing)
        losses = losses + self.z_loss * logits.logsumexp(-1).square()
        if self.entropy_power is None:
            return losses
        top = logits.detach().topk(min(self.entropy_tokens, logits.shape[-1])).values
        entropy = -(top.softmax(-1) * top.log_softmax(-1)).sum(-1)
        factor: Tensor = (entropy / math.log(top.shape[-1])) ** self.entropy_power
        return losses * factor


PLAIN_NLL = PlainObjective()


def plain_loss(model: nn.Module, documents: Sequence[TokenSample], objective: PlainObjective = PLAIN_NLL) -> float:
    """Σ weight · loss ÷ Σ weight, one document at a time; its gradient is added to the parameters'.

    Nothing of eft is in here: token ids go into the model, the whole logits into torch's cross entropy.
    """
    device = next(model.parameters()).device
    total = sum(float(trained_tokens(document, device)[2].sum()) for document in documents)
    loss = 0.0
    for document in documents:
        positions, targets, weights = trained_tokens(document, device)
        ids = torch.tensor(document.input_ids, dtype=torch.int64, device=device)
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
        part = (weights * objective(logits[positions], targets)).sum() / total
        part.backward()
        loss += float(part.detach())
    return loss


def plain_batch_loss(model: nn.Module, documents: Sequence[TokenSample], objective: PlainObjective) -> float:
    """The same in one forward and one backward pass over padded rows: in low precision, sums over passes round too."""
    device = next(model.parameters()).device
    rows = [torch.tensor(document.input_ids, dtype=torch.int64, device=device) for document in documents]
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    logits = model(input_ids=pad_sequence(rows, batch_first=True), attention_mask=mask, use_cache=False).logits
    parts, total = [], 0.0
    for row, document in zip(logits, documents, strict=True):
        positions, targets, weights = trained_tokens(document, device)
        parts.append((weights * objective(row[positions], targets)).sum())
        total += float(weights.sum())
    loss = torch.stack(parts).sum() / total
    loss.backward()
    return float(loss.detach())


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

    def is_within(self, limits: Limits) -> bool:
        """Rounding only, and not measured against nothing. NaN is neither."""
        return self.share <= limits.gradients and self.norm > 0


@dataclass(frozen=True)
class GradientErrors:
    """How far gradients are from exact ones."""

    whole: float
    """‖Δ‖ ÷ ‖g‖ over all tensors together."""
    typical: float
    """Root mean square over the tensors of ‖Δ_t‖ ÷ max(‖g_t‖, GRADIENT_FLOOR · ‖g‖): small tensors count, too."""


def gradient_errors(measured: dict[str, Tensor], expected: dict[str, Tensor]) -> GradientErrors:
    """Of `measured` against `expected`; a tensor without a gradient counts as zero."""
    norms = {name: float(gradient.double().norm()) for name, gradient in expected.items()}
    norm = math.hypot(*norms.values())
    gaps, shares = [], []
    for name, wanted in expected.items():
        there = measured.get(name, torch.zeros((), device=wanted.device))
        gaps.append(float((there.double() - wanted.double()).norm()))
        shares.append(gaps[-1] / max(norms[name], GRADIENT_FLOOR * norm, 1e-30))
    return GradientErrors(math.hypot(*gaps) / max(norm, 1e-30), math.hypot(*shares) / math.sqrt(max(len(shares), 1)))


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
