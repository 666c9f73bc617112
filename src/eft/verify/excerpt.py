"""A few short documents out of the user's own data, so that a check takes seconds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import cycle

import numpy as np

from eft.core.constants import IGNORE_INDEX
from eft.core.records import TokenDataset, TokenSample
from eft.data.plan import Plan
from eft.data.store import as_token_dataset

UNEVEN = (1.0, 0.55, 0.8, 0.35)
"""Shares of the longest length that the documents of an excerpt are cut to, in turn."""
_FEWEST_TOKENS = 2


def cut(sample: TokenSample, length: int) -> TokenSample:
    """At most `length` ≥ 2 consecutive tokens of `sample`, its first trainable token among them."""
    total = len(sample.input_ids)
    if total <= length:
        return sample
    trained = 1 + int(np.argmax(sample.labels[1:] != IGNORE_INDEX))
    start = min(max(0, trained - length // 2), total - length)
    window = slice(start, start + length)
    weights = None if sample.weights is None else sample.weights[window]
    return TokenSample(sample.input_ids[window], sample.labels[window], weights)


def first_documents(plan: Plan, count: int, longest: int) -> list[TokenSample]:
    """`count` documents of at most `longest` tokens, of uneven lengths, in the order of the plan.

    They start with the fullest bin of the first step. A small data set gives the same document several times.
    """
    lengths = cycle(max(_FEWEST_TOKENS, round(share * longest)) for share in UNEVEN)
    return [
        cut(plan.dataset.sample(index), length)
        for index, length, _ in zip(_sample_ids(plan), lengths, range(count), strict=False)
    ]


def documents_for(plan: Plan, *, bins: int, capacity: int, packed: bool) -> list[TokenSample]:
    """Documents that fill at least `bins` bins of `capacity` tokens: whole bins, halves, or one document each."""
    halves = (capacity, capacity // 2, capacity - capacity // 2) if packed else (capacity,)
    documents: list[TokenSample] = []
    tokens = 0
    for index, length in zip(_sample_ids(plan), cycle(halves), strict=False):
        documents.append(cut(plan.dataset.sample(index), max(_FEWEST_TOKENS, length)))
        tokens += len(documents[-1].input_ids)
        if len(documents) >= bins and (not packed or tokens >= bins * capacity):
            return documents
    raise AssertionError("the ids repeat for ever")


def as_dataset(documents: Sequence[TokenSample]) -> TokenDataset:
    """The documents as a data set of their own."""
    rows = []
    for document in documents:
        row = {"input_ids": document.input_ids, "labels": document.labels}
        rows.append(row if document.weights is None else {**row, "weights": document.weights})
    return as_token_dataset(rows)


def _sample_ids(plan: Plan) -> Iterator[int]:
    """The samples of the first steps, the fullest bin of the first step in front; again and again."""
    bins = sorted(plan.step(0).bins, key=len, reverse=True)
    bins += [ids for step in range(1, min(plan.total_steps, 64)) for ids in plan.step(step).bins]
    return cycle(int(index) for ids in bins for index in ids)
