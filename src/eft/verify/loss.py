"""E2: the trainer's loss and gradients of a step equal those of a plain program, however the step is cut up."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np

from eft.core.constants import IGNORE_INDEX
from eft.core.records import PromiseResult, TokenDataset, TokenSample
from eft.data.batches import BatchSource
from eft.data.collators import Batch
from eft.trainer.trainer import EftTrainer
from eft.verify.exact import (
    GradientGap,
    compare_gradients,
    dtype_name,
    limits_of,
    plain_loss,
    stock_attention,
    take_gradients,
)
from eft.verify.excerpt import as_dataset, first_documents
from eft.verify.packing import short_rows
from eft.verify.verification import Verification

ACCUMULATIONS = (1, 2, 4)
NUM_DOCUMENTS = 8
LONGEST = 64


def check_loss(verification: Verification, trainer: EftTrainer) -> PromiseResult:
    """E2 on the first documents of the plan, as one global batch, cut into 1, 2 and 4 micro-batches of uneven size.

    Between them come a micro-batch whose labels are all masked, and the dummy of a rank without a share (D3). Call it
    inside `exact_arithmetic`, with the exact trainer. Leaves no gradients.
    """
    documents = first_documents(verification.plan, NUM_DOCUMENTS, LONGEST)
    dataset = as_dataset(documents)
    model = trainer.model
    limits = limits_of(model)
    model.train()
    with stock_attention(model):
        expected_loss = plain_loss(model, documents, verification.objective())
    expected = take_gradients(model)
    faults: list[str] = []
    worst_loss, worst = 0.0, GradientGap(0.0, "", 0.0)
    for accumulation in ACCUMULATIONS:
        loss = trainer_loss(trainer, dataset, accumulation)
        loss_gap = abs(loss - expected_loss) / abs(expected_loss)
        gap = compare_gradients(take_gradients(model), expected)
        if not loss_gap <= limits.loss:
            faults.append(f"accumulation {accumulation}: loss {loss:.7g}, expected {expected_loss:.7g}")
        if not gap.is_within(limits):
            faults.append(f"accumulation {accumulation}: gradients differ by {gap.share:.1e} in {gap.tensor or 'all'}")
        worst_loss = max(worst_loss, loss_gap)
        worst = max(worst, gap, key=lambda entry: entry.share)
    tokens = sum(len(document.input_ids) for document in documents)
    measured = (
        f"{len(documents)} documents, {tokens} tokens, accumulation {', '.join(map(str, ACCUMULATIONS))}: loss "
        f"{worst_loss:.1e}, gradients {worst.share:.1e} from plain cross entropy; "
        f"{dtype_name(model)}{verification.precision_note()}"
    )
    return PromiseResult(
        "E2",
        "step loss = Σ weight·NLL ÷ Σ weight of the global batch",
        "fail" if faults else "pass",
        "; ".join([*faults, measured]),
        {"loss": worst_loss, "gradients": worst.share, "expected_loss": expected_loss},
    )


def trainer_loss(trainer: EftTrainer, dataset: TokenDataset, accumulation: int) -> float:
    """The loss of one optimizer step over all of `dataset`, through the trainer; adds its gradient.

    With two micro-batches of no weight: one that is all masked, and a rank's dummy.
    """
    packing: Any = trainer.parts.packing
    batches = first_step(packing, dataset, accumulation)
    step = {name: batches[0][name] for name in ("step", "step_weight", "step_tokens")}
    collator = short_rows(packing.collator)
    masked = {**collator([[_masked(dataset.sample(0))]]), **step}
    batches = [*batches[:1], masked, *batches[1:], {**collator([]), **step}]
    weight = trainer._get_num_items_in_batch(batches, trainer.args.device)
    losses = [trainer.training_step(trainer.model, batch, weight) for batch in batches]
    return sum(float(loss) for loss in losses)


def first_step(
    packing: Any, dataset: TokenDataset, accumulation: int, *, rank: int = 0, world_size: int = 1
) -> list[Batch]:
    """A rank's micro-batches of one step over all of `dataset`, as the run's own loader cuts it."""
    assert isinstance(packing, BatchSource)
    share = replace(
        packing.share,
        accumulation=accumulation,
        micro_batch_size=-(-len(dataset) // (accumulation * world_size)),
        rank=rank,
        world_size=world_size,
    )
    source = replace(
        packing,
        collator=short_rows(packing.collator),
        capacity=min(packing.capacity, 2 * int(dataset.lengths.max())),
        num_epochs=1.0,
        max_steps=1,
        global_batch_size=len(dataset),
        share=share,
        num_workers=0,
    )
    plan = source.make_plan(dataset, None)
    return list(islice(source.train_loader(plan, cursor=lambda: 0), accumulation))


def _masked(document: TokenSample) -> TokenSample:
    return TokenSample(document.input_ids, np.full_like(document.labels, IGNORE_INDEX), document.weights)
