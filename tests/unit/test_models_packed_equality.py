"""E1 against fp64: each family, under each attention, in fp32 and in bf16, packed in one row.

The reference is the family's stock model in fp64, one document at a time, and a loss written out. In bf16 the yardstick
is plain transformers' own step in bf16: our error may be 1.5 times its error, and no more.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from eft.core.errors import ModelError
from eft.models.attention import BoundarySupport, boundary_inputs, install_attention, packed_forward, packing_support
from tests.families.oracle import packed_batch
from tests.tiny_models import VOCAB_SIZE, tiny_model

FAMILIES = [
    "llama", "qwen2", "qwen3", "qwen3_moe", "mistral", "mixtral", "gemma2", "gemma3_text", "phi3", "olmo2", "gpt_neox",
    "smollm3", "granite", "cohere2", "deepseek_v3", "gpt_oss", "llama4_text",
]  # fmt: skip
LENGTHS = (150, 1, 40, 7, 40, 18)
"""One longer than a tile of the CPU's attention, one without a target, two alike."""
MASKS_IN = {("gpt_oss", "eager")}
"""Families that ignore position ids with stock attention, so that only a prebuilt mask keeps documents apart."""
REFUSED = {("gemma2", "sdpa"), ("gpt_oss", "sdpa")}
"""transformers itself does not offer this attention to the family."""
WAYS = [(family, attention) for family in FAMILIES for attention in ("eft", "sdpa", "eager")]
YARDSTICK = 1.5
WITH_EXPERTS, WITH_EXPERTS_SEEDS = {"qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss"}, 6
"""Rounding that sends one token to another expert moves the error as it likes: several models even that out."""


@dataclass(frozen=True)
class Step:
    """What one step gives: logits [T, V], the loss per trained token, and gradients by name."""

    logits: Tensor
    loss: float
    gradients: dict[str, Tensor]


def documents() -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, VOCAB_SIZE, (length,), generator=generator) for length in LENGTHS]


def loss_of(logits: list[Tensor]) -> Tensor:
    """Mean negative log-likelihood of every token but each document's first, in a dozen plain operations."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for document, scores in zip(documents(), logits, strict=True):
        likelihood = scores.double().log_softmax(-1)[:-1].gather(1, document[1:, None])
        total, count = total - likelihood.sum(), count + len(likelihood)
    return total / count


def step_of(model: nn.Module, logits: list[Tensor]) -> Step:
    loss = loss_of(logits)
    loss.backward()
    gradients = {name: parameter.grad.double() for name, parameter in model.named_parameters()}
    return Step(torch.cat(logits).detach().double(), loss.item(), gradients)


@cache
def alone(family: str, dtype: torch.dtype, seed: int = 0) -> Step:
    """Plain transformers, one document at a time: whole in fp64 or fp32, or in bf16 by autocast."""
    exact = dtype == torch.float64
    # Grouped expert products know no fp64.
    model = tiny_model(family, seed=seed, **({"experts_implementation": "eager"} if exact else {})).to(
        dtype=dtype if exact else None
    )
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        logits = [model(input_ids=document[None], use_cache=False).logits[0] for document in documents()]
    return step_of(model, logits)


def packed(family: str, implementation: str, *, half: bool, seed: int = 0) -> tuple[BoundarySupport, Step]:
    model = tiny_model(family, seed=seed)
    install_attention(model, implementation)
    autocast = torch.bfloat16 if half else None
    support = packing_support(model, autocast_dtype=autocast)
    inputs = boundary_inputs(support, model, packed_batch(documents()))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half), packed_forward():
        logits = model(**inputs, use_cache=False).logits[0]
    return support, step_of(model, list(logits.split(LENGTHS)))


def errors_of(step: Step, exact: Step) -> tuple[float, float, float]:
    """Errors of the logits, of the gradient over all parameters, and of the loss, each as a share of the exact one."""
    difference = torch.cat([(step.gradients[name] - exact.gradients[name]).flatten() for name in exact.gradients])
    gradient = torch.cat([gradient.flatten() for gradient in exact.gradients.values()])
    logits = (step.logits - exact.logits).norm() / exact.logits.norm()
    return float(logits), float(difference.norm() / gradient.norm()), abs(step.loss - exact.loss) / exact.loss


@pytest.mark.parametrize(("family", "implementation"), [way for way in WAYS if way not in REFUSED])
def test_fp32_equals_documents_alone_in_fp64(family: str, implementation: str) -> None:
    exact = alone(family, torch.float64)
    support, ours = packed(family, implementation, half=False)
    assert support.mode == ("mask" if (family, implementation) in MASKS_IN else "native"), support.reason
    assert (ours.logits - exact.logits).abs().max() <= 1e-5 * exact.logits.abs().max()
    assert ours.loss == pytest.approx(exact.loss, rel=1e-6)
    total = torch.stack([gradient.norm() for gradient in exact.gradients.values()]).norm()
    for name, gradient in exact.gradients.items():
        limit = 1e-5 * max(gradient.norm(), 1e-3 * total)
        assert (ours.gradients[name] - gradient).norm() <= limit, name


@pytest.mark.parametrize(("family", "implementation"), [way for way in WAYS if way not in REFUSED])
def test_bf16_is_as_near_to_fp64_as_plain_transformers(family: str, implementation: str) -> None:
    errors: list[list[float]] = []
    for seed in range(WITH_EXPERTS_SEEDS if family in WITH_EXPERTS else 1):
        exact, plain = alone(family, torch.float64, seed), alone(family, torch.bfloat16, seed)
        _, ours = packed(family, implementation, half=True, seed=seed)
        errors.append([error for step in (ours, plain) for error in errors_of(step, exact)])
    # The root of the mean square over seeds.
    ours_logits, ours_gradient, ours_loss, logits, gradient, loss = (
        torch.tensor(errors).square().mean(0).sqrt().tolist()
    )
    assert ours_logits <= YARDSTICK * logits
    assert ours_gradient <= YARDSTICK * gradient
    # A single number may be right by luck, so a sixteenth of the format's spacing is the least that is asked of it.
    assert ours_loss <= max(YARDSTICK * loss, torch.finfo(torch.bfloat16).eps / 16)


@pytest.mark.parametrize(("family", "implementation"), sorted(REFUSED))
def test_attention_that_a_family_does_not_have_is_refused_by_name(family: str, implementation: str) -> None:
    with pytest.raises(ModelError, match=f"attn_implementation: {implementation} cannot be used with"):
        install_attention(tiny_model(family), implementation)
