"""What is proven when a training begins and in its first steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import TrainerCallback

from eft.callbacks.context import CallbackContext
from eft.config.root import TrainConfig
from eft.core.errors import PromiseBroken
from eft.core.records import PromiseResult
from eft.models.probes import TrainedTensorAudit
from eft.optim.optimizers import silent_steps
from eft.optim.schedulers import warmup_of

AUDIT_STEP = 3
"""LoRA's A factor has no gradient while B is zero, so one step is too early to expect every tensor to have moved."""


class StartChecks(TrainerCallback):
    """At the first step: every key the user set was read (E8). After step 3: what should train trains, nothing else."""

    def __init__(self, config: TrainConfig, context: CallbackContext) -> None:
        self.config = config
        self.context = context
        self.audit: TrainedTensorAudit | None = None
        self.audit_at = 0
        self.certain_at = 0
        """From this step on a tensor that never changed is at fault, whatever the reason."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Check the config, remember the weights."""
        self._record(self.context.check_keys_read())
        # Asked only now: looking at keys here must not count as using them.
        quiet = max(state.global_step, silent_steps(self.config))
        self.audit_at = quiet + AUDIT_STEP
        self.certain_at = max(quiet, warmup_of(self.config, args.max_steps)) + AUDIT_STEP
        if self.audit_at <= args.max_steps:
            self.audit = TrainedTensorAudit(model)
            self.audit.start()

    def on_step_end(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Compare; once more after the warm-up where its first learning rates may be too small to tell."""
        if self.audit is None or state.global_step < self.audit_at:
            return
        result = self.audit.check()
        if state.global_step < self.certain_at and result.numbers["moved"] == 0 and self._is_rounded(model, optimizer):
            self.audit_at = self.certain_at
            return
        if result.status == "fail" and self.config.bfloat16 and result.numbers["moved"] == 0:
            result = self._kept_in_fp32(result, model, optimizer)
        self.audit.close()
        self.audit = None
        self._record(result)

    def _kept_in_fp32(self, result: PromiseResult, model: Any, optimizer: Any) -> PromiseResult:
        """In bf16 a tensor may take long to show its first update; none is lost meanwhile (`bf16_update`)."""
        if not self._is_rounded(model, optimizer):
            return result
        idle = int(result.numbers["idle"])
        detail = f"{idle} of {int(result.numbers['trainable'])} tensors were updated by less than a bf16 step so far"
        return PromiseResult(result.promise, result.title, "pass", detail, result.numbers)

    def _is_rounded(self, model: Any, optimizer: Any) -> bool:
        """Whether some tensors did get gradients, only that their updates were below the last bit of their weights."""
        assert self.audit is not None
        parameters, updated = dict(model.named_parameters()), optimizer.state
        # Optimizers keep state from a parameter's first gradient on, all zeros while its gradients are; plain SGD keeps
        # none, and cannot tell; nor can ZeRO, whose state is that of flat buffers.
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        return bool(self.audit.idle) and all(
            not updated or id(parameters[name]) not in held or _has_moments(updated.get(parameters[name], {}))
            for name in self.audit.idle
        )

    def _record(self, result: PromiseResult) -> None:
        # A run that goes back to a checkpoint begins twice.
        promises = self.context.outcome.promises
        promises[:] = [other for other in promises if (other.promise, other.title) != (result.promise, result.title)]
        promises.append(result)
        if result.status == "fail":
            raise PromiseBroken(f"{result.promise} {result.title}: {result.detail}")


def _has_moments(state: Mapping[str, Any]) -> bool:
    """Whether an optimizer has gathered anything but zeros for a parameter."""
    return any(isinstance(value, Tensor) and value.ndim > 0 and bool(value.any()) for value in state.values())
