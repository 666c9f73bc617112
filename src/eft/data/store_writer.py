"""Writing a store: block after block, in shards that are whole or not there, so that a killed preparation goes on.

While a store grows, its folder also holds

    manifest.jsonl      a line per finished shard: its files with their hashes, and the state of whoever writes
    columns-00000.bin   the per-sample columns of that shard

Both are gone from the finished store. Memory is bounded by one shard's columns (80 bytes per sample).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from xxhash import xxh3_128

from eft.core import atomic
from eft.data.encoded import COLUMNS, EncodedRows

STORE_VERSION = 4
"""Part of every cache key: raise it when the files change their meaning."""

META_FILE = "meta.json"
MANIFEST_FILE = "manifest.jsonl"
SHARD_BLOCKS = 128
"""Blocks of rows in a shard: about 30 MB of text."""
_CHUNK_BYTES = 1 << 20

_SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),
        ("weights", pa.list_(pa.float32())),
        ("source", pa.int32()),
        ("row", pa.int64()),
    ]
)
_CONVERSATION_SCHEMA = pa.schema([("conversation", pa.large_string())])

State = Mapping[str, Any]
"""What the writer's owner needs to go on after a shard, JSON-able."""


class StoreWriter:
    """Writes a store into an existing folder, or goes on with one that was left unfinished there.

    `num_blocks` blocks are already in finished shards, and `state` is what their owner gave with the last of them; the
    next block to `append` is the one after those.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.num_blocks = 0
        self.state: State | None = None
        self._sources: dict[str, int] = {}
        self._shards: list[dict[str, Any]] = []
        self._shard: _Shard | None = None
        self._resume()

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *failure: object) -> None:
        if self._shard is not None:
            self._shard.discard()

    def __len__(self) -> int:
        done: int = sum(shard["samples"] for shard in self._shards)
        return done + (len(self._shard) if self._shard is not None else 0)

    def append(self, rows: EncodedRows, state: Callable[[], State]) -> None:
        """Add the samples of the next block, which may be none; `state` is asked where that ends a shard."""
        if self._shard is None:
            self._shard = _Shard(self.folder, len(self._shards))
        if len(rows):
            self._shard.append(rows, self._sources.setdefault(rows.source, len(self._sources)))
        self._shard.blocks += 1
        if self._shard.blocks == SHARD_BLOCKS:
            self._end_shard(state())

    def _end_shard(self, state: State) -> None:
        assert self._shard is not None
        self._shard.close()
        record = {**self._shard.record(), "sources": list(self._sources), "state": state}
        for name in record["files"]:
            atomic.fsync_path(self.folder / name)
        with (self.folder / MANIFEST_FILE).open("a", encoding="utf-8") as manifest:
            manifest.write(json.dumps(record, ensure_ascii=False) + "\n")
            manifest.flush()
            os.fsync(manifest.fileno())
        self._shards.append(record)
        self.num_blocks += self._shard.blocks
        self._shard = None

    def _resume(self) -> None:
        """Take over the shards that are whole, and remove everything else."""
        manifest = self.folder / MANIFEST_FILE
        kept = b""
        for line in manifest.read_bytes().splitlines(keepends=True) if manifest.exists() else []:
            record = _whole_record(line)
            if record is None or not all(_is_intact(self.folder / n, facts) for n, facts in record["files"].items()):
                break
            self._shards.append(record)
            kept += line
        if self._shards:
            last = self._shards[-1]
            self.state = last["state"]
            self._sources = {name: index for index, name in enumerate(last["sources"])}
            self.num_blocks = sum(shard["blocks"] for shard in self._shards)
            atomic.write_bytes(manifest, kept)
        ours = {MANIFEST_FILE, *(name for shard in self._shards for name in shard["files"])}
        for file in list(self.folder.iterdir()):
            if file.name not in ours or not self._shards:
                file.unlink()

    def finish(self, meta: Mapping[str, Any], state: State) -> None:
        """Write the columns and meta.json, to which `meta` is added, and remove what only the growing store needs.

        At least one sample must have been added. A crash in here is no harm: the next writer starts from the shards.
        """
        if self._shard is not None:
            self._end_shard(state)
        assert len(self), "an empty store is an error of the caller's to report"
        fingerprint = _write_columns(self.folder, self._shards, len(self))
        growing = {MANIFEST_FILE, *(_columns_file(index) for index in range(len(self._shards)))}
        files = {
            file.name: file.stat().st_size
            for file in sorted(self.folder.iterdir())
            if file.name not in growing and file.name != META_FILE
        }
        own = {
            "version": STORE_VERSION,
            "fingerprint": fingerprint,
            "samples": len(self),
            "tokens": sum(shard["tokens"] for shard in self._shards),
            "has_weights": any(shard["has_weights"] for shard in self._shards),
            "largest_id": max(shard["largest_id"] for shard in self._shards),
            "sources": list(self._sources),
            "batches": [shard["batches"] for shard in self._shards],
            "files": files,
        }
        atomic.write_json(self.folder / META_FILE, {**own, **meta})
        for name in growing:
            (self.folder / name).unlink()


class _Shard:
    """The files of one shard, open."""

    def __init__(self, folder: Path, index: int):
        self.folder, self.index = folder, index
        self.blocks = 0
        self._columns: list[dict[str, npt.NDArray[Any]]] = []
        self._facts: dict[str, Any] = {"tokens": 0, "has_weights": False, "largest_id": 0}
        compressed = pa.ipc.IpcWriteOptions(compression="lz4")  # a quarter of zstd's time
        self._tokens = pa.ipc.new_file(str(folder / tokens_file(index)), _SCHEMA)
        self._conversations = pa.ipc.new_file(
            str(folder / conversations_file(index)), _CONVERSATION_SCHEMA, options=compressed
        )
        self._is_open = True

    def __len__(self) -> int:
        return sum(len(columns["lengths"]) for columns in self._columns)

    def append(self, rows: EncodedRows, source: int) -> None:
        lengths = rows.columns["lengths"]
        sources = np.full(len(rows), source, dtype=np.int32)
        offsets = np.zeros(len(rows) + 1, dtype=np.int32)
        np.cumsum(lengths, out=offsets[1:])
        columns = [
            _list_column(offsets, rows.ids, pa.int32()),
            _list_column(offsets, rows.labels, pa.int32()),
            _weights_column(rows, lengths),
            _column(sources, pa.int32()),
            _column(rows.columns["row_ids"], pa.int64()),
        ]
        self._tokens.write_batch(pa.record_batch(columns, schema=_SCHEMA))
        texts = pa.record_batch([_text_column(rows.conversations)], schema=_CONVERSATION_SCHEMA)
        self._conversations.write_batch(texts)
        self._columns.append({**rows.columns, "source_ids": sources})
        self._facts["tokens"] += len(rows.ids)
        self._facts["has_weights"] |= rows.weights is not None
        self._facts["largest_id"] = max(self._facts["largest_id"], int(rows.ids.max()))

    def close(self) -> None:
        # Closing an Arrow writer twice would write a second footer.
        if self._is_open:
            self._is_open = False
            self._tokens.close()
            self._conversations.close()

    def discard(self) -> None:
        """Close the files and delete them: on a full disk they only take room."""
        try:
            self.close()
        finally:
            for name in (tokens_file(self.index), conversations_file(self.index), _columns_file(self.index)):
                (self.folder / name).unlink(missing_ok=True)

    def record(self) -> dict[str, Any]:
        """Write the columns; the shard's line of the manifest, without the state."""
        with (self.folder / _columns_file(self.index)).open("wb") as file:
            for name, dtype in COLUMNS.items():
                parts = [columns[name] for columns in self._columns]
                np.save(file, np.concatenate(parts) if parts else np.zeros(0, dtype))
        names = (tokens_file(self.index), conversations_file(self.index), _columns_file(self.index))
        return {
            "blocks": self.blocks,
            "samples": len(self),
            "batches": [len(columns["lengths"]) for columns in self._columns],
            **self._facts,
            "files": {name: _facts_of(self.folder / name) for name in names},
        }


def tokens_file(shard: int) -> str:
    return f"tokens-{shard:05d}.arrow"


def conversations_file(shard: int) -> str:
    return f"conversations-{shard:05d}.arrow"


def _columns_file(index: int) -> str:
    return f"columns-{index:05d}.bin"


def _facts_of(file: Path) -> list[Any]:
    return [file.stat().st_size, _digest_of(file)]


def _is_intact(file: Path, facts: list[Any]) -> bool:
    return file.is_file() and file.stat().st_size == facts[0] and _digest_of(file) == facts[1]


def _digest_of(file: Path) -> str:
    """Tells a file that was written to its end from one that was not: nobody forges it in between."""
    digest = xxh3_128()
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _whole_record(line: bytes) -> dict[str, Any] | None:
    """A line of the manifest; None for one that was not written to its end."""
    if not line.endswith(b"\n"):
        return None
    try:
        record: dict[str, Any] = json.loads(line)
    except ValueError:
        return None
    return record


def _write_columns(folder: Path, shards: Sequence[Mapping[str, Any]], count: int) -> str:
    """Put the columns of all shards together, one shard at a time; returns the fingerprint of the store."""
    digest = sha256((count * np.dtype(COLUMNS["sample_digests"]).itemsize).to_bytes(8, "little"))
    files: dict[str, IO[bytes]] = {name: (folder / f"{name}.npy").open("wb") for name in COLUMNS}
    try:
        for name, file in files.items():
            facts = {"descr": COLUMNS[name], "fortran_order": False, "shape": (count,)}
            np.lib.format.write_array_header_1_0(file, facts)
        for index in range(len(shards)):
            with (folder / _columns_file(index)).open("rb") as shard:
                for name, file in files.items():
                    values = np.load(shard)
                    file.write(values.tobytes())
                    if name == "sample_digests":
                        digest.update(values.tobytes())
    finally:
        for file in files.values():
            file.close()
    return digest.hexdigest()


# Arrow arrays are put together from buffers: `pa.array` imports pandas (a second).


def _column(values: npt.NDArray[Any], kind: pa.DataType) -> pa.Array:
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(np.ascontiguousarray(values))])


def _list_column(
    offsets: npt.NDArray[np.int32], values: npt.NDArray[Any], kind: pa.DataType, present: Any = None
) -> pa.Array:
    validity = None if present is None else pa.py_buffer(np.packbits(present, bitorder="little"))
    buffers = [validity, pa.py_buffer(offsets)]
    return pa.Array.from_buffers(pa.list_(kind), len(offsets) - 1, buffers, children=[_column(values, kind)])


def _weights_column(rows: EncodedRows, lengths: npt.NDArray[np.int32]) -> pa.Array:
    if rows.weights is None:
        return pa.nulls(len(rows), pa.list_(pa.float32()))
    offsets = np.zeros(len(rows) + 1, dtype=np.int32)
    np.cumsum(np.where(rows.is_weighted, lengths, 0), out=offsets[1:])
    own = rows.weights[np.repeat(rows.is_weighted, lengths)]
    return _list_column(offsets, own, pa.float32(), rows.is_weighted)


def _text_column(texts: Sequence[bytes | None]) -> pa.Array:
    offsets = np.zeros(len(texts) + 1, dtype=np.int64)
    np.cumsum([0 if text is None else len(text) for text in texts], out=offsets[1:])
    present = pa.py_buffer(np.packbits([text is not None for text in texts], bitorder="little"))
    data = pa.py_buffer(b"".join(text for text in texts if text is not None))
    return pa.Array.from_buffers(pa.large_string(), len(texts), [present, pa.py_buffer(offsets), data])
