"""The loss of the whole run, also across resumes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from eft.core.errors import CheckpointError
from eft.trainer.parts import PlanLike

GLOBAL_BATCH = "global_batch_size"
"""Under which a checkpoint's progress records the bins of a step (D2)."""


class Progress:
    """Σ loss over the optimizer steps that were logged so far. Upstream keeps only the resumed call's."""

    def __init__(self, loss_sum: float = 0.0, steps: int = 0) -> None:
        self.loss_sum = loss_sum
        self.steps = steps

    def add(self, loss_sum: float, step: int) -> None:
        """Add the summed loss of the steps up to `step`."""
        self.loss_sum += loss_sum
        self.steps = step

    def mean_loss(self, steps: int) -> float:
        """Mean loss per optimizer step over `steps` steps; NaN before the first."""
        return self.loss_sum / steps if steps else float("nan")

    def state(self) -> dict[str, float]:
        """What `from_state` needs."""
        return {"loss_sum": self.loss_sum, "steps": self.steps}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Progress:
        """The sums as they were at the checkpoint."""
        return cls(state["loss_sum"], state["steps"])


def load_progress(checkpoint: str, name: str, plan: PlanLike | None, *, allow_change: bool = False) -> dict[str, Any]:
    """Read a checkpoint's progress.

    Args:
        allow_change: the number of steps may differ. The plan may not: its samples would be repeated and omitted.

    Raises:
        CheckpointError: it followed another plan, or one of another length.
    """
    saved: dict[str, Any] = json.loads(Path(checkpoint, name).read_text())
    if plan is None:
        return saved
    batch = saved.get(GLOBAL_BATCH, plan.global_batch_size)
    if batch != plan.global_batch_size:
        raise CheckpointError(
            f"{checkpoint}: was trained with a global batch of {batch} bins, this trainer has {plan.global_batch_size}."
            f" Set `global_batch_size: {batch}`; or `gradient_accumulation_steps`, so that `micro_batch_size` × "
            f"accumulation × data-parallel processes is {batch}; or the builder's `pinned_global_batch_size`."
        )
    if saved["plan"] != plan.fingerprint:
        raise CheckpointError(
            f"{checkpoint}: was trained on another plan (data, packing, seed or the version of eft's planner "
            "differ), so continuing here would repeat and omit samples. Resume with the original "
            "settings, or start anew from its weights."
        )
    if saved["total_steps"] != plan.total_steps and not allow_change:
        raise CheckpointError(
            f"{checkpoint}: was written by a run of {saved['total_steps']:,} steps, this one has {plan.total_steps:,}, "
            "so its learning rates up to there would be others. Resume with the original number of steps, pass "
            "--allow-change to go on all the same, or start a new run from its weights (`base_model`)."
        )
    return saved
