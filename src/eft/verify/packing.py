"""E1: a document in a packed row gives what it gives alone, and sees nothing of its neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from eft.core.records import PromiseResult, TokenSample
from eft.data.batches import BatchSource
from eft.data.collators import Batch, Collator
from eft.models.attention import measure_boundaries
from eft.models.forward import TrainedLogits
from eft.trainer.trainer import EftTrainer
from eft.verify.exact import (
    GradientGap,
    Limits,
    compare_gradients,
    dtype_name,
    limits_of,
    take_gradients,
    trained_tokens,
)
from eft.verify.excerpt import first_documents
from eft.verify.verification import Verification

NUM_DOCUMENTS = 4
LONGEST = 128
"""Tokens of the longest document of the row."""
PADDING = 64
"""Rows that the run pads are padded here to a multiple of this, so that a row stays short."""


@dataclass(frozen=True)
class _Gaps:
    """Differences between the row and its documents alone."""

    logits: float
    """Of the largest logit."""
    loss: float
    """Of the largest loss of a document."""
    leak: float
    own_change: float
    gradients: GradientGap
    leak_limit: float

    def faults(self, limits: Limits) -> list[str]:
        """What is beyond its limit. Written so that NaN is."""
        faults = []
        if not self.own_change > 0:
            faults.append("the logits do not depend on the tokens, so nothing can be proven")
        if not self.leak <= self.leak_limit:
            faults.append(f"documents see each other: leak {self.leak:.1e} of the largest logit")
        if not self.logits <= limits.logits:
            faults.append(f"logits differ from those alone by {self.logits:.1e} of the largest")
        if not self.loss <= limits.loss:
            faults.append(f"a document's loss differs from that alone by {self.loss:.1e}")
        if not self.gradients.is_within(limits):
            faults.append(f"gradients differ by {self.gradients.share:.1e} in {self.gradients.tensor or 'all'}")
        return faults


def check_packing(verification: Verification, trainer: EftTrainer) -> PromiseResult:
    """E1 on a row of the user's own documents, through the trainer's forward and collator.

    Call it inside `exact_arithmetic`, with the exact trainer. Leaves no gradients.
    """
    title = "packed documents = the same documents alone"
    documents = first_documents(verification.plan, NUM_DOCUMENTS, LONGEST)
    source: Any = trainer.parts.packing
    forward = trainer.parts.forward
    assert isinstance(source, BatchSource)
    assert isinstance(forward, TrainedLogits)
    collator = short_rows(source.collator)
    trainer.model.eval()
    gaps = _Gaps(
        **_logit_gaps(trainer, collator, documents),
        gradients=_gradient_gap(trainer, collator, documents),
        leak_limit=_leak_limit(trainer, forward),
    )
    faults = gaps.faults(limits_of(trainer.model))
    numbers = {
        "logits": gaps.logits,
        "loss": gaps.loss,
        "leak": gaps.leak,
        "gradients": gaps.gradients.share,
        "documents": float(len(documents)),
    }
    measured = (
        f"{_row_in_words(verification, documents, forward.support.mode)}: leak {gaps.leak:.1e}, logits "
        f"{gaps.logits:.1e}, loss {gaps.loss:.1e}, gradients {gaps.gradients.share:.1e}; "
        f"{dtype_name(trainer.model)}{verification.precision_note()}"
    )
    return PromiseResult("E1", title, "fail" if faults else "pass", "; ".join([*faults, measured]), numbers)


def _leak_limit(trainer: EftTrainer, forward: TrainedLogits) -> float:
    """0, or a rounding error for experts, whose matrix shapes change with the neighbours' routing."""
    if forward.support.mode == "refused":
        return 0.0
    return measure_boundaries(trainer.model, forward.support).leak_limit


def _row_in_words(verification: Verification, documents: Sequence[TokenSample], mode: str) -> str:
    lengths = " + ".join(str(len(document.input_ids)) for document in documents)
    if mode == "refused":
        return f"padded rows of {lengths} tokens, as this model knows no boundaries"
    off = "" if verification.config.sample_packing else ", as in a micro-batch without packing"
    return f"a row of {lengths} tokens ({mode} boundaries{off})"


def short_rows(collator: Collator) -> Collator:
    """The collator, padding to few tokens where it pads at all."""
    padded: Any = collator
    return replace(padded, pad_to=PADDING) if padded.pad_to else collator


def _logit_gaps(trainer: EftTrainer, collator: Collator, documents: list[TokenSample]) -> dict[str, float]:
    """`logits`, `loss`, `leak` and `own_change` of `_Gaps`."""
    model = trainer.model
    perturbed = [_perturbed(documents[0], model.get_input_embeddings().weight.shape[0]), *documents[1:]]
    with torch.no_grad():
        packed = _all_logits(trainer, collator([documents]), documents)
        changed = _all_logits(trainer, collator([perturbed]), documents)
        alone = [_alone_logits(model, document) for document in documents]
        losses = [_loss(logits, document) for logits, document in zip(packed, documents, strict=True)]
        wanted = [_loss(logits, document) for logits, document in zip(alone, documents, strict=True)]
    scale = _largest_gap(alone, [torch.zeros(())] * len(alone))
    return {
        "logits": _largest_gap(packed, alone) / scale,
        "loss": _largest_gap(losses, wanted) / _largest_gap(wanted, [torch.zeros(())] * len(wanted)),
        "leak": _largest_gap(changed[1:], packed[1:]) / scale,
        "own_change": _largest_gap(changed[:1], packed[:1]) / scale,
    }


def _largest_gap(values: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The largest |difference| of all pairs; NaN where any is."""
    gaps = [(a - b.to(a.device)).abs().max() for a, b in zip(values, wanted, strict=True)]
    return float(torch.stack(gaps).max())


def _gradient_gap(trainer: EftTrainer, collator: Collator, documents: list[TokenSample]) -> GradientGap:
    """Gradients of Σ weight · NLL of the row, against those of the documents one after the other."""
    model = trainer.model
    for document in documents:
        _loss(_alone_logits(model, document), document).backward()
    expected = take_gradients(model)
    batch = trainer._prepare_inputs(collator([documents]))
    targets = batch["shift_labels"].reshape(-1)[batch["trained_positions"]]
    weights = torch.cat([trained_tokens(document, targets.device)[2] for document in documents])
    losses = F.cross_entropy(trainer.parts.forward(model, batch), targets, reduction="none")
    (weights * losses).sum().backward()
    return compare_gradients(take_gradients(model), expected)


def _perturbed(document: TokenSample, vocabulary: int) -> TokenSample:
    """Every token replaced by another one."""
    shift = 1 + vocabulary // 3
    return TokenSample((document.input_ids + shift) % vocabulary, document.labels, document.weights)


def _all_logits(trainer: EftTrainer, batch: Batch, documents: list[TokenSample]) -> list[Tensor]:
    """Logits [tokens, vocab] of each document, by the trainer's own forward over the batch."""
    rows, width = batch["input_ids"].shape
    everywhere = {**batch, "trained_positions": torch.arange(rows * width)}
    logits = trainer.parts.forward(trainer.model, trainer._prepare_inputs(everywhere))
    starts = [row * width for row in range(len(documents))] if rows > 1 else batch["cu_seq_lens_q"].tolist()
    return [logits[start : start + len(doc.input_ids)] for start, doc in zip(starts, documents, strict=False)]


def _alone_logits(model: Any, document: TokenSample) -> Tensor:
    ids = torch.tensor(document.input_ids, dtype=torch.int64, device=model.device)
    logits: Tensor = model(input_ids=ids[None], use_cache=False).logits[0]
    return logits


def _loss(logits: Tensor, document: TokenSample) -> Tensor:
    """Σ weight · NLL of a document from its logits [tokens, vocab]."""
    positions, targets, weights = trained_tokens(document, logits.device)
    return (weights * F.cross_entropy(logits[positions], targets, reduction="none")).sum()
