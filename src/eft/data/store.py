"""The token store: prepared samples on disk, memory-mapped, content-addressed.

A store is a folder, written whole or not at all:

    tokens-00000.arrow         Arrow IPC file: input_ids list<int32>, labels list<int32>, weights list<float32> or
                               null, source int32, row int64; a record batch per block of rows, further shards 00001 …
    conversations-00000.arrow  Arrow IPC file: the row's messages and tools (see conversation_text), or null
    <column>.npy               one value per sample: lengths, sums, digests (see encoded.COLUMNS), memory-mapped
    meta.json                  what the store was made of, its ledger, the sizes of its files

Opening reads meta.json and maps the rest: neither time nor memory grows with the number of tokens. `sample` returns
views of the mapped file. Views are read-only: copy before writing, and before `torch.from_numpy`.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from eft.core import atomic
from eft.core.errors import DataError
from eft.core.records import Int32Array, Int64Array, TokenDataset, TokenSample
from eft.data.conversation_text import read_conversation
from eft.data.encoded import StoredSample, encode_samples
from eft.data.foreign import ForeignDataset
from eft.data.sample_set import SampleSet
from eft.data.store_writer import META_FILE, StoreWriter, conversations_file, tokens_file

UInt64Array = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class TokenBlock:
    """Neighbouring samples of a store, end to end."""

    offsets: Int32Array
    """Where each sample's tokens start, int32 [samples + 1]."""
    ids: Int32Array
    labels: Int32Array
    """[tokens], as `ids`."""
    conversations: list[str | None]
    """As `conversation_text` writes them."""
    starts_row: npt.NDArray[np.bool_]
    """The first, and the last, sample of its row, bool [samples]."""
    ends_row: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.offsets) - 1


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
        self.row_keys: UInt64Array = self._map("row_keys")
        self.source_names: list[str] = self.meta["sources"]
        self.fingerprint = self.meta["fingerprint"]
        self.largest_id = self.meta["largest_id"]
        self.has_weights: bool = self.meta["has_weights"]
        if self.has_weights:
            self.column_names = ("input_ids", "labels", "weights")
        sizes = [size for shard in self.meta["batches"] for size in shard]
        self._starts: list[int] = (np.cumsum(sizes, dtype=np.int64) - sizes).tolist()
        self._shard_starts = np.cumsum([0, *map(len, self.meta["batches"])]).tolist()
        self._readers: dict[int, Any] = {}
        self._batches: dict[int, tuple[Int32Array, Int32Array, Int32Array, tuple[Any, Any] | None]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopened, (self.path, self.source_names)

    def with_sources(self, names: Mapping[str, str]) -> TokenStore:
        """The same store, whose rows are said to be from the files that `names` has for those it was made from."""
        if any(old != new for old, new in names.items()):
            self.source_names = [names.get(name, name) for name in self.source_names]
        return self

    def _map(self, name: str) -> Any:
        return np.load(self.path / f"{name}.npy", mmap_mode="r").view(np.ndarray)

    def _load_batch(self, number: int) -> tuple[Int32Array, Int32Array, Int32Array, tuple[Any, Any] | None]:
        """Views of one record batch: row offsets int32 [rows + 1], ids and labels int32 [tokens], weights."""
        shard, within = self._place(number)
        if shard not in self._readers:
            self._readers[shard] = pa.ipc.open_file(pa.memory_map(str(self.path / tokens_file(shard)), "r"))
        batch = self._readers[shard].get_batch(within)
        weights = None
        if self.has_weights and batch.column("weights").null_count < len(batch):
            weights = _list_views(batch.column("weights"), np.float32)
        offsets, ids = _list_views(batch.column("input_ids"), np.int32)
        views = (offsets, ids, _list_views(batch.column("labels"), np.int32)[1], weights)
        self._batches[number] = views
        return views

    def _place(self, batch: int) -> tuple[int, int]:
        """(shard, number in it) of a record batch."""
        shard = bisect_right(self._shard_starts, batch) - 1
        return shard, batch - self._shard_starts[shard]

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

    def blocks(self) -> Iterator[TokenBlock]:
        """All samples in order, in blocks as they were written."""
        row_starts = np.ones(len(self) + 1, dtype=np.bool_)
        row_starts[1:-1] = (np.diff(self.row_ids) != 0) | (np.diff(self.source_ids) != 0)
        for number, start in enumerate(self._starts):
            offsets, ids, labels, _ = self._batches.get(number) or self._load_batch(number)
            stop = start + len(offsets) - 1
            yield TokenBlock(
                offsets,
                ids,
                labels,
                self._conversations(number),
                row_starts[start:stop],
                row_starts[start + 1 : stop + 1],
            )

    def _conversations(self, batch: int) -> list[str | None]:
        shard, within = self._place(batch)
        with pa.memory_map(str(self.path / conversations_file(shard)), "r") as file:
            texts: list[str | None] = pa.ipc.open_file(file).get_batch(within).column("conversation").to_pylist()
        return texts

    def origin(self, index: int) -> str:
        return f"{self.source_names[self.source_ids[index]]} row {self.row_ids[index]}"

    def conversation(self, index: int) -> dict[str, Any] | None:
        self._check(index)
        number = bisect_right(self._starts, index) - 1
        shard, within = self._place(number)
        with pa.memory_map(str(self.path / conversations_file(shard)), "r") as file:
            text = pa.ipc.open_file(file).get_batch(within).column("conversation")[index - self._starts[number]].as_py()
        return None if text is None else read_conversation(text)


def _list_views(column: pa.Array, dtype: npt.DTypeLike) -> tuple[Int32Array, npt.NDArray[Any]]:
    """Offsets int32 [rows + 1] and flat values of a whole (unsliced) list column, without a copy."""
    _, offsets, _, values = column.buffers()
    return (
        np.frombuffer(offsets, dtype=np.int32, count=len(column) + 1),
        np.frombuffer(values, dtype=dtype, count=len(column.values)),
    )


def write_store(
    folder: Path, samples: Iterable[tuple[str, int, TokenSample]], *, meta: Mapping[str, Any] | None = None
) -> TokenStore:
    """Write `(source name, row number, sample)` to the new folder `folder`, atomically, and open it.

    Raises FileExistsError when `folder` exists.
    """
    with atomic.new_folder(folder) as temporary, StoreWriter(temporary) as writer:
        for source, block in groupby(samples, key=lambda sample: sample[0]):
            stored = [StoredSample(row, row, tokens, None) for _, row, tokens in block]
            writer.append(encode_samples(source, stored), dict)
        writer.finish(meta or {}, {})
    return open_store(folder)


def open_store(path: Path) -> TokenStore:
    """Map a store. Raises DataError when the folder is not a whole token store."""
    if not (path / META_FILE).is_file():
        raise DataError(f"{path}: not a token store (no {META_FILE} in it)")
    return TokenStore(path)


def _reopened(path: Path, source_names: list[str]) -> TokenStore:
    store = open_store(path)
    store.source_names = source_names
    return store


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
