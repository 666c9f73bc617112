"""NEFTune: the noise of each document is of its own size, only in training, and the same alone and packed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eft.core.records import TokenSample
from eft.data.collators import PackedCollator, PaddedCollator
from eft.models.neftune import document_lengths, noisy_loss

WIDTH = 64


class Model(nn.Module):
    """Embeddings and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, WIDTH)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed


class Embeddings:
    """A training loss that keeps the embeddings it saw."""

    def __init__(self) -> None:
        self.seen: Tensor | None = None

    def __call__(self, model: Any, batch: dict[str, Any]) -> Tensor:
        self.seen = model.embed(batch["input_ids"])
        assert self.seen is not None
        return self.seen.sum()

    def with_logits(self, model: Any, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        loss = self(model, batch)
        return loss, loss


def sample(length: int) -> TokenSample:
    ids = list(range(1, length + 1))
    return TokenSample(ids, ids, None)


def packed(*lengths: int) -> dict[str, Any]:
    return PackedCollator()([[sample(length) for length in lengths]])


def noise(model: Model, batch: dict[str, Any], alpha: float | None = 5.0) -> Tensor:
    loss = Embeddings()
    plain = model.embed(batch["input_ids"]).detach()
    noisy_loss(model, loss, alpha)(model, batch)
    assert loss.seen is not None
    return loss.seen.detach() - plain


def test_document_lengths() -> None:
    assert document_lengths(packed(2, 3)).tolist() == [[2, 2, 3, 3, 3]]
    padded = PaddedCollator(pad_token_id=0)([[sample(2)], [sample(3)]])
    assert document_lengths(padded).tolist() == [[2, 2, 2], [3, 3, 3]]


def test_the_noise_is_uniform_and_of_the_documents_size() -> None:
    model, alpha = Model(), 5.0
    for _ in range(2):  # a second trainer over the same model must not add it twice
        found = noise(model, packed(4, 40), alpha)[0]
    for part, length in ((found[:4], 4), (found[4:], 40)):
        bound = alpha / math.sqrt(length * WIDTH)
        assert part.abs().max() <= bound * 1.0001
        assert part.abs().max() > 0.9 * bound
        assert part.square().mean().sqrt() == pytest.approx(bound / math.sqrt(3), rel=0.2)


def test_only_in_training_and_only_inside_the_loss() -> None:
    model = Model()
    assert not noise(model, packed(4), None).any()
    assert noise(model, packed(4)).any()
    assert not noise(model.eval(), packed(4)).any()
    ids = torch.arange(5)
    assert torch.equal(model.train().embed(ids), model.embed(ids))
