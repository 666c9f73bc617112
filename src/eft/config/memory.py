"""Memory for time."""

from __future__ import annotations

from typing import Any, Literal

from eft.config.section import Section, key

KeptOutput = Literal["attention", "matmul"]
"""`models.checkpointing.KEPT_OPERATIONS` has exactly these names."""


class MemoryConfig(Section):
    """Options that change memory and speed, never the numbers."""

    gradient_checkpointing: bool = key(
        False, "Recompute the activations of the decoder layers in the backward pass instead of keeping them."
    )
    gradient_checkpointing_kwargs: dict[str, Any] | None = key(
        None,
        "Options of torch's checkpoint; default `{use_reentrant: false}`.",
        used_when="gradient_checkpointing",
        axolotl="Axolotl's default is `{use_reentrant: true}`.",
    )
    gradient_checkpointing_every: int = key(
        1,
        "Recompute every n-th decoder layer only; the others keep their activations.",
        ge=1,
        used_when="gradient_checkpointing",
    )
    selective_checkpointing: bool | list[KeptOutput] = key(
        False,
        "Outputs to keep instead of computing them twice: `[attention]` (the same as `true`), or `[attention, matmul]`,"
        " which leaves only cheap operations to recompute.",
        used_when="gradient_checkpointing",
        axolotl="Axolotl takes a mapping; its `save` is the list.",
    )
    activation_offloading: bool = key(
        False,
        "Keep activations in host memory between forward and backward pass; on CUDA the copies overlap with computing.",
    )
    optimizer_in_backward: bool = key(
        False,
        "Update each weight in the backward pass as soon as its gradient is there, so that the gradients never exist "
        "all at once. Needs accumulation 1 and `max_grad_norm: 0`; there is no gradient norm to log.",
    )
    torch_empty_cache_steps: int | None = key(
        None, "Hand memory that torch holds but does not use back to the device every so many steps (slow).", ge=1
    )
    preflight: bool | Literal["auto"] = key(
        "auto",
        "Before the first step, try the costliest micro-batch, the largest evaluation batch and one save, and name the "
        "cheapest setting that fits where one does not; `auto`: on an accelerator.",
    )
