"""One forward pass through the wrapped model (D5): the loss of the trained tokens, or their logits.

Always through the wrapped model: calling the decoder inside it would bypass autocast and the hooks of DDP and FSDP.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from eft.models.attention import BoundarySupport, boundary_inputs, packed_forward
from eft.models.loss_head import HeadLoss, LossHead, loss_request
from eft.models.router_logits import RouterLoss


class LogitLoss(Protocol):
    """`loss.head.trainable_token_loss`, its objective given."""

    def __call__(
        self, logits: Tensor, targets: Tensor, weights: Tensor | None, *, groups: tuple[Tensor, Tensor] | None
    ) -> Tensor: ...


@dataclass(frozen=True)
class TrainedLogits:
    """Batch to logits [K, vocab] of its K trained positions."""

    support: BoundarySupport
    keeps_positions: bool
    """Whether the model's forward computes logits only at the positions of `logits_to_keep`."""

    def __call__(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """`batch` as the collator makes it; its row count is 1 unless the family needs padded rows."""
        logits, _ = self.with_output(model, batch, {})
        return logits

    def with_output(self, model: nn.Module, batch: dict[str, Any], options: dict[str, Any]) -> tuple[Tensor, Any]:
        """The logits and the model's whole output; `options`: further arguments of the forward."""
        inputs = boundary_inputs(self.support, model, batch) | _extra_inputs(batch) | options
        positions: Tensor = batch["trained_positions"]
        one_row = batch["input_ids"].shape[0] == 1
        with packed_forward():
            if one_row and self.keeps_positions:
                output = model(**inputs, use_cache=False, logits_to_keep=positions)
                return output.logits[0], output
            output = model(**inputs, use_cache=False)
        return output.logits.flatten(0, 1)[positions], output


@dataclass(frozen=True)
class TrainedLoss:
    """Batch to Σ weight · loss of its trained tokens, a scalar: without logits where the head is known."""

    forward: TrainedLogits
    head: LossHead | None
    """None: the loss is computed from the logits of the trained positions."""
    from_hidden: HeadLoss
    from_logits: LogitLoss
    router: RouterLoss | None = None
    """Adds the load balance of experts."""

    def __call__(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """`batch` as the loader makes it."""
        if self.head is None:
            return self.with_logits(model, batch)[0]
        inputs = boundary_inputs(self.forward.support, model, batch) | _extra_inputs(batch) | self._options()
        positions, targets, weights = _trained(batch)
        with packed_forward(), loss_request(self.head, self.from_hidden, positions, targets, weights, _groups(batch)):
            output = model(**inputs, use_cache=False)
        assert output.loss is not None, "the hooks of find_loss_head are gone"
        return self._add_balance(output.loss, output, batch)

    def with_logits(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The same loss and the logits [K, vocab] that it was computed from."""
        logits, output = self.forward.with_output(model, batch, self._options())
        _, targets, weights = _trained(batch)
        loss = self.from_logits(logits, targets, weights, groups=_groups(batch))
        return self._add_balance(loss, output, batch), logits

    def _options(self) -> dict[str, Any]:
        if self.router is None:
            return {}
        # With router logits the model counts tokens by its mask, and `NO_MASK` has none.
        mask = {"attention_mask": None} if self.forward.support.passes_no_mask else {}
        return {"output_router_logits": True, **mask}

    def _add_balance(self, loss: Tensor, output: Any, batch: dict[str, Any]) -> Tensor:
        return loss if self.router is None else loss + self.router(output.router_logits, batch)


def _trained(batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor | None]:
    """(positions int64 [K], targets int64 [K], weights float32 [K] or None) of the trained tokens."""
    positions: Tensor = batch["trained_positions"]
    weights = batch["loss_weights"].reshape(-1)[positions] if "loss_weights" in batch else None
    return positions, batch["shift_labels"].reshape(-1)[positions], weights


def _extra_inputs(batch: dict[str, Any]) -> dict[str, Tensor]:
    """What a processor made of the row's images."""
    return {name: batch[name] for name in batch.get("extra_inputs", ())}


def _groups(batch: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
    """Where the losses of each data set are to be summed up, if they are."""
    return (batch["trained_groups"], batch["group_totals"]) if "group_totals" in batch else None
