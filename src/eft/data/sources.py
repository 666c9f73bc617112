"""Where rows come from: local files, folders, saved `datasets` folders, the hub.

Everything streams: a JSONL, CSV or Parquet file is never held in memory whole (a JSON array is held as text). Every row
knows its file and number, so that every later message can name it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from eft.config.data import DatasetConfig
from eft.core.errors import DataError, nearest
from eft.core.hashing import hash_bytes, hash_file
from eft.data.readers import BLOCK_ROWS, COMPRESSED, READERS, Block, Numbered, Row, count_rows, row_blocks
from eft.data.rows import OnBroken, decoded, rows_of, without_padding
from eft.data.splits import is_hub, slice_bounds, slice_of, split_name

KINDS = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
}
"""File extension to `ds_type`; `.gz` and `.zst` may follow the extension of a text file."""
_UNREADABLE = frozenset(
    [
        ".bz2",
        ".xz",
        ".zip",
        ".tar",
        ".tgz",
        ".7z",
        ".lz4",
        ".snappy",
        ".tsv",
        ".xls",
        ".xlsx",
        ".feather",
        ".orc",
        ".avro",
        ".pkl",
        ".npy",
        ".npz",
        ".db",
        ".sqlite",
    ]
)
"""Data that would be left out in silence if only known extensions were looked for."""
_COMPRESSION = 4
_SPLIT_WORDS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing", "eval", "evaluation"},
}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class Part:
    """A file of a data set, or the whole of one that is no file."""

    name: str
    blocks: Callable[[int], Iterator[Block]]
    """Its blocks from this number on, the same every time."""


@dataclass(frozen=True)
class _Source:
    """A source that was found: how to read, count and fingerprint it, before any slice of the split."""

    blocks: Callable[[], Iterator[Block]]
    count: Callable[[], int | None]
    fingerprint: Callable[[], str]
    names: list[str]
    """What its rows are said to be from, in reading order."""
    size: Callable[[], int]
    """Bytes of text, roughly."""
    parts: list[Part]


def iter_blocks(spec: DatasetConfig) -> Iterator[Block]:
    """The rows of a data set in blocks, in file order; the same blocks every time.

    Raises DataError: missing or unreadable file, unknown extension, missing split.
    """
    source = _find(spec)
    start, stop = slice_bounds(spec, lambda: sum(1 for block in source.blocks() for _ in rows_of(block, _ignore)))
    if (start, stop) == (0, None):
        return source.blocks()
    return _sliced(source.blocks(), start, stop)


def parts_of(spec: DatasetConfig) -> list[Part]:
    """A data set in parts that can be read in any order, nothing of it counted or copied; a hub data set streams.

    Raises DataError as `iter_blocks` does.
    """
    path = Path(spec.path).expanduser()
    if not path.exists() and _may_be_hub_id(spec):
        return [_hub_part(spec)]
    if slice_of(spec) is None:
        return _find(spec).parts
    return [Part(spec.path, lambda first: islice(iter_blocks(spec), first, None))]


def iter_rows(spec: DatasetConfig, on_broken: OnBroken | None = None) -> Iterator[Row]:
    """The rows of a data set, in file order.

    Args:
        spec: the entry of `datasets` or `test_datasets`.
        on_broken: called for each line that cannot be read as a row, which is then left out; None: raise instead.

    Raises:
        DataError: as `iter_blocks`; an unreadable row, no rows at all.
    """
    empty = True
    for block in iter_blocks(spec):
        for row in rows_of(block, on_broken):
            empty = False
            yield row
    if empty:
        raise no_rows(spec)


def no_rows(spec: DatasetConfig) -> DataError:
    """The data set is empty."""
    return DataError(f"{spec.path}: no rows (split {spec.split!r}); expected at least one")


def count_hint(spec: DatasetConfig) -> int | None:
    """The number of rows where that is cheap to know, for a progress bar; None where it is not. Raises DataError."""
    count = _find(spec).count()
    if count is None or slice_of(spec) is None:
        return count
    start, stop = slice_bounds(spec, lambda: count)
    return len(range(count)[start:stop])


def source_fingerprint(spec: DatasetConfig) -> str:
    """A string that changes when the rows change: SHA-256 of the local files' bytes in reading order and of the slice,
    or the fingerprint that `datasets` gives a hub data set. Names and places do not count.

    Raises DataError as `iter_blocks` does.
    """
    bounds = None if is_hub(spec) else slice_of(spec)
    content = _find(spec).fingerprint()
    return content if bounds is None else hash_bytes(content.encode(), repr(bounds).encode())


def source_names(spec: DatasetConfig) -> list[str]:
    """What the rows are said to be from, in reading order: equal sources in other places differ only here."""
    return _find(spec).names


def size_hint(spec: DatasetConfig) -> int:
    """Roughly the bytes of text in the data set."""
    return _find(spec).size()


def _ignore(number: int, error: DataError) -> None:
    pass


def _sliced(blocks: Iterator[Block], start: int, stop: int | None) -> Iterator[Block]:
    """The readable rows from `start` to before `stop`, counted over all files."""
    index = 0
    for block in blocks:
        chosen: list[Numbered] = []
        for numbered in decoded(block):
            if stop is not None and index >= stop:
                break
            if index >= start:
                chosen.append(numbered)
            index += not isinstance(numbered[1], DataError)
        if chosen:
            yield Block(block.file, "rows", chosen[0][0], chosen)
        if stop is not None and index >= stop:
            return


# ---- finding ----


def _find(spec: DatasetConfig) -> _Source:
    path = Path(spec.path).expanduser()
    if path.is_dir():
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            return _saved_source(path, spec)
        return _file_source(_folder_files(path, spec), spec)
    if path.exists():
        if spec.data_files:
            raise DataError(f"{spec.path}: is a file, so `data_files` has no meaning; expected a folder or hub id")
        if split_name(spec) != "train":
            raise DataError(f"{spec.path}: a single file has only the split 'train', not {spec.split!r}")
        return _file_source([_regular(path)], spec)
    if _may_be_hub_id(spec):
        return _hub_source(spec)
    raise DataError(f"{spec.path}: no such file or folder{_nearest_file(path)}")


def _may_be_hub_id(spec: DatasetConfig) -> bool:
    return bool(_HUB_ID.fullmatch(spec.path)) and not _suffix_of(Path(spec.path))


def _regular(file: Path) -> Path:
    if not file.exists():
        raise DataError(f"{file}: is a link to something that does not exist")
    if not file.is_file():
        raise DataError(f"{file}: is no regular file")
    return file


def _nearest_file(path: Path) -> str:
    """` (nearest: …)` when something in the same folder has almost that name."""
    folder = path.parent
    if not folder.is_dir():
        return f"; the folder {folder} does not exist either"
    close = nearest(path.name, [entry.name for entry in folder.iterdir()])
    return f"; did you mean {folder / close}?" if close else ""


def _suffix_of(path: Path) -> str:
    """The extension that tells the kind, without a compression suffix; empty when it tells none."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in KINDS else ""


def _kind_of(path: Path, spec: DatasetConfig) -> str:
    if spec.ds_type:
        return spec.ds_type
    suffix = _suffix_of(path)
    if not suffix:
        raise DataError(
            f"{path}: cannot tell the file format from its name; expected one of {', '.join(KINDS)} "
            "(text formats also with .gz or .zst), or set `ds_type`"
        )
    return KINDS[suffix]


def _folder_files(folder: Path, spec: DatasetConfig) -> list[Path]:
    """The files of a folder that belong to the data set, in a fixed order."""
    if spec.data_files:
        patterns = [spec.data_files] if isinstance(spec.data_files, str) else spec.data_files
        chosen: list[Path] = []
        for pattern in patterns:
            matches = sorted(folder.glob(pattern)) if any(sign in pattern for sign in "*?[") else [folder / pattern]
            if not matches or not matches[0].is_file():
                raise DataError(f"{folder}: no file {pattern!r} (`data_files`){_nearest_file(folder / pattern)}")
            chosen.extend(match for match in matches if match not in chosen)
        if split_name(spec) != "train":
            raise DataError(f"{folder}: files named by `data_files` have only the split 'train', not {spec.split!r}")
        return chosen
    visible = [
        file
        for file in sorted(folder.rglob("*"))
        if not file.is_dir() and not any(part[0] == "." for part in file.relative_to(folder).parts)
    ]
    files = [file for file in visible if _suffix_of(file)]
    for file in visible:
        if file.suffix.lower() in _UNREADABLE:
            raise DataError(
                f"{file}: {file.suffix} files cannot be read, and leaving it out might lose rows; convert it to one of "
                f"{', '.join(KINDS)}, or name the files to read in `data_files`"
            )
    if spec.ds_type:
        files = [file for file in files if KINDS[_suffix_of(file)] == spec.ds_type]
    if not files:
        raise DataError(f"{folder}: no {spec.ds_type or 'data'} files; expected some of {', '.join(KINDS)}")
    kinds = sorted({KINDS[_suffix_of(file)] for file in files})
    if len(kinds) > 1:
        raise DataError(f"{folder}: holds {' and '.join(kinds)} files; say which with `ds_type` or `data_files`")
    return [_regular(file) for file in _files_of_split(folder, files, spec)]


def _files_of_split(folder: Path, files: list[Path], spec: DatasetConfig) -> list[Path]:
    """The files of the wanted split, by their names: a folder's test files must never be trained on. A file whose name
    tells no split belongs to `train`."""
    wanted = split_name(spec)
    exact = [file for file in files if file.name == wanted or re.match(rf"{re.escape(wanted)}[-.]", file.name)]
    split_of = {file: _split_told_by(file.relative_to(folder)) for file in files}
    canonical = next((name for name, words in _SPLIT_WORDS.items() if wanted in words), wanted)
    chosen = [file for file in files if split_of[file] == canonical]
    if canonical != "train" and exact:
        chosen = exact
    if not chosen:
        splits = ", ".join(sorted(set(split_of.values())))
        raise DataError(f"{folder}: no split {wanted!r}; by their names its files belong to: {splits}")
    return chosen


def _split_told_by(path: Path) -> str:
    words = set(re.split(r"[^a-z0-9]+", path.as_posix().lower()))
    return next((name for name, aliases in _SPLIT_WORDS.items() if words & aliases), "train")


# ---- local files ----


def _file_source(files: list[Path], spec: DatasetConfig) -> _Source:
    kinds = [_kind_of(file, spec) for file in files]

    def blocks() -> Iterator[Block]:
        for file, kind in zip(files, kinds, strict=True):
            yield from READERS[kind](file)

    def count() -> int | None:
        counts = [count_rows(file, kind) for file, kind in zip(files, kinds, strict=True)]
        known = [number for number in counts if number is not None]
        return sum(known) if len(known) == len(counts) else None

    def fingerprint() -> str:
        # The same bytes are other rows, or none, under another compression.
        read_as = [f"{kind}{_compression(file)} {_content(file)}" for file, kind in zip(files, kinds, strict=True)]
        return hash_bytes(*map(str.encode, read_as))

    def size() -> int:
        sizes = (file.stat().st_size * (_COMPRESSION if _compression(file) else 1) for file in files)
        return sum(sizes)

    parts = [Part(str(file), _reader(file, kind)) for file, kind in zip(files, kinds, strict=True)]
    return _Source(blocks, count, fingerprint, [str(file) for file in files], size, parts)


def _compression(file: Path) -> str:
    return file.suffix.lower() if file.suffix.lower() in COMPRESSED else ""


def _reader(file: Path, kind: str) -> Callable[[int], Iterator[Block]]:
    return lambda first: islice(READERS[kind](file), first, None)


def _content(file: Path) -> str:
    try:
        return hash_file(file)
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from error


# ---- `datasets` ----


def _dataset_source(dataset: Any, label: str, fingerprint: Callable[[], str]) -> _Source:
    def blocks(first: int = 0) -> Iterator[Block]:
        start = first * BLOCK_ROWS
        chosen = dataset.select(range(start, len(dataset))) if start else dataset
        return row_blocks(label, _numbered(chosen, start))

    return _Source(
        blocks,
        lambda: len(dataset),
        fingerprint,
        [label],
        lambda: int(dataset.data.nbytes),
        [Part(label, blocks)],
    )


def _numbered(dataset: Any, start: int) -> Iterator[Numbered]:
    """The rows of a `datasets` object that begins after row `start` of a data set."""
    for number, data in enumerate(dataset.with_format(None), start + 1):
        yield number, without_padding(data), None


def _saved_source(folder: Path, spec: DatasetConfig) -> _Source:
    """A folder written by `save_to_disk`."""
    import datasets  # heavy, and needed by few

    wanted = split_name(spec)
    if spec.data_files:
        raise DataError(f"{folder}: is a saved `datasets` folder, so `data_files` has no meaning; use `split`")
    try:
        loaded = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DataError(f"{folder}: cannot be read as a saved `datasets` folder ({error})") from error
    if isinstance(loaded, datasets.DatasetDict):
        splits = [str(name) for name in loaded]
        if wanted not in splits:
            close = nearest(wanted, splits)
            hint = f"; did you mean {close!r}?" if close else ""
            raise DataError(f"{folder}: no split {wanted!r}; it has {', '.join(splits)}{hint}")
        loaded = loaded[wanted]
        folder = folder / wanted
    elif wanted not in ("train", str(loaded.split)):
        raise DataError(f"{folder}: one data set without splits; expected `split: train`, not {wanted!r}")
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return _dataset_source(loaded, str(folder), lambda: hash_bytes(*(_content(file).encode() for file in files)))


def _hub_source(spec: DatasetConfig) -> _Source:
    files = (spec.data_files,) if isinstance(spec.data_files, str) else tuple(spec.data_files or ())
    dataset = _hub_dataset(spec.path, spec.name, files, spec.revision, spec.split)
    return _dataset_source(dataset, spec.path, lambda: str(dataset._fingerprint))


def _hub_part(spec: DatasetConfig) -> Part:
    """A hub data set, or files read by one of the loaders of `datasets` (`path: json`), row by row."""
    files = (spec.data_files,) if isinstance(spec.data_files, str) else tuple(spec.data_files or ())
    dataset = _hub_dataset(spec.path, spec.name, files, spec.revision, spec.split, streaming=True)

    def blocks(first: int) -> Iterator[Block]:
        start = first * BLOCK_ROWS
        return row_blocks(spec.path, _numbered(dataset.skip(start) if start else dataset, start))

    return Part(spec.path, blocks)


@lru_cache(maxsize=8)
def _hub_dataset(
    path: str, name: str | None, files: tuple[str, ...], revision: str | None, split: str, streaming: bool = False
) -> Any:
    """A hub data set, memory-mapped; kept, so that reading, counting and fingerprinting ask the hub once.

    With `streaming` an iterable that downloads no more than is read.
    """
    import datasets  # heavy, and needed by few

    options: dict[str, Any] = {"data_files": list(files) or None, "revision": revision, "split": split}
    if streaming:
        options["streaming"] = True
    try:
        return datasets.load_dataset(path, name, **options)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        hint = _nearest_file(Path(path)) if Path(path).parent.is_dir() else ""
        problem = f"{type(error).__name__}: {error}"
        raise DataError(f"{path}: no local file or folder{hint}, and no readable hub data set ({problem})") from error
