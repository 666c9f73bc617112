"""Context parallelism of packed rows: each process holds a part of the tokens, and inside attention all of them for a
part of the heads (DeepSpeed Ulysses, Jacobs et al. 2023, arXiv:2309.14509).

Two exchanges per layer, around attention that knows document boundaries; so documents stay apart, whichever process
holds which of their tokens, and every window, chunk or soft cap is computed as on one process.

Shapes: C processes share a row of T tokens, T a multiple of C; H query heads, G key/value heads, D head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv

from eft.core.errors import ModelError
from eft.models.attention import BoundarySupport, base_of
from eft.models.document_attention import document_attention, document_mask

ULYSSES_ATTENTION = "eft_ulysses"
"""The name under which the attention and its mask function are registered."""

_PER_TOKEN = ("input_ids", "position_ids", "seq_idx", "shift_labels", "labels", "loss_weights")
"""[1, T] entries of a packed batch."""


@dataclass(frozen=True)
class SharedRows:
    """The processes that share rows, and this one's place among them."""

    group: dist.ProcessGroup
    rank: int
    size: int

    def part(self, batch: dict[str, Any]) -> dict[str, Any]:
        """This process's tokens of a packed batch: [1, T] → [1, T / C]; the boundaries stay those of the whole row.

        `trained_positions` becomes those that lie here, counted from the part's first token.
        """
        tokens = batch["input_ids"].shape[1]
        assert tokens % self.size == 0, "the collator pads to a multiple"
        length = tokens // self.size
        start = self.rank * length
        mine = {name: batch[name][:, start : start + length] for name in _PER_TOKEN if name in batch}
        positions = batch["trained_positions"]
        is_mine = (positions >= start) & (positions < start + length)
        if "trained_groups" in batch:
            mine["trained_groups"] = batch["trained_groups"][is_mine]
            # Weights are of the whole row: one process counts them.
            weights = [weight if self.rank == 0 else 0.0 for weight in batch["groups"].weights]
            mine["groups"] = replace(batch["groups"], weights=weights)
        return {**batch, **mine, "trained_positions": positions[is_mine] - start}


class _HeadsForTokens(torch.autograd.Function):
    """All-to-all: [C · heads, tokens, D] → [heads, C · tokens, D], or back. Its gradient is the exchange back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, rows: SharedRows, to_tokens: bool) -> Tensor:
        ctx.rows, ctx.to_tokens = rows, to_tokens
        return _exchange(tensor, rows, to_tokens)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _exchange(gradients[0], ctx.rows, not ctx.to_tokens), None, None


def _exchange(tensor: Tensor, rows: SharedRows, to_tokens: bool) -> Tensor:
    if to_tokens:
        parts = list(tensor.contiguous().chunk(rows.size, dim=0))
    else:
        parts = [part.contiguous() for part in tensor.chunk(rows.size, dim=1)]
    received = [torch.empty_like(parts[rows.rank]) for _ in parts]
    dist.all_to_all(received, parts, group=rows.group)
    return torch.cat(received, dim=1 if to_tokens else 0)


@dataclass(frozen=True)
class UlyssesAttention:
    """`document_attention` of whole rows on processes that hold parts of them; without boundaries the plain one."""

    rows: SharedRows

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """query [1, H, T / C, D], key and value [1, G, T / C, D] → [1, T / C, H, D]."""
        if kwargs.get("cu_seq_lens_q") is None:
            whole: tuple[Tensor, None] = document_attention(module, query, key, value, attention_mask, **kwargs)
            return whole
        size, heads = self.rows.size, query.shape[1]
        if key.shape[1] % size:
            key, value = (repeat_kv(tensor, heads // key.shape[1]) for tensor in (key, value))
        q, k, v = (self._swap(tensor[0], to_tokens=True)[None] for tensor in (query, key, value))
        sinks = kwargs.get("s_aux")
        if sinks is not None:
            kwargs["s_aux"] = sinks.chunk(size)[self.rows.rank]
        output, _ = document_attention(module, q, k, v, attention_mask, **kwargs)
        back = self._swap(output[0].transpose(0, 1), to_tokens=False)
        return back.transpose(0, 1)[None], None

    def _swap(self, tensor: Tensor, *, to_tokens: bool) -> Tensor:
        swapped: Tensor = _HeadsForTokens.apply(tensor, self.rows, to_tokens)  # type: ignore[no-untyped-call]  # torch's has no types
        return swapped


def install_ulysses(model: nn.Module, support: BoundarySupport, rows: SharedRows) -> None:
    """Make the attention of `model`, which was installed and probed on whole rows, exchange with `rows`.

    Raises:
        ModelError: the model mixes tokens elsewhere than in attention, or its heads cannot be shared.
    """
    config = base_of(model).config.get_text_config()
    heads, kinds = config.num_attention_heads, getattr(config, "layer_types", None) or []
    others = sorted({kind for kind in kinds if "attention" not in kind or kind == "linear_attention"})
    if support.mode != "native" or others:
        reason = f"it has layers of kind {', '.join(others)}" if others else support.reason
        raise ModelError(
            f"context_parallel_size: {type(base_of(model)).__name__} does not keep its tokens apart outside of "
            f"attention that knows boundaries ({reason}); remove `context_parallel_size`"
        )
    if heads % rows.size:
        divisors = ", ".join(str(size) for size in range(2, heads + 1) if heads % size == 0)
        raise ModelError(
            f"context_parallel_size: {rows.size} processes cannot share {heads} attention heads; use one of {divisors}"
        )
    AttentionInterface.register(ULYSSES_ATTENTION, UlyssesAttention(rows))
    AttentionMaskInterface.register(ULYSSES_ATTENTION, document_mask)
    base_of(model).set_attn_implementation(ULYSSES_ATTENTION)
