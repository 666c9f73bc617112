"""TRL's packing on given lengths: reads one JSON job per line from stdin, answers with one JSON line on stdout.

A job: {"lengths": int32 .npy, "capacity", "batch": rows per call, or null for all at once, "out": .npy to write the
lengths of the samples to, bin after bin}. The answer: {"seconds": CPU, "bins": [samples per bin]}. Tokens are one byte
each, so that little is copied. Imports nothing of eft.
"""

from __future__ import annotations

import json
import sys
import time

import datasets
import numpy as np
import pyarrow as pa
from datasets import Dataset
from trl import pack_dataset

datasets.disable_progress_bars()
datasets.disable_caching()


def pack(job: dict[str, object]) -> dict[str, object]:
    """`trl.pack_dataset` with its default strategy, in memory."""
    lengths = np.load(str(job["lengths"]))
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    tokens = pa.LargeListArray.from_arrays(offsets, np.zeros(offsets[-1], np.int8))
    rows = Dataset(pa.table({"input_ids": tokens}))
    start = time.process_time()
    options = {"batch_size": job["batch"] or len(lengths), "keep_in_memory": True}
    packed = pack_dataset(rows, int(str(job["capacity"])), "bfd", map_kwargs=options)
    seconds = time.process_time() - start
    bins = packed.with_format("arrow")["seq_lengths"]
    parts = bins if isinstance(bins, pa.ChunkedArray) else pa.chunked_array(bins)
    np.save(str(job["out"]), np.concatenate([part.values.to_numpy() for part in map(_own, parts.chunks)]))
    return {"seconds": seconds, "bins": [len(ids) for part in parts.chunks for ids in part]}


def _own(part: pa.Array) -> pa.Array:
    """The list array without what a slice leaves before and after it."""
    return pa.concat_arrays([part])


print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    print(json.dumps(pack(json.loads(line))), flush=True)
