"""What is true of a family, measured without the product's probe: packed rows against documents alone.

The alone runs use the family's stock attention. Longer documents than the probe's, some beyond every limit on how far a
token looks; each document is perturbed in turn; gradients are compared; the model is in training mode.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from eft.models.attention import BoundarySupport, boundary_inputs, forward_accepts, packed_forward
from tests.families.shrink import VOCAB_SIZE

LENGTHS = (41, 1, 12, 41, 30)
_DRAWN_BELOW = VOCAB_SIZE - 8
"""The last ids stand for images and the like in some families."""


@dataclass(frozen=True)
class Truth:
    """Largest differences, as shares of the largest logit, or of the gradient's norm."""

    difference: float
    """Logits of documents in the packed row against alone."""
    leak: float
    """Change of a document's logits when another one is perturbed."""
    gradient: float
    """Largest ‖Δ‖ / max(‖g_t‖, 1e-3 ‖g‖) over the parameters."""
    visible: float
    """Difference when the row is one document: what a leak would amount to. 0 would mean a blind oracle."""


def run_alone(stock: PreTrainedModel) -> None:
    """One forward and backward of the plain model; raises what the family raises."""
    _logits(stock, {"input_ids": draw(torch.Generator().manual_seed(7))[0][None]}).float().sum().backward()
    stock.zero_grad()


def draw(generator: torch.Generator) -> list[Tensor]:
    """Documents of random token ids."""
    return [torch.randint(3, _DRAWN_BELOW, (length,), generator=generator) for length in LENGTHS]


def packed_batch(documents: list[Tensor]) -> dict[str, Any]:
    """What the collator emits for documents end to end in one row."""
    lengths = [len(document) for document in documents]
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    return {
        "input_ids": torch.cat(documents)[None],
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
        "seq_idx": torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).int()[None],
    }


def measure(model: PreTrainedModel, stock: PreTrainedModel, support: BoundarySupport) -> Truth:
    """`model` and `stock` have equal weights; `stock` keeps its own attention."""
    generator = torch.Generator().manual_seed(7)
    documents = draw(generator)
    targets = torch.randint(0, VOCAB_SIZE, (sum(LENGTHS),), generator=generator)
    alone = torch.cat([_logits(stock, {"input_ids": document[None]}) for document in documents])
    packed = _packed(model, support, documents)
    F.cross_entropy(alone.float(), targets, reduction="sum").backward()
    F.cross_entropy(packed.float(), targets, reduction="sum").backward()
    scale = alone.detach().abs().max()
    with torch.no_grad():
        joined = _logits(stock, {"input_ids": torch.cat(documents)[None]})
        leak = max(_leak(model, support, documents, packed.detach(), index) for index in range(len(documents)))
    return Truth(
        difference=float((packed.detach() - alone.detach()).abs().max() / scale),
        leak=float(leak / scale),
        gradient=_gradient_difference(model, stock),
        visible=float((joined - alone.detach()).abs().max() / scale),
    )


def _leak(
    model: PreTrainedModel, support: BoundarySupport, documents: list[Tensor], packed: Tensor, index: int
) -> float:
    changed = [
        (document - 3 + 1) % (_DRAWN_BELOW - 3) + 3 if place == index else document
        for place, document in enumerate(documents)
    ]
    change = (_packed(model, support, changed) - packed).abs().split(LENGTHS)
    return max(float(part.max()) for place, part in enumerate(change) if place != index)


def _packed(model: PreTrainedModel, support: BoundarySupport, documents: list[Tensor]) -> Tensor:
    inputs = boundary_inputs(support, model, packed_batch(documents))
    with packed_forward():
        return _logits(model, inputs)


def _logits(model: PreTrainedModel, inputs: dict[str, Any]) -> Tensor:
    """float [T, V]"""
    extra = {"use_cache": False} if forward_accepts(model, "use_cache") else {}
    logits: Tensor = model(**inputs, **extra).logits[0]
    return logits


def _gradient_difference(model: PreTrainedModel, stock: PreTrainedModel) -> float:
    """E2's measure of gradients: each tensor against its own norm, or a thousandth of the whole."""
    pairs = [
        (ours.grad, theirs.grad)
        for ours, theirs in zip(model.parameters(), stock.parameters(), strict=True)
        if theirs.grad is not None or ours.grad is not None
    ]
    if any(ours is None or theirs is None for ours, theirs in pairs):
        return float("inf")
    total = torch.stack([theirs.norm() for _, theirs in pairs if theirs is not None]).norm()
    return max(
        float((ours - theirs).norm() / torch.maximum(theirs.norm(), 1e-3 * total))
        for ours, theirs in pairs
        if ours is not None and theirs is not None
    )
