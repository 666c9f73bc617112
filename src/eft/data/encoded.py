"""What one block of rows becomes: its samples end to end in arrays, and their digests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_128

from eft.core.constants import IGNORE_INDEX
from eft.core.records import Float32Array, Float64Array, Int32Array, TokenSample
from eft.data.sample_set import DIGEST_BYTES

COLUMNS: dict[str, str] = {
    "lengths": "<i4",
    "trainable_counts": "<i4",
    "weight_sums": "<f8",
    "source_ids": "<i4",
    "row_ids": "<i8",
    "row_keys": "<u8",
    "id_digests": f"|S{DIGEST_BYTES}",
    "sample_digests": f"|S{DIGEST_BYTES}",
}
"""Per-sample columns of a store and their NumPy types."""


@dataclass(slots=True)
class StoredSample:
    """A sample on its way into a store."""

    row: int
    """Number of its row in its file."""
    key: int
    """64-bit hash of the row as it stands in the source."""
    tokens: TokenSample
    conversation: bytes | None
    """The row's messages and tools, as `conversation_text` writes them."""


@dataclass(frozen=True)
class EncodedRows:
    """The samples of one block, in order."""

    source: str
    """The file of all of them."""
    ids: Int32Array
    """[tokens], as `labels`."""
    labels: Int32Array
    weights: Float32Array | None
    """[tokens], 1 where a sample has none; None where no sample has any."""
    is_weighted: npt.NDArray[np.bool_]
    """[samples]"""
    columns: dict[str, npt.NDArray[Any]]
    """COLUMNS but for `source_ids`, [samples] each."""
    conversations: list[bytes | None]

    def __len__(self) -> int:
        return len(self.columns["lengths"])

    def chosen(self, keep: npt.NDArray[np.bool_]) -> EncodedRows:
        """Without some of the samples; `keep` bool [samples]."""
        tokens = np.repeat(keep, self.columns["lengths"])
        return EncodedRows(
            self.source,
            self.ids[tokens],
            self.labels[tokens],
            None if self.weights is None or not self.is_weighted[keep].any() else self.weights[tokens],
            self.is_weighted[keep],
            {name: values[keep] for name, values in self.columns.items()},
            [text for text, is_kept in zip(self.conversations, keep.tolist(), strict=True) if is_kept],
        )


def encode_samples(source: str, samples: Sequence[StoredSample]) -> EncodedRows:
    """Put samples of at least one token together."""
    tokens = [sample.tokens for sample in samples]
    lengths = np.array([len(each.input_ids) for each in tokens], dtype=np.int32)
    assert np.all(lengths > 0), "a sample has tokens"
    ids = _joined([each.input_ids for each in tokens], np.int32)
    labels = _joined([each.labels for each in tokens], np.int32)
    assert len(labels) == len(ids), "a label per token"
    is_weighted = np.array([each.weights is not None for each in tokens], dtype=np.bool_)
    weights = None
    if is_weighted.any():
        ones = (np.ones(len(each.input_ids), np.float32) if each.weights is None else each.weights for each in tokens)
        weights = _joined(list(ones), np.float32)
        assert len(weights) == len(ids), "a weight per token"
    counts, sums = _measures(lengths, labels, weights)
    id_digests, sample_digests = _digests(lengths, ids, labels, weights, is_weighted)
    columns: dict[str, npt.NDArray[Any]] = {
        "lengths": lengths,
        "trainable_counts": counts,
        "weight_sums": sums,
        "row_ids": np.array([sample.row for sample in samples], dtype=np.int64),
        "row_keys": np.array([sample.key for sample in samples], dtype=np.uint64),
        "id_digests": id_digests,
        "sample_digests": sample_digests,
    }
    return EncodedRows(source, ids, labels, weights, is_weighted, columns, [each.conversation for each in samples])


def _joined(parts: list[npt.NDArray[Any]], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    return np.concatenate(parts, dtype=dtype, casting="same_kind") if parts else np.zeros(0, dtype)


def _measures(lengths: Int32Array, labels: Int32Array, weights: Float32Array | None) -> tuple[Int32Array, Float64Array]:
    """(trainable tokens, Σ weight over them) per sample: label ≠ IGNORE_INDEX at position ≥ 1."""
    if not len(lengths):
        return np.zeros(0, np.int32), np.zeros(0, np.float64)
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    trained = labels != IGNORE_INDEX
    trained[starts] = False  # nothing predicts the first token
    counts = np.add.reduceat(trained, starts, dtype=np.int32)
    if weights is None:
        return counts, counts.astype(np.float64)
    return counts, np.add.reduceat(np.where(trained, weights, np.float32(0)), starts, dtype=np.float64)


def _digests(
    lengths: Int32Array,
    ids: Int32Array,
    labels: Int32Array,
    weights: Float32Array | None,
    is_weighted: npt.NDArray[np.bool_],
) -> tuple[npt.NDArray[np.bytes_], npt.NDArray[np.bytes_]]:
    """As `sample_set.digests_of`, of every sample."""
    id_digests, sample_digests = bytearray(), bytearray()
    all_ids, all_labels = np.ascontiguousarray(ids).data, np.ascontiguousarray(labels).data
    start = 0
    for length, weighted in zip(lengths.tolist(), is_weighted.tolist(), strict=True):
        stop = start + length
        whole = xxh3_128(all_ids[start:stop])
        id_digests += whole.digest()
        whole.update(length.to_bytes(8, "little"))
        whole.update(all_labels[start:stop])
        if weighted and weights is not None:
            whole.update(weights[start:stop].data)
        sample_digests += whole.digest()
        start = stop
    kind = f"S{DIGEST_BYTES}"
    return np.frombuffer(bytes(id_digests), kind), np.frombuffer(bytes(sample_digests), kind)
