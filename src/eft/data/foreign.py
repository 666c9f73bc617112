"""Data sets that were tokenised elsewhere, read as they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from eft.core.errors import DataError
from eft.core.hashing import hash_bytes
from eft.core.records import TokenSample
from eft.data.given_tokens import given_sample
from eft.data.sample_set import DIGEST_DTYPE, SampleSet, digests_of, measure


class ForeignDataset(SampleSet):
    """Rows of someone else's data set, read through its own `__getitem__`. Use `as_token_dataset`."""

    def __init__(self, rows: Any):
        self.rows = rows
        columns: dict[str, list[Any]] = {"lengths": [], "trainable_counts": [], "weight_sums": []}
        ids, whole = bytearray(), bytearray()
        self.largest_id = 0
        for index in range(len(rows)):
            sample = _foreign_sample(rows[index], index)
            count, weight = measure(sample)
            self.largest_id = max(self.largest_id, int(sample.input_ids.max()))
            for name, value in zip(columns, (len(sample.input_ids), count, weight), strict=True):
                columns[name].append(value)
            id_digest, sample_digest = digests_of(sample)
            ids += id_digest
            whole += sample_digest
            if sample.weights is not None:
                self.column_names = ("input_ids", "labels", "weights")
        self.lengths = np.asarray(columns["lengths"], dtype=np.int32)
        self.trainable_counts = np.asarray(columns["trainable_counts"], dtype=np.int32)
        self.weight_sums = np.asarray(columns["weight_sums"], dtype=np.float64)
        self.id_digests = np.frombuffer(bytes(ids), dtype=DIGEST_DTYPE)
        self.sample_digests = np.frombuffer(bytes(whole), dtype=DIGEST_DTYPE)
        self.fingerprint = hash_bytes(bytes(whole))

    def sample(self, index: int) -> TokenSample:
        self._check(index)
        return _foreign_sample(self.rows[index], index)

    def origin(self, index: int) -> str:
        return f"row {index}"

    def conversation(self, index: int) -> dict[str, Any] | None:
        return None


def _foreign_sample(row: Any, index: int) -> TokenSample:
    where = f"row {index} of the data set"
    if not isinstance(row, Mapping):
        raise DataError(f"{where} is a {type(row).__name__}; expected input_ids and labels by name")
    sample = given_sample(where, row)
    if not len(sample.input_ids):
        raise DataError(f"{where} has no tokens; expected at least one")
    return sample
