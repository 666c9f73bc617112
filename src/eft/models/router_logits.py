"""The load-balancing loss of a mixture of experts, per document (D11): what the model must give, and its share."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from eft.core.errors import ModelError
from eft.models.attention import BoundarySupport, base_of, probing

LoadBalance = Callable[[Sequence[Tensor], Tensor, int, int], Tensor]
"""`loss.router.load_balance`."""

_PROBE_TOKENS = 12
_PROBE_SEED = 20_240_817
_TOLERANCE_FP32 = 1e-4
_TOLERANCE_HALF = 0.02
"""Upstream's softmax has the router's own dtype; the number of experts per token changes the loss by far more."""


@dataclass(frozen=True)
class RouterLoss:
    """coefficient · Σ_d tokens_d · balance_d ÷ tokens of the step, in the unit of the token losses' sum.

    That sum is divided by the step's Σ weight afterwards, so this one is multiplied by it here.
    """

    balance: LoadBalance
    coefficient: float
    top_k: int
    """Experts per token."""

    def __call__(self, router_logits: Sequence[Tensor], batch: dict[str, Any]) -> Tensor:
        """`batch` as the loader makes it, with `step_weight` and `step_tokens`."""
        documents, sizes = _documents(batch)
        balance = self.balance(router_logits, documents, len(sizes), self.top_k)
        share = batch["step_weight"] / batch["step_tokens"] if batch["step_tokens"] else 0.0
        return self.coefficient * share * (balance @ sizes.to(balance.dtype))


def _documents(batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """(document of each token int64 [T], tokens of each document int64 [D]); padding and dummies are document D."""
    ids = batch["input_ids"]
    if "cu_seq_lens_q" in batch:
        bounds = batch["cu_seq_lens_q"].long()
        sizes = bounds.diff()
        # What lies beyond the real tokens is one document more, or the only one (a dummy).
        real = bounds[1:] <= batch["num_tokens"]
        numbers = torch.where(real, torch.arange(len(sizes), device=ids.device), len(sizes))
        return numbers.repeat_interleave(sizes, output_size=ids.numel()), sizes * real
    mask = batch["attention_mask"].long() * (batch["num_tokens"] > 0)
    rows = torch.arange(len(ids), device=ids.device)[:, None].expand_as(ids)
    return torch.where(mask.bool(), rows, len(ids)).reshape(-1), mask.sum(1)


def find_router_loss(
    model: nn.Module,
    balance: LoadBalance,
    coefficient: float | None,
    support: BoundarySupport,
    *,
    reentrant: bool = False,
    compiled: bool = False,
    autocast_dtype: torch.dtype | None = None,
) -> RouterLoss | None:
    """The load-balancing loss that is wanted, proven on one document against the model's own.

    Args:
        coefficient: 0: none; None: the model's own, where its config asks for router logits.
        support: how documents are kept apart.
        reentrant: layers are recomputed in the way that runs them without gradients first.
        compiled: layers are compiled, and transformers' record of router logits is not part of their graphs.

    Raises:
        ModelError: a loss is asked for, and this model gives no router logits, or means something else by its loss.
    """
    base = base_of(model)
    config = base.config.get_text_config()
    if coefficient is None:
        wanted = bool(getattr(config, "output_router_logits", False))
        coefficient = float(getattr(config, "router_aux_loss_coef", None) or 0.0) if wanted else 0.0
    if coefficient == 0.0:
        return None
    refusal = _refusal(base, support, reentrant=reentrant, compiled=compiled)
    top_k = None if refusal else _experts_per_token(model, balance, autocast_dtype)
    if top_k is None:
        what = refusal or (
            f"the load-balancing loss of {type(base).__name__} is not the one of Switch Transformers. Set "
            "`router_aux_loss_coef: 0`."
        )
        raise ModelError(f"router_aux_loss_coef: {what}")
    return RouterLoss(balance, coefficient, top_k)


def _refusal(base: PreTrainedModel, support: BoundarySupport, *, reentrant: bool, compiled: bool) -> str | None:
    """Why there can be no such loss, and what to do; None if there can."""
    name = type(base).__name__
    if "output_router_logits" not in inspect.signature(base.forward).parameters:
        return (
            f"{name} gives no router logits. Remove the key; experts that balance themselves by a bias, as DeepSeek's, "
            "need no loss."
        )
    if support.mode == "mask":
        return (
            f"{name} keeps documents apart by a prebuilt mask, which its own load-balancing loss cannot read. Set "
            "`router_aux_loss_coef: 0`."
        )
    if reentrant:
        return (
            "no gradient reaches the routers under reentrant activation checkpointing. Remove `use_reentrant` from "
            "`gradient_checkpointing_kwargs`."
        )
    if compiled:
        return (
            "compiled layers do not hand out their router logits. Set `torch_compile: false`, or "
            "`router_aux_loss_coef: 0`."
        )
    return None


def _experts_per_token(model: nn.Module, balance: LoadBalance, autocast_dtype: torch.dtype | None) -> int | None:
    """The one number of experts per token with which our loss of one document is the model's own; None if none is.

    Read off the numbers and not off the config, where it has a different name in every other family.
    """
    base = base_of(model)
    generator = torch.Generator().manual_seed(_PROBE_SEED)
    vocabulary = int(base.config.get_text_config().vocab_size)
    ids = torch.randint(0, vocabulary, (1, _PROBE_TOKENS), generator=generator)
    ids = ids.to(base.get_input_embeddings().weight.device)
    with probing(model, autocast_dtype) as precision:
        output = model(input_ids=ids, use_cache=False, output_router_logits=True)
        logits, own = output.router_logits, output.aux_loss
        if not logits or not isinstance(own, Tensor):
            return None
        one_document = torch.zeros(ids.numel(), dtype=torch.int64, device=ids.device)
        ours = [float(balance(logits, one_document, 1, k)) for k in range(1, logits[0].shape[-1] + 1)]
    tolerance = _TOLERANCE_HALF if precision.itemsize == 2 else _TOLERANCE_FP32
    equal = [k for k, value in enumerate(ours, 1) if abs(value - float(own)) <= tolerance * abs(float(own))]
    return equal[0] if len(equal) == 1 else None
