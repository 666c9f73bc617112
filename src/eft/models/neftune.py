"""NEFTune: noise on the embeddings while training, sized by the document it falls on.

Jain et al. 2023, "NEFTune: Noisy Embeddings Improve Instruction Finetuning": uniform in ± α / √(L · H), L tokens of the
sequence, H the hidden size. A packed row holds many documents, so L is that of each document, not of the row: a sample
gets the same noise alone and packed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch import Tensor, nn

from eft.core.errors import ModelError

_noisy: WeakSet[nn.Module] = WeakSet()
"""Embeddings that have the hook."""
_scale: ContextVar[Tensor | None] = ContextVar("eft_neftune_scale", default=None)


class TrainingLoss(Protocol):
    """What is minimised (`models.forward.TrainedLoss`)."""

    def __call__(self, model: nn.Module, batch: dict[str, Any]) -> Tensor: ...

    def with_logits(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class NoisyLoss:
    """A training loss whose forward pass has noisy embeddings, where the model is in training mode."""

    loss: TrainingLoss
    alpha: float

    def __call__(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """`batch` as the loader makes it."""
        with self._noise(batch):
            return self.loss(model, batch)

    def with_logits(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The same with the logits."""
        with self._noise(batch):
            return self.loss.with_logits(model, batch)

    @contextmanager
    def _noise(self, batch: dict[str, Any]) -> Iterator[None]:
        token = _scale.set(self.alpha / document_lengths(batch).sqrt())
        try:
            yield
        finally:
            _scale.reset(token)


def document_lengths(batch: dict[str, Any]) -> Tensor:
    """fp32 [B, L]: tokens of the document that each position belongs to."""
    ids: Tensor = batch["input_ids"]
    if "attention_mask" in batch:
        mask: Tensor = batch["attention_mask"]
        return mask.sum(1, keepdim=True).clamp_min(1).float().expand(ids.shape)
    lengths: Tensor = batch["cu_seq_lens_q"].diff()
    return lengths.repeat_interleave(lengths, output_size=ids.shape[1]).float()[None]


def noisy_loss(model: nn.Module, loss: TrainingLoss, alpha: float | None) -> TrainingLoss:
    """`loss` with noise of size `alpha` on the input embeddings of `model` in training mode; None: `loss` itself.

    The noise is drawn from the device's global generator, which checkpoints restore.

    Raises:
        ModelError: the model has no input embeddings.
    """
    if alpha is None:
        return loss
    embeddings = model.get_input_embeddings()  # type: ignore[operator]  # a model of transformers, wrapped or not
    if not isinstance(embeddings, nn.Module):
        raise ModelError(f"neftune_noise_alpha: {type(model).__name__} has no input embeddings; remove it.")
    # One model may be built into several trainers.
    if embeddings not in _noisy:
        embeddings.register_forward_hook(_add_noise)
        _noisy.add(embeddings)
    return NoisyLoss(loss, alpha)


def _add_noise(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    scale = _scale.get()
    if scale is None or not module.training:
        return output
    noise = torch.empty_like(output).uniform_(-1.0, 1.0)
    # [B, L, H] · [B, L, 1]
    return output + noise * (scale / math.sqrt(output.shape[-1]))[..., None].to(output.dtype)
