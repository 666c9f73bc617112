"""Samples of one data set in memory, for the gates where there is no store: a stream's first rows, rows with images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from eft.core.records import TokenSample
from eft.data.conversation_text import read_conversation
from eft.data.encoded import EncodedRows
from eft.data.sample_set import Digests, SampleSet
from eft.data.store import TokenBlock


class BlockSet(SampleSet):
    """The samples of one block of rows."""

    def __init__(self, rows: EncodedRows, origins: Sequence[str] | None = None, digests: Digests | None = None) -> None:
        """
        Args:
            rows: at least one sample.
            origins: where each sample is from; None: as the block says.
            digests: equal for equal samples, where ids, labels and weights alone do not tell; None: they do.
        """
        columns = rows.columns
        self._rows, self._origins = rows, origins
        self.lengths, self.weight_sums = columns["lengths"], columns["weight_sums"]
        self.trainable_counts, self.id_digests = columns["trainable_counts"], columns["id_digests"]
        self.sample_digests = columns["sample_digests"] if digests is None else digests
        self.largest_id = int(rows.ids.max())
        self._offsets = np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int32)

    def sample(self, index: int) -> TokenSample:
        self._check(index)
        here = slice(int(self._offsets[index]), int(self._offsets[index + 1]))
        weights = self._rows.weights[here] if self._rows.weights is not None and self._rows.is_weighted[index] else None
        return TokenSample(self._rows.ids[here], self._rows.labels[here], weights)

    def origin(self, index: int) -> str:
        if self._origins is not None:
            return self._origins[index]
        return f"{self._rows.source} row {self._rows.columns['row_ids'][index]}"

    def conversation(self, index: int) -> dict[str, Any] | None:
        text = self._rows.conversations[index]
        return None if text is None else read_conversation(text.decode())

    def blocks(self) -> Iterator[TokenBlock]:
        """As `TokenStore.blocks`: all of them at once."""
        conversations = [None if text is None else text.decode() for text in self._rows.conversations]
        edges = np.ones(len(self) + 1, dtype=np.bool_)
        edges[1:-1] = np.diff(self._rows.columns["row_ids"]) != 0
        yield TokenBlock(self._offsets, self._rows.ids, self._rows.labels, conversations, edges[:-1], edges[1:])
