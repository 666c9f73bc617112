"""Sets of tokenised samples: what every one of them can do, and views that choose and reorder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_128

from eft.core.constants import IGNORE_INDEX
from eft.core.hashing import hash_bytes
from eft.core.records import Float64Array, Int32Array, Int64Array, TokenSample

Digests = npt.NDArray[np.bytes_]
"""BLAKE2b-128 per sample, dtype S16 [samples]; NumPy compares and sorts them as bytes."""
DIGEST_BYTES = 16
DIGEST_DTYPE = f"S{DIGEST_BYTES}"


def measure(sample: TokenSample) -> tuple[int, float]:
    """(trainable tokens, Σ weight over them): label ≠ IGNORE_INDEX at position ≥ 1 (nothing predicts the first)."""
    trained = sample.labels[1:] != IGNORE_INDEX
    count = int(np.count_nonzero(trained))
    if sample.weights is None:
        return count, float(count)
    return count, float(sample.weights[1:][trained].sum(dtype=np.float64))


def digests_of(sample: TokenSample) -> tuple[bytes, bytes]:
    """(digest of the ids, digest of ids, labels and weights), 16 bytes each.

    XXH3 is a twentieth of the work of a cryptographic hash: nobody has a reason to forge samples that seem equal.
    """
    ids = xxh3_128(np.ascontiguousarray(sample.input_ids).data)
    whole = ids.copy()
    whole.update(len(sample.input_ids).to_bytes(8, "little"))
    whole.update(np.ascontiguousarray(sample.labels).data)
    if sample.weights is not None:
        whole.update(np.ascontiguousarray(sample.weights).data)
    return ids.digest(), whole.digest()


class SampleSet(ABC):
    """What stores, views and foreign data sets share. Implements `core.records.TokenDataset`."""

    lengths: Int32Array
    weight_sums: Float64Array
    trainable_counts: Int32Array
    id_digests: Digests
    """Equal where the input ids are equal."""
    sample_digests: Digests
    """Equal where ids, labels and weights are equal."""
    largest_id: int
    """No input id is above it; of a view, it is that of what the view chooses from."""
    fingerprint: str
    """SHA-256 of the sample digests in order: equal samples in equal order have equal fingerprints."""

    column_names: Sequence[str] = ("input_ids", "labels")
    group_names: tuple[str, ...] = ()
    """The data sets that the samples come from, where that is known."""

    def groups(self) -> Int32Array:
        """Which of `group_names` each sample comes from, int32 [samples]."""
        return np.zeros(len(self), np.int32)

    @abstractmethod
    def sample(self, index: int) -> TokenSample:
        """Sample `index`, 0 ≤ index < len, else IndexError."""

    @abstractmethod
    def origin(self, index: int) -> str:
        """Where the sample comes from: `data.jsonl row 17`."""

    @abstractmethod
    def conversation(self, index: int) -> dict[str, Any] | None:
        """`{"messages": [...], "tools": [...] or None}` of the sample's row, or None for formats without turns."""

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, npt.NDArray[Any]]:
        """The sample as `{"input_ids", "labels"[, "weights"]}`; negative indices count from the end."""
        sample = self.sample(index + len(self) if index < 0 else index)
        columns: dict[str, npt.NDArray[Any]] = {"input_ids": sample.input_ids, "labels": sample.labels}
        if sample.weights is not None:
            columns["weights"] = sample.weights
        return columns

    def __iter__(self) -> Iterator[dict[str, npt.NDArray[Any]]]:
        return (self[index] for index in range(len(self)))

    def select(self, indices: Sequence[int] | npt.NDArray[np.integer[Any]]) -> TokenView:
        """A view of these samples in this order. Raises IndexError for an index outside 0 ≤ index < len."""
        chosen = np.asarray(indices, dtype=np.int64)
        if len(chosen) and (chosen.min() < 0 or chosen.max() >= len(self)):
            raise IndexError(f"select: indices must be in 0..{len(self) - 1}, got {chosen.min()}..{chosen.max()}")
        return self._view(chosen)

    def _view(self, chosen: Int64Array) -> TokenView:
        return TokenView([self], chosen)

    def _check(self, index: int) -> None:
        if not 0 <= index < len(self.lengths):
            raise IndexError(f"sample {index} of {len(self.lengths)}")


class TokenView(SampleSet):
    """Chosen samples of one or more sample sets, in a chosen order; holds 60 bytes per sample, no tokens."""

    def __init__(self, bases: Sequence[SampleSet], positions: Int64Array, names: Sequence[str] = ()):
        """`positions` int64 [samples] index the concatenation of `bases`, which are called `names`."""
        self.bases = list(bases)
        self.positions = positions
        self.group_names = tuple(names)
        self._starts = np.concatenate([[0], np.cumsum([len(base) for base in bases])]).tolist()
        self.lengths = self._gather("lengths")
        self.weight_sums = self._gather("weight_sums")
        self.trainable_counts = self._gather("trainable_counts")
        self.id_digests = self._gather("id_digests")
        self.sample_digests = self._gather("sample_digests")
        self.largest_id = max(base.largest_id for base in bases)
        self.fingerprint = hash_bytes(self.sample_digests.tobytes())
        if any("weights" in base.column_names for base in bases):
            self.column_names = ("input_ids", "labels", "weights")

    def _gather(self, name: str) -> Any:
        """One column at `positions`, without building the concatenation."""
        columns = [getattr(base, name) for base in self.bases]
        if len(columns) == 1:
            return columns[0][self.positions]
        gathered = np.empty(len(self.positions), dtype=columns[0].dtype)
        owners = self.base_ids()
        for number, column in enumerate(columns):
            mine = owners == number
            gathered[mine] = column[self.positions[mine] - self._starts[number]]
        return gathered

    def base_ids(self) -> Int64Array:
        """Which base each sample comes from, int64 [samples]."""
        return np.searchsorted(self._starts, self.positions, side="right") - 1

    def groups(self) -> Int32Array:
        return self.base_ids().astype(np.int32)

    def _locate(self, index: int) -> tuple[SampleSet, int]:
        self._check(index)
        position = int(self.positions[index])
        number = bisect_right(self._starts, position) - 1
        return self.bases[number], position - self._starts[number]

    def _view(self, chosen: Int64Array) -> TokenView:
        return TokenView(self.bases, self.positions[chosen], self.group_names)

    def sample(self, index: int) -> TokenSample:
        base, position = self._locate(index)
        return base.sample(position)

    def origin(self, index: int) -> str:
        base, position = self._locate(index)
        return base.origin(position)

    def conversation(self, index: int) -> dict[str, Any] | None:
        base, position = self._locate(index)
        return base.conversation(position)
