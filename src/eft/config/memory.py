"""Memory for time."""

from __future__ import annotations

from typing import Any

from eft.config.section import Section, key


class MemoryConfig(Section):
    """Options that change memory and speed, never the numbers."""

    gradient_checkpointing: bool = key(False, "Recompute activations in the backward pass.")
    gradient_checkpointing_kwargs: dict[str, Any] | None = key(
        None, "Options of torch's checkpoint; default `{use_reentrant: false}`.", used_when="gradient_checkpointing"
    )
    activation_offloading: bool = key(False, "Keep activations in host memory between forward and backward pass.")
