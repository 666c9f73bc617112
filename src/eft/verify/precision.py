"""The yardstick of half precision: our step is as near to the exact one as plain transformers' own step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from eft.core.records import PromiseResult, TokenSample
from eft.runtime.env import Environment, Precision, resolve_precision
from eft.trainer.trainer import EftTrainer
from eft.verify.exact import (
    GradientErrors,
    PlainObjective,
    comparable_weights,
    dtype_name,
    gradient_errors,
    plain_batch_loss,
    plain_forward,
    plain_loss,
    take_gradients,
    widened,
)
from eft.verify.excerpt import as_dataset, first_documents
from eft.verify.loss import trainer_loss
from eft.verify.verification import NO_EXPERT_BALANCE, NO_OPTIONS, Verification

NUM_DOCUMENTS = 4
LONGEST = 64
ALLOWED = 1.5
"""Times the error of plain transformers."""
TITLE = "a step in bf16 is as near to fp64 as plain transformers' own"


@dataclass(frozen=True)
class _Step:
    loss: float
    gradients: dict[str, Tensor]


@dataclass(frozen=True)
class _Errors:
    """Of one step against the exact one."""

    loss: float
    """|Δ|."""
    gradients: GradientErrors


def check_half_precision(verification: Verification) -> list[PromiseResult]:
    """The run's own step, as the config has it, on the first documents of the plan; nothing where it runs in fp32.

    Exact: the same weights and documents in fp64 by a plain program. Plain: one padded batch through transformers'
    own forward in the run's dtype. Call it outside `exact_arithmetic`; it leaves no gradients.
    """
    precision = resolve_precision(verification.config, Environment.detect())
    if precision.compute_dtype == torch.float32:
        return []
    if precision.compute_dtype != torch.bfloat16:
        return [PromiseResult("E2", TITLE, "not applicable", "fp16 scales its loss; only bf16 is judged")]
    model, objective = verification.model, verification.objective()
    documents = first_documents(verification.plan, NUM_DOCUMENTS, LONGEST)
    with comparable_weights(model):
        # Gives the weights the run's dtypes, and no option yet: Liger's kernels cannot be taken off again.
        verification.build_trainer(verification.config_with({**NO_OPTIONS, **NO_EXPERT_BALANCE}))
        model.train()
        exact, exact_dtype = _exact_step(model, documents, objective)
        plain = _plain_step(model, documents, objective, precision)
        trainer = verification.build_trainer(verification.config_with(NO_EXPERT_BALANCE))
        ours = _our_step(trainer, documents)
    return [_judged(_errors(ours, exact), _errors(plain, exact), abs(exact.loss), exact_dtype)]


def _exact_step(model: nn.Module, documents: list[TokenSample], objective: PlainObjective) -> tuple[_Step, str]:
    with widened(model), plain_forward(model):
        loss = plain_loss(model, documents, objective)
        return _Step(loss, take_gradients(model)), dtype_name(model)


def _plain_step(
    model: nn.Module, documents: list[TokenSample], objective: PlainObjective, precision: Precision
) -> _Step:
    device = next(model.parameters()).device.type
    with plain_forward(model), torch.autocast(device, precision.compute_dtype, enabled=precision.autocast):
        loss = plain_batch_loss(model, documents, objective)
    return _Step(loss, take_gradients(model))


def _our_step(trainer: EftTrainer, documents: list[TokenSample]) -> _Step:
    # As `train()` does; it is what puts the forward under autocast.
    prepared = trainer.accelerator.prepare_model(trainer.model)
    try:
        prepared.train()
        loss = trainer_loss(trainer, as_dataset(documents), 1)
    finally:
        trainer.accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
        # accelerate takes back its wrapper but not this mark, with which the next trainer would go without autocast.
        prepared._is_accelerate_prepared = False
    return _Step(loss, take_gradients(trainer.model))


def _errors(step: _Step, exact: _Step) -> _Errors:
    return _Errors(abs(step.loss - exact.loss), gradient_errors(step.gradients, exact.gradients))


def _judged(ours: _Errors, plain: _Errors, loss: float, exact_dtype: str) -> PromiseResult:
    """Written so that NaN fails. A loss may be near the exact one by chance, so its error has a floor."""
    floor = torch.finfo(torch.bfloat16).eps * loss
    pairs = {
        "loss": (ours.loss, max(plain.loss, floor)),
        "gradients": (ours.gradients.whole, plain.gradients.whole),
        "gradients, tensor by tensor": (ours.gradients.typical, plain.gradients.typical),
    }
    faults = [
        f"{name}: error {mine:.1e}, more than {ALLOWED} times {theirs:.1e}"
        for name, (mine, theirs) in pairs.items()
        if not mine <= ALLOWED * theirs
    ]
    measured = (
        f"gradients are off by {ours.gradients.whole:.2e} of their norm, plain transformers' by "
        f"{plain.gradients.whole:.2e} (tensor by tensor {ours.gradients.typical:.2e} and "
        f"{plain.gradients.typical:.2e}); loss by {ours.loss:.1e} and {plain.loss:.1e}; against {exact_dtype}"
    )
    numbers = {
        "gradients": ours.gradients.whole,
        "plain_gradients": plain.gradients.whole,
        "by_tensor": ours.gradients.typical,
        "plain_by_tensor": plain.gradients.typical,
        "loss": ours.loss,
        "plain_loss": plain.loss,
    }
    return PromiseResult("E2", TITLE, "fail" if faults else "pass", "; ".join([*faults, measured]), numbers)
