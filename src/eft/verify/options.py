"""E4: what changes memory and speed changes no number; each option that is on, against plain transformers.

The loss without logits is always on, so it comes first, alone; then each option by itself, then all together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from eft.core.records import PromiseResult, TokenSample
from eft.verify.exact import (
    compare_gradients,
    dtype_name,
    limits_of,
    plain_forward,
    plain_loss,
    take_gradients,
)
from eft.verify.excerpt import as_dataset, first_documents
from eft.verify.loss import trainer_loss
from eft.verify.verification import NO_OPTIONS, Verification

NUM_DOCUMENTS = 3
LONGEST = 64
ALWAYS_ON = "the loss without logits"
TOGETHER = "all of them together"

Check = Callable[[], list[PromiseResult]]


@dataclass(frozen=True)
class _Reference:
    """One step of a plain program over the documents."""

    documents: list[TokenSample]
    loss: float
    gradients: dict[str, Tensor]


def option_checks(verification: Verification) -> list[tuple[str, Check]]:
    """(what, check) for each option that is on. Call the checks inside `exact_arithmetic`; they leave no gradients."""
    config = verification.config
    switches = {
        "activation checkpointing": ("gradient_checkpointing", config.gradient_checkpointing),
        "activation offloading": ("activation_offloading", config.activation_offloading),
        "compiled layers": ("torch_compile", config.torch_compile),
    }
    on = {title: {key: True} for title, (key, is_on) in switches.items() if is_on}
    together = {key: True for keys in on.values() for key in keys}
    variants: dict[str, Mapping[str, Any]] = {ALWAYS_ON: {}, **on, **({TOGETHER: together} if len(on) > 1 else {})}
    reference = cache(partial(_plain_reference, verification))
    return [(title, partial(_check, verification, title, keys, reference)) for title, keys in variants.items()]


def _plain_reference(verification: Verification) -> _Reference:
    documents = first_documents(verification.plan, NUM_DOCUMENTS, LONGEST)
    model = verification.model
    model.train()
    with plain_forward(model):
        loss = plain_loss(model, documents, verification.objective())
    return _Reference(documents, loss, take_gradients(model))


def _check(
    verification: Verification, title: str, keys: Mapping[str, Any], reference: Callable[[], _Reference]
) -> list[PromiseResult]:
    """One step of the trainer with this option only, against the plain program."""
    expected, model = reference(), verification.model
    with plain_forward(model):
        pass  # whatever the last trainer switched on is off
    trainer = verification.build_exact_trainer({**NO_OPTIONS, **keys})
    model.train()
    loss = trainer_loss(trainer, as_dataset(expected.documents), 1)
    gap = compare_gradients(take_gradients(model), expected.gradients)
    limits = limits_of(model)
    loss_gap = abs(loss - expected.loss) / abs(expected.loss)
    faults = []
    if not loss_gap <= limits.loss:
        faults.append(f"loss {loss:.7g}, expected {expected.loss:.7g}")
    if not gap.is_within(limits):
        faults.append(f"gradients differ by {gap.share:.1e} in {gap.tensor or 'all'}")
    tokens = sum(len(document.input_ids) for document in expected.documents)
    measured = (
        f"{len(expected.documents)} documents, {tokens} tokens: loss {loss_gap:.1e}, gradients {gap.share:.1e} from "
        f"plain transformers; {dtype_name(model)}{verification.precision_note()}"
    )
    numbers = {"loss": loss_gap, "gradients": gap.share}
    if "torch_compile" in keys:
        # Graphs of a dtype that the run does not have.
        torch.compiler.reset()
    detail = "; ".join([*faults, measured])
    return [PromiseResult("E4", f"{title}: the same step", "fail" if faults else "pass", detail, numbers)]
