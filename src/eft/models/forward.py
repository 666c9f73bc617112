"""One forward pass through the wrapped model that gives logits at the trained positions only (D5)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from eft.models.attention import BoundarySupport, boundary_inputs, packed_forward


@dataclass(frozen=True)
class TrainedLogits:
    """Batch to logits [K, vocab] of its K trained positions.

    Always through the wrapped model: calling the decoder inside it would bypass autocast and the hooks of DDP and FSDP.
    """

    support: BoundarySupport
    keeps_positions: bool
    """Whether the model's forward computes logits only at the positions of `logits_to_keep`."""

    def __call__(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """`batch` as the collator makes it; its row count is 1 unless the family needs padded rows."""
        inputs = boundary_inputs(self.support, model, batch)
        positions: Tensor = batch["trained_positions"]
        one_row = batch["input_ids"].shape[0] == 1
        with packed_forward():
            if one_row and self.keeps_positions:
                return model(**inputs, use_cache=False, logits_to_keep=positions).logits[0]  # type: ignore[no-any-return]
            logits = model(**inputs, use_cache=False).logits
        return logits.flatten(0, 1)[positions]  # type: ignore[no-any-return]
