"""Where rows come from: local files, folders, saved `datasets` folders, the hub.

Everything streams: a JSONL, CSV or Parquet file is never held in memory whole (a JSON array is held as text). Every row
knows its file and number, so that every later message can name it.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa

from eft.config.data import DatasetConfig
from eft.core.errors import DataError, nearest
from eft.core.hashing import hash_bytes, hash_file
from eft.data.readers import COMPRESSED, READERS, OnBroken, Row, count_rows, without_padding

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
_SPLIT_WORDS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing", "eval", "evaluation"},
}
_SPLIT = re.compile(r"(?P<name>[\w.+-]+)(?:\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class _Source:
    """A source that was found: how to read, count and fingerprint it, before any slice of the split."""

    rows: Callable[[OnBroken | None], Iterator[Row]]
    count: Callable[[], int | None]
    fingerprint: Callable[[], str]


def iter_rows(spec: DatasetConfig, on_broken: OnBroken | None = None) -> Iterator[Row]:
    """The rows of a data set, in file order.

    Args:
        spec: the entry of `datasets` or `test_datasets`.
        on_broken: called for each line that cannot be read as a row, which is then left out; None: raise instead.

    Raises:
        DataError: missing or unreadable file, unknown extension, missing split, unreadable row, no rows at all.
    """
    source = _find(spec)
    start, stop = _slice_bounds(spec, lambda: sum(1 for _ in source.rows(_ignore)))
    empty = True
    for row in itertools.islice(source.rows(on_broken), start, stop):
        empty = False
        yield row
    if empty:
        raise DataError(f"{spec.path}: no rows (split {spec.split!r}); expected at least one")


def count_hint(spec: DatasetConfig) -> int | None:
    """The number of rows where that is cheap to know, for a progress bar; None where it is not. Raises DataError."""
    count = _find(spec).count()
    if count is None or _slice_of(spec) is None:
        return count
    start, stop = _slice_bounds(spec, lambda: count)
    return len(range(count)[start:stop])


def source_fingerprint(spec: DatasetConfig) -> str:
    """A string that changes when the content of the source changes: SHA-256 of the local files' bytes in reading order,
    or the fingerprint that `datasets` gives a hub data set. Raises DataError as `iter_rows` does."""
    return _find(spec).fingerprint()


def _ignore(number: int, error: DataError) -> None:
    pass


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
        if _split_name(spec) != "train":
            raise DataError(f"{spec.path}: a single file has only the split 'train', not {spec.split!r}")
        return _file_source([path], spec)
    if _HUB_ID.fullmatch(spec.path) and not _suffix_of(path):
        return _hub_source(spec)
    raise DataError(f"{spec.path}: no such file or folder{_nearest_file(path)}")


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
        if _split_name(spec) != "train":
            raise DataError(f"{folder}: files named by `data_files` have only the split 'train', not {spec.split!r}")
        return chosen
    files = [
        file
        for file in sorted(folder.rglob("*"))
        if file.is_file() and _suffix_of(file) and not any(part[0] == "." for part in file.relative_to(folder).parts)
    ]
    if spec.ds_type:
        files = [file for file in files if KINDS[_suffix_of(file)] == spec.ds_type]
    if not files:
        raise DataError(f"{folder}: no {spec.ds_type or 'data'} files; expected some of {', '.join(KINDS)}")
    kinds = sorted({KINDS[_suffix_of(file)] for file in files})
    if len(kinds) > 1:
        raise DataError(f"{folder}: holds {' and '.join(kinds)} files; say which with `ds_type` or `data_files`")
    return _files_of_split(folder, files, spec)


def _files_of_split(folder: Path, files: list[Path], spec: DatasetConfig) -> list[Path]:
    """The files of the wanted split, by their names: a folder's test files must never be trained on. A file whose name
    tells no split belongs to `train`."""
    wanted = _split_name(spec)
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


# ---- splits ----


def _slice_of(spec: DatasetConfig) -> tuple[str, str] | None:
    """The `[start:stop]` of a local split, as written; None when there is none."""
    match = _SPLIT.fullmatch(spec.split)
    if match is None:
        raise DataError(f"{spec.path}: split {spec.split!r} is not understood; expected 'train' or 'train[10:200]'")
    start, stop = match["start"] or "", match["stop"] or ""
    return (start, stop) if "[" in spec.split else None


def _split_name(spec: DatasetConfig) -> str:
    _slice_of(spec)
    return spec.split.split("[")[0]


def _is_hub(spec: DatasetConfig) -> bool:
    return not Path(spec.path).expanduser().exists()


def _slice_bounds(spec: DatasetConfig, count: Callable[[], int]) -> tuple[int, int | None]:
    """Start and stop of the rows wanted; `count` is asked only where a share or a negative bound needs it."""
    bounds = None if _is_hub(spec) else _slice_of(spec)  # `datasets` slices hub splits itself
    if bounds is None:
        return 0, None
    if not any("%" in bound or bound.startswith("-") for bound in bounds):
        return int(bounds[0] or 0), int(bounds[1]) if bounds[1] else None
    total = count()
    numbers = [
        round(total * int(bound[:-1]) / 100) if bound.endswith("%") else int(bound) if bound else None
        for bound in bounds
    ]
    start, stop, _ = slice(*numbers).indices(total)
    return start, stop


# ---- local files ----


def _file_source(files: list[Path], spec: DatasetConfig) -> _Source:
    kinds = [_kind_of(file, spec) for file in files]

    def rows(on_broken: OnBroken | None) -> Iterator[Row]:
        for file, kind in zip(files, kinds, strict=True):
            yield from READERS[kind](file, on_broken)

    def count() -> int | None:
        counts = [count_rows(file, kind) for file, kind in zip(files, kinds, strict=True)]
        known = [number for number in counts if number is not None]
        return sum(known) if len(known) == len(counts) else None

    def fingerprint() -> str:
        return hash_bytes(*(f"{kind} {hash_file(file)}".encode() for file, kind in zip(files, kinds, strict=True)))

    return _Source(rows, count, fingerprint)


# ---- `datasets` ----


def _dataset_source(dataset: Any, label: str, fingerprint: Callable[[], str]) -> _Source:
    def rows(on_broken: OnBroken | None) -> Iterator[Row]:
        for number, data in enumerate(dataset.with_format(None), 1):
            yield Row(label, number, without_padding(data))

    return _Source(rows, lambda: len(dataset), fingerprint)


def _saved_source(folder: Path, spec: DatasetConfig) -> _Source:
    """A folder written by `save_to_disk`."""
    import datasets  # heavy, and needed by few

    wanted = _split_name(spec)
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
    return _dataset_source(loaded, str(folder), lambda: hash_bytes(*(hash_file(file).encode() for file in files)))


def _hub_source(spec: DatasetConfig) -> _Source:
    files = (spec.data_files,) if isinstance(spec.data_files, str) else tuple(spec.data_files or ())
    dataset = _hub_dataset(spec.path, spec.name, files, spec.revision, spec.split)
    return _dataset_source(dataset, spec.path, lambda: str(dataset._fingerprint))


@lru_cache(maxsize=8)
def _hub_dataset(path: str, name: str | None, files: tuple[str, ...], revision: str | None, split: str) -> Any:
    """A hub data set, memory-mapped; kept, so that reading, counting and fingerprinting ask the hub once."""
    import datasets  # heavy, and needed by few

    try:
        return datasets.load_dataset(path, name, data_files=list(files) or None, revision=revision, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        hint = _nearest_file(Path(path)) if Path(path).parent.is_dir() else ""
        problem = f"{type(error).__name__}: {error}"
        raise DataError(f"{path}: no local file or folder{hint}, and no readable hub data set ({problem})") from error
