"""How fast a data set is prepared: with how many processes, with which encoder. Neither changes what comes out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np

from eft.core.errors import DataError
from eft.data.block_encoder import BlockEncoder, Job
from eft.data.bpe import fast_encoder
from eft.data.encoded import EncodedRows
from eft.data.fast_tokenizer import FastTokenizer
from eft.data.readers import Block
from eft.data.rows import decoded
from eft.data.sources import iter_blocks, size_hint

FAST_FROM_BYTES = 32 << 20
"""Smaller data sets are done before the fast encoder is ready."""
PARALLEL_FROM_BYTES = 32 << 20
"""Smaller ones are done before processes have started."""
MOST_PROCESSES = 6
"""By default: as many as one process can read and write for, in 1.5 GB together."""
_SAMPLE_ROWS, _COMPARED_ROWS = 512, 128


def num_processes(job: Job) -> int:
    """`dataset_processes`; by default one per core up to MOST_PROCESSES, and one in all for a small data set."""
    asked = job.cfg.dataset_processes
    if asked is not None:
        return asked
    cores = len(os.sched_getaffinity(0))
    return min(cores, MOST_PROCESSES) if size_hint(job.spec) >= PARALLEL_FROM_BYTES else 1


def may_be_fast(job: Job) -> bool:
    """Whether the fast encoder is worth a try."""
    return job.spec.type not in (None, "pretokenized") and size_hint(job.spec) >= FAST_FROM_BYTES


def with_fast_tokenizer(job: Job) -> tuple[Job, str]:
    """The job with the fast encoder in its tokenizer, where the data set is large and the encoder has been shown to
    give the same ids: on adversarial strings, and on texts of the first rows; for some of these rows ids, labels and
    weights are compared. Else the job as it is, with a remark that says why."""
    if not may_be_fast(job):
        return job, ""
    block = next(iter_blocks(job.spec), None)
    if block is None:
        return job, ""
    first = list(islice(decoded(block), _SAMPLE_ROWS))
    texts = [text for _, data, _ in first for text in _texts(data)]
    encoder = fast_encoder(job.tokenizer, texts)
    if isinstance(encoder, str):
        return job, f"; by the tokenizer's own encoder, not the fast one: {encoder}"
    faster = replace(job, tokenizer=FastTokenizer(job.tokenizer, encoder))
    block = Block(block.file, "rows", block.first, first[:_COMPARED_ROWS])
    try:
        same = _equal(BlockEncoder(job)(block).rows, BlockEncoder(faster)(block).rows)
    except DataError:
        return job, ""  # which will be told in its place
    return (faster, "") if same else (job, "; by the tokenizer's own encoder: the fast one differs on the first rows")


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _equal(one: EncodedRows, other: EncodedRows) -> bool:
    return np.array_equal(one.columns["sample_digests"], other.columns["sample_digests"])
