"""Samples to the tensors of one forward pass. Shapes: T tokens of the row, K trained positions, B rows, L row length.

Labels arrive here unshifted and leave shifted, per document: the target of a position is the next token of the same
document, so a document's first token is context and its last position predicts nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import numpy as np
import torch

from eft.core.constants import IGNORE_INDEX
from eft.core.records import Float32Array, Float64Array, Int32Array, Int64Array, TokenSample

Batch = dict[str, Any]
"""Tensors and plain numbers by name; the keys are listed at each collator."""

_DUMMY_TOKENS = 2


@dataclass(frozen=True)
class Groups:
    """The data sets that a micro-batch's trained tokens are of, and Σ weight of each in it."""

    names: tuple[str, ...]
    weights: list[float]


def add_groups(
    batch: Batch, names: tuple[str, ...], owners: Int32Array, counts: Int32Array, weights: Float64Array
) -> None:
    """Add `trained_groups` int64 [K], the data set of each trained position, and `groups`, a `Groups`.

    `owners` [samples]: the data set of each sample, in the order of the row; `counts`, `weights` [samples]: its trained
    positions and their Σ weight.
    """
    batch["trained_groups"] = torch.from_numpy(np.repeat(owners, counts).astype(np.int64))
    batch["groups"] = Groups(names, np.bincount(owners, weights, minlength=len(names)).tolist())


class Collator(Protocol):
    """Turns the bins of a micro-batch, each a list of samples, into a batch; no bins give the dummy micro-batch."""

    def __call__(self, bins: Sequence[Sequence[TokenSample]]) -> Batch: ...


@dataclass(frozen=True)
class PackedCollator:
    """A micro-batch is its bins end to end in one row without padding, document boundaries explicit.

    Batch: `input_ids`, `position_ids`, `shift_labels` int64 [1, T]; `trained_positions` int64 [K], where shift_labels
    is a target; `loss_weights` float32 [1, T], 0 where nothing is trained, only when some sample has weights;
    `cu_seq_lens_q`, `cu_seq_lens_k` int32 [documents + 1]; `max_length_q`, `max_length_k` int; `seq_idx` int32 [1, T];
    `num_tokens` (without padding), `num_trained` int. No `attention_mask`.

    `pad_to`: the row is filled up to the next multiple of it by one more document that trains nothing; with
    `micro_batch_size` × `sequence_len` every row has that shape. `pad_token_id`: any id of the vocabulary.
    """

    pad_to: int | None = None
    pad_token_id: int = 0

    def __call__(self, bins: Sequence[Sequence[TokenSample]]) -> Batch:
        samples = [sample for samples in bins for sample in samples]
        lengths = [len(sample.input_ids) for sample in samples]
        real = sum(lengths)
        filling = _padded(max(real, _DUMMY_TOKENS), self.pad_to) - real if self.pad_to or not samples else 0
        if filling:
            lengths.append(filling)
        total = real + filling
        bounds = np.fromiter(accumulate(lengths, initial=0), np.int64, len(lengths) + 1)

        input_ids = np.empty(total, np.int64)
        labels = np.empty(total + 1, np.int64)  # one more, so that the shifted row is a view
        if samples:
            np.concatenate([sample.input_ids for sample in samples], out=input_ids[:real])
            np.concatenate([sample.labels for sample in samples], out=labels[:real])
        input_ids[real:] = self.pad_token_id
        labels[real:] = IGNORE_INDEX
        shift_labels = labels[1:]
        shift_labels[bounds[1:] - 1] = IGNORE_INDEX
        trained = (shift_labels != IGNORE_INDEX).nonzero()[0]
        counts = np.array(lengths)

        batch: Batch = {
            "input_ids": _row(input_ids),
            "position_ids": _row(np.arange(total) - bounds[:-1].repeat(counts)),
            "shift_labels": _row(shift_labels),
            "trained_positions": torch.from_numpy(trained),
        }
        if any(sample.weights is not None for sample in samples):
            weights = np.zeros(total + 1, np.float32)
            np.concatenate([_weights(sample) for sample in samples], out=weights[:real])
            batch["loss_weights"] = _row(_only_at(weights[1:], trained))
        boundaries = torch.from_numpy(bounds.astype(np.int32))
        batch["cu_seq_lens_q"] = batch["cu_seq_lens_k"] = boundaries
        batch["max_length_q"] = batch["max_length_k"] = max(lengths)
        batch["seq_idx"] = _row(np.arange(len(lengths), dtype=np.int32).repeat(counts))
        batch["num_tokens"] = real
        batch["num_trained"] = len(trained)
        return batch


@dataclass(frozen=True)
class PaddedCollator:
    """One document a row, padded on the right: for models that cannot be told where a packed document ends.

    Batch: `input_ids`, `attention_mask`, `position_ids`, `shift_labels` int64 [B, L]; `trained_positions` int64 [K],
    indices into the flattened [B·L]; `loss_weights` float32 [B, L] as in `PackedCollator`; `num_tokens` (without
    padding), `num_trained` int. `pad_to`: L is the next multiple of it.
    """

    pad_token_id: int
    pad_to: int | None = None

    def __call__(self, bins: Sequence[Sequence[TokenSample]]) -> Batch:
        samples = [sample for samples in bins for sample in samples]
        lengths = [len(sample.input_ids) for sample in samples] or [_DUMMY_TOKENS]
        shape = (len(lengths), _padded(max(lengths), self.pad_to))
        input_ids = np.full(shape, self.pad_token_id, np.int64)
        shift_labels = np.full(shape, IGNORE_INDEX, np.int64)
        for row, sample in enumerate(samples):
            input_ids[row, : lengths[row]] = sample.input_ids
            shift_labels[row, : lengths[row] - 1] = sample.labels[1:]
        positions = np.arange(shape[1], dtype=np.int64)
        trained = np.flatnonzero(shift_labels != IGNORE_INDEX)

        batch: Batch = {
            "input_ids": torch.from_numpy(input_ids),
            "attention_mask": torch.from_numpy((positions < np.array(lengths)[:, None]).astype(np.int64)),
            "position_ids": torch.from_numpy(np.tile(positions, (shape[0], 1))),
            "shift_labels": torch.from_numpy(shift_labels),
            "trained_positions": torch.from_numpy(trained),
        }
        if any(sample.weights is not None for sample in samples):
            weights = np.zeros(shape, np.float32)
            for row, sample in enumerate(samples):
                weights[row, : lengths[row] - 1] = _weights(sample)[1:]
            batch["loss_weights"] = torch.from_numpy(_only_at(weights.reshape(-1), trained).reshape(shape))
        batch["num_tokens"] = sum(lengths) if samples else 0
        batch["num_trained"] = len(trained)
        return batch


def _padded(length: int, multiple: int | None) -> int:
    return length if multiple is None else -(-length // multiple) * multiple


def _row(values: np.ndarray[Any, Any]) -> torch.Tensor:
    """[T] to a tensor [1, T] over the same memory."""
    return torch.from_numpy(values[None])


def _weights(sample: TokenSample) -> Float32Array:
    return np.ones(len(sample.labels), np.float32) if sample.weights is None else sample.weights


def _only_at(values: Float32Array, positions: Int64Array) -> Float32Array:
    """`values` [T] at `positions`, 0 elsewhere."""
    kept = np.zeros(len(values), np.float32)
    kept[positions] = values[positions]
    return kept
