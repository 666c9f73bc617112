"""What should be trained is trained: the right tensors ask for gradients, and three steps change them and no other."""

from __future__ import annotations

from peft import PeftModel

from eft.core.records import PromiseResult
from eft.models.adapters import trained_base_parameters
from eft.models.plain import id_of, live_adapter_state
from eft.verify.rehearsal import STEPS, Rehearsal
from eft.verify.verification import Verification

AUDIT = "trained tensors"
"""The name under which the trainer's own audit reports."""


def check_trainable(verification: Verification) -> PromiseResult:
    """Every tensor of the adapter, or every parameter that the freezing keys leave, asks for gradients."""
    model = verification.model
    parameters = dict(model.named_parameters())
    if isinstance(model, PeftModel):
        adapter = {id_of(tensor) for tensor in live_adapter_state(model, with_embeddings=False).values()}
        wanted = {name for name, parameter in parameters.items() if id_of(parameter) in adapter}
        what = "adapter tensors"
    else:
        wanted = trained_base_parameters(model, verification.config) & parameters.keys()
        what = "chosen tensors"
    frozen = sorted(name for name in wanted if not parameters[name].requires_grad)
    trained = sum(parameter.numel() for parameter in parameters.values() if parameter.requires_grad)
    numbers = {"wanted": float(len(wanted)), "frozen": float(len(frozen)), "trained_parameters": float(trained)}
    title = "what the config trains asks for gradients"
    if frozen or not wanted:
        detail = f"{len(frozen)} of {len(wanted)} {what} are frozen: {', '.join(frozen[:3])}"
        return PromiseResult(AUDIT, title, "fail", detail, numbers)
    return PromiseResult(AUDIT, title, "pass", f"all {len(wanted)} {what}, {trained:,} parameters", numbers)


def check_movement(rehearsal: Rehearsal) -> PromiseResult:
    """The trainer's audit after the rehearsal's last step."""
    audits = [promise for promise in rehearsal.promises if promise.promise == AUDIT]
    if audits:
        return audits[0]
    title = "every trainable tensor changes, no frozen one does"
    if rehearsal.error is None:
        # An optimizer that starts silently, or a long warm-up: the trainer's audit waits for those.
        later = f"too early to tell after {STEPS} steps of this optimizer and warm-up; the run itself checks later"
        return PromiseResult(AUDIT, title, "not applicable", later)
    return PromiseResult(AUDIT, title, "fail", f"step {STEPS} was not reached: {rehearsal.error}")
