"""The token store: prepared samples on disk, memory-mapped, content-addressed.

A store is a folder, written whole or not at all:

    tokens.arrow         Arrow IPC file: input_ids list<int32>, labels list<int32>, weights list<float32> or null,
                         source int32, row int64
    conversations.arrow  Arrow IPC file: the row's messages and tools as JSON, or null (only read for sample answers)
    <column>.npy         one value per sample: lengths, sums, digests (see COLUMNS), memory-mapped
    meta.json            what the store was made of, its ledger, the sizes of its files

Opening reads meta.json and maps the rest: neither time nor memory grows with the number of tokens. `sample` returns
views of the mapped file. Views are read-only: copy before writing, and before `torch.from_numpy`.
"""

from __future__ import annotations

import json
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from eft.core import atomic
from eft.core.errors import DataError
from eft.core.hashing import hash_bytes
from eft.core.records import Int32Array, Int64Array, TokenDataset, TokenSample
from eft.data.foreign import ForeignDataset
from eft.data.sample_set import DIGEST_DTYPE, SampleSet, digests_of, measure

STORE_VERSION = 2
"""Part of every cache key: raise it when the files change their meaning."""

TOKENS_FILE = "tokens.arrow"
CONVERSATIONS_FILE = "conversations.arrow"
META_FILE = "meta.json"

COLUMNS: dict[str, str] = {
    "lengths": "i",
    "trainable_counts": "i",
    "weight_sums": "d",
    "source_ids": "i",
    "row_ids": "q",
}
"""Per-sample columns and their `array` type codes: int32, int32, float64, int32, int64."""

_BATCH_TOKENS = 1 << 20
_BATCH_ROWS = 1 << 16
_SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),
        ("weights", pa.list_(pa.float32())),
        ("source", pa.int32()),
        ("row", pa.int64()),
    ]
)
_CONVERSATION_SCHEMA = pa.schema([("json", pa.large_string())])


class TokenStore(SampleSet):
    """A store on disk. Pickles as its path, so that DataLoader workers map the same files."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self.meta: dict[str, Any] = json.loads((path / META_FILE).read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{path}: damaged token store ({META_FILE}: {error}); delete the folder") from error
        for name, size in self.meta["files"].items():
            found = (path / name).stat().st_size if (path / name).is_file() else None
            if found != size:
                raise DataError(
                    f"{path}: damaged token store: {name} has {found} bytes, expected {size}; delete the folder"
                )
        self.lengths = self._map("lengths")
        self.trainable_counts = self._map("trainable_counts")
        self.weight_sums = self._map("weight_sums")
        self.source_ids: Int32Array = self._map("source_ids")
        self.row_ids: Int64Array = self._map("row_ids")
        self.id_digests = self._map("id_digests")
        self.sample_digests = self._map("sample_digests")
        self.source_names: list[str] = self.meta["sources"]
        self.fingerprint = self.meta["fingerprint"]
        self.largest_id = self.meta["largest_id"]
        self.has_weights: bool = self.meta["has_weights"]
        if self.has_weights:
            self.column_names = ("input_ids", "labels", "weights")
        self._starts: list[int] = self._map("batch_starts").tolist()
        self._reader = pa.ipc.open_file(pa.memory_map(str(path / TOKENS_FILE), "r"))
        self._batches: dict[int, tuple[Int32Array, Int32Array, Int32Array, tuple[Any, Any] | None]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return open_store, (self.path,)

    def _map(self, name: str) -> Any:
        return np.load(self.path / f"{name}.npy", mmap_mode="r").view(np.ndarray)

    def _load_batch(self, number: int) -> tuple[Int32Array, Int32Array, Int32Array, tuple[Any, Any] | None]:
        """Views of one record batch: row offsets int32 [rows + 1], ids and labels int32 [tokens], weights."""
        batch = self._reader.get_batch(number)
        weights = None
        if self.has_weights and batch.column("weights").null_count < len(batch):
            weights = _list_views(batch.column("weights"), np.float32)
        offsets, ids = _list_views(batch.column("input_ids"), np.int32)
        views = (offsets, ids, _list_views(batch.column("labels"), np.int32)[1], weights)
        self._batches[number] = views
        return views

    def sample(self, index: int) -> TokenSample:
        """Sample `index` as views of the mapped file: ids, labels int32 [length], weights float32 [length] or None."""
        self._check(index)
        number = bisect_right(self._starts, index) - 1
        views = self._batches.get(number) or self._load_batch(number)
        offsets, ids, labels, weights = views
        row = index - self._starts[number]
        start, end = offsets[row], offsets[row + 1]
        if weights is None:
            return TokenSample(ids[start:end], labels[start:end])
        weight_offsets, values = weights
        own = values[weight_offsets[row] : weight_offsets[row + 1]]
        return TokenSample(ids[start:end], labels[start:end], own if len(own) else None)

    def origin(self, index: int) -> str:
        return f"{self.source_names[self.source_ids[index]]} row {self.row_ids[index]}"

    def conversation(self, index: int) -> dict[str, Any] | None:
        self._check(index)
        number = bisect_right(self._starts, index) - 1
        with pa.memory_map(str(self.path / CONVERSATIONS_FILE), "r") as file:
            text = pa.ipc.open_file(file).get_batch(number).column("json")[index - self._starts[number]].as_py()
        return None if text is None else cast("dict[str, Any]", json.loads(text))


class StoreWriter:
    """Writes a store into an existing empty folder, in memory bounded by one batch plus 60 bytes per sample."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._sources: dict[str, int] = {}
        self._columns: dict[str, array[Any]] = {name: array(code) for name, code in COLUMNS.items()}
        self._id_digests, self._sample_digests = bytearray(), bytearray()
        self._pending: list[tuple[TokenSample, str | None]] = []
        self._pending_tokens = 0
        self._starts = [0]
        self._has_weights = False
        self._largest_id = 0
        self._tokens = pa.ipc.new_file(str(folder / TOKENS_FILE), _SCHEMA)
        self._conversations = pa.ipc.new_file(
            str(folder / CONVERSATIONS_FILE), _CONVERSATION_SCHEMA, options=pa.ipc.IpcWriteOptions(compression="zstd")
        )
        self._open = [self._tokens, self._conversations]

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *failure: object) -> None:
        self._close()

    def _close(self) -> None:
        # Closing an Arrow writer twice would write a second footer.
        for file in self._open:
            file.close()
        self._open.clear()

    def __len__(self) -> int:
        return len(self._columns["lengths"])

    def add(self, source: str, row: int, sample: TokenSample, conversation: str | None = None) -> None:
        """Append a sample of at least one token; `conversation` is the row's messages and tools as JSON."""
        sample = TokenSample(
            np.ascontiguousarray(sample.input_ids, dtype=np.int32),
            np.ascontiguousarray(sample.labels, dtype=np.int32),
            None if sample.weights is None else np.ascontiguousarray(sample.weights, dtype=np.float32),
        )
        length = len(sample.input_ids)
        assert length, "a sample has tokens"
        assert length == len(sample.labels), "a label per token"
        assert sample.weights is None or len(sample.weights) == length, "a weight per token"
        count, weight = measure(sample)
        values = (length, count, weight, self._sources.setdefault(source, len(self._sources)), row)
        for column, value in zip(self._columns.values(), values, strict=True):
            column.append(value)
        id_digest, sample_digest = digests_of(sample)
        self._id_digests += id_digest
        self._sample_digests += sample_digest
        self._largest_id = max(self._largest_id, int(sample.input_ids.max()))
        self._has_weights |= sample.weights is not None
        self._pending.append((sample, conversation))
        self._pending_tokens += length
        if self._pending_tokens >= _BATCH_TOKENS or len(self._pending) >= _BATCH_ROWS:
            self._flush()

    def _flush(self) -> None:
        if not self._pending:
            return
        samples = [sample for sample, _ in self._pending]
        first = self._starts[-1]
        rows = [
            _list_column([sample.input_ids for sample in samples], pa.int32()),
            _list_column([sample.labels for sample in samples], pa.int32()),
            _list_column([sample.weights for sample in samples], pa.float32()),
            _column(np.frombuffer(self._columns["source_ids"][first:], dtype=np.int32), pa.int32()),
            _column(np.frombuffer(self._columns["row_ids"][first:], dtype=np.int64), pa.int64()),
        ]
        self._tokens.write_batch(pa.record_batch(rows, schema=_SCHEMA))
        texts = _text_column([text for _, text in self._pending])
        self._conversations.write_batch(pa.record_batch([texts], schema=_CONVERSATION_SCHEMA))
        self._starts.append(first + len(samples))
        self._pending.clear()
        self._pending_tokens = 0

    def finish(self, meta: Mapping[str, Any]) -> None:
        """Write the columns and meta.json; `meta` is added to it. At least one sample must have been added."""
        self._flush()
        assert len(self), "an empty store is an error of the caller's to report"
        self._close()
        for name, values in self._columns.items():
            np.save(self.folder / f"{name}.npy", np.frombuffer(values, dtype=values.typecode))
        np.save(self.folder / "batch_starts.npy", np.asarray(self._starts[:-1], dtype=np.int64))
        for name, digests in (("id_digests", self._id_digests), ("sample_digests", self._sample_digests)):
            np.save(self.folder / f"{name}.npy", np.frombuffer(digests, dtype=DIGEST_DTYPE))
        own = {
            "version": STORE_VERSION,
            "fingerprint": hash_bytes(bytes(self._sample_digests)),
            "samples": len(self),
            "tokens": sum(self._columns["lengths"]),
            "has_weights": self._has_weights,
            "largest_id": self._largest_id,
            "sources": list(self._sources),
            "files": {file.name: file.stat().st_size for file in sorted(self.folder.iterdir())},
        }
        atomic.write_json(self.folder / META_FILE, {**own, **meta})


# Arrow arrays are put together from, and taken apart into, buffers: `pa.array` and `to_numpy` import pandas (a second).


def _list_views(column: pa.Array, dtype: npt.DTypeLike) -> tuple[Int32Array, npt.NDArray[Any]]:
    """Offsets int32 [rows + 1] and flat values of a whole (unsliced) list column, without a copy."""
    _, offsets, _, values = column.buffers()
    return (
        np.frombuffer(offsets, dtype=np.int32, count=len(column) + 1),
        np.frombuffer(values, dtype=dtype, count=len(column.values)),
    )


def _column(values: npt.NDArray[Any], kind: pa.DataType) -> pa.Array:
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(values)])


def _offsets(lengths: Sequence[int], dtype: npt.DTypeLike) -> pa.Buffer:
    offsets = np.zeros(len(lengths) + 1, dtype=dtype)
    np.cumsum(lengths, out=offsets[1:])
    return pa.py_buffer(offsets)


def _presence(values: Sequence[Any]) -> pa.Buffer:
    return pa.py_buffer(np.packbits([value is not None for value in values], bitorder="little"))


def _list_column(values: Sequence[npt.NDArray[Any] | None], kind: pa.DataType) -> pa.Array:
    present = [value for value in values if value is not None]
    if not present:
        return pa.nulls(len(values), pa.list_(kind))
    offsets = _offsets([0 if value is None else len(value) for value in values], np.int32)
    flat = _column(np.concatenate(present), kind)
    return pa.Array.from_buffers(pa.list_(kind), len(values), [_presence(values), offsets], children=[flat])


def _text_column(texts: Sequence[str | None]) -> pa.Array:
    encoded = [b"" if text is None else text.encode() for text in texts]
    offsets = _offsets([len(text) for text in encoded], np.int64)
    return pa.Array.from_buffers(
        pa.large_string(), len(texts), [_presence(texts), offsets, pa.py_buffer(b"".join(encoded))]
    )


def write_store(
    folder: Path, samples: Iterable[tuple[str, int, TokenSample]], *, meta: Mapping[str, Any] | None = None
) -> TokenStore:
    """Write `(source name, row number, sample)` to the new folder `folder`, atomically, and open it.

    Raises FileExistsError when `folder` exists.
    """
    with atomic.new_folder(folder) as temporary, StoreWriter(temporary) as writer:
        for source, row, sample in samples:
            writer.add(source, row, sample)
        writer.finish(meta or {})
    return open_store(folder)


def open_store(path: Path) -> TokenStore:
    """Map a store. Raises DataError when the folder is not a whole token store."""
    if not (path / META_FILE).is_file():
        raise DataError(f"{path}: not a token store (no {META_FILE} in it)")
    return TokenStore(path)


def as_token_dataset(dataset: Any) -> TokenDataset:
    """Take a TokenDataset as it is; wrap a `datasets.Dataset` or a sequence of `{"input_ids", "labels"}`.

    Wrapping reads every row once, for lengths and fingerprint. Raises DataError naming the row and what it lacks.
    """
    if isinstance(dataset, SampleSet):
        return dataset
    if all(hasattr(dataset, name) for name in ("sample", "lengths", "weight_sums", "trainable_counts", "fingerprint")):
        return cast("TokenDataset", dataset)
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise DataError(
            f"the data set is a {type(dataset).__name__} without length or random access, so its steps cannot be "
            "planned; pass a datasets.Dataset, a list of rows, or what prepare_datasets returns"
        )
    # Rows as arrays instead of Python lists: several times faster for `datasets.Dataset`, which alone has this method.
    return ForeignDataset(dataset.with_format("numpy") if hasattr(dataset, "with_format") else dataset)
