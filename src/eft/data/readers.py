"""File formats: one reader per `ds_type`, each a generator of numbered rows that holds no file whole."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from eft.core.errors import DataError

OnBroken = Callable[[int, DataError], None]
"""Receives the number of an unreadable row and what is wrong with it."""
COMPRESSED = (".gz", ".zst")
"""May follow the extension of a text format."""
_MAGIC = {b"PAR1": "Parquet", b"ARRO": "Arrow", b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip"}

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_HALF_CHARACTER = r"has an escape \uD800 to \uDFFF that is half of a character, so its text is not valid Unicode"


@dataclass(frozen=True)
class Row:
    """One row as it stands in the source. `number` is the 1-based line (JSONL, text) or row number in `file`."""

    file: str
    number: int
    data: dict[str, Any]

    @property
    def where(self) -> str:
        """`data.jsonl row 17`, the start of every message about this row."""
        return f"{self.file} row {self.number}"


def _open_bytes(file: Path) -> IO[bytes]:
    suffix = file.suffix.lower()
    if suffix == ".gz":
        return gzip.open(file, "rb")  # type: ignore[return-value]  # reads bytes line by line like any file
    if suffix == ".zst":
        decompressor = zstandard.ZstdDecompressor()
        return io.BufferedReader(decompressor.stream_reader(file.open("rb"), read_across_frames=True, closefd=True))
    return file.open("rb")


def _lines(file: Path, expected: str) -> Iterator[tuple[int, bytes]]:
    """The lines of a possibly compressed file, numbered from 1, without a byte order mark."""
    try:
        with _open_bytes(file) as stream:
            for number, line in enumerate(stream, 1):
                if number == 1:
                    for magic, name in _MAGIC.items():
                        if line.startswith(magic):
                            raise DataError(f"{file}: is a {name} file by its content; expected {expected}")
                    line = line.removeprefix(b"\xef\xbb\xbf")
                yield number, line
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise DataError(f"{file}: cannot be read ({error}); expected {expected}") from error


def _report(number: int, error: DataError, on_broken: OnBroken | None) -> None:
    if on_broken is None:
        raise error
    on_broken(number, error)


def _read_json(file: Path, on_broken: OnBroken | None) -> Iterator[Row]:
    """JSON Lines, or one JSON array of objects."""
    expected = "one JSON object per line, or one array of objects"
    lines = _lines(file, expected)
    for number, line in lines:
        if not line.strip():
            continue
        if line.lstrip().startswith(b"["):
            yield from _read_json_array(file, number, b"".join([line, *(rest for _, rest in lines)]), on_broken)
            return
        try:
            data = json.loads(line.decode().rstrip())
        except UnicodeDecodeError as error:
            _report(number, DataError(f"{file} line {number}: is not UTF-8 text ({error.reason})"), on_broken)
            continue
        except json.JSONDecodeError as error:
            problem = f"{file} line {number}, column {error.colno}: broken JSON ({error.msg}); expected {expected}"
            _report(number, DataError(problem), on_broken)
            continue
        except (RecursionError, ValueError) as error:  # nested too deeply, a number of thousands of digits
            _report(number, DataError(f"{file} line {number}: cannot be read as JSON ({error})"), on_broken)
            continue
        if _SURROGATE.search(line) and _has_half_character(data):
            _report(number, DataError(f"{file} line {number}: {_HALF_CHARACTER}"), on_broken)
        elif isinstance(data, dict):
            yield Row(str(file), number, data)
        else:
            problem = f'{file} line {number}: a JSON {type(data).__name__}; expected an object, such as {{"text": …}}'
            _report(number, DataError(problem), on_broken)


def _has_half_character(data: Any) -> bool:
    """Whether some text cannot be written as UTF-8: no tokenizer takes it."""
    try:
        json.dumps(data, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def _read_json_array(file: Path, first_line: int, content: bytes, on_broken: OnBroken | None) -> Iterator[Row]:
    """The objects of an array, decoded one by one: only the text is held whole."""
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: is not UTF-8 text ({error.reason})") from error
    decoder, blank = json.JSONDecoder(), re.compile(r"\s*")
    has_escapes = _SURROGATE.search(content) is not None

    def skip(position: int) -> int:
        match = blank.match(text, position)
        assert match is not None
        return match.end()

    def fail(position: int, problem: str) -> DataError:
        line = first_line + text.count("\n", 0, position)
        return DataError(f"{file} line {line}: {problem}; expected an array of objects: [{{…}}, {{…}}]")

    position, number = skip(text.index("[") + 1), 0
    while text[position : position + 1] != "]":
        try:
            data, after = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise fail(error.pos, f"broken JSON ({error.msg})") from error
        except (RecursionError, ValueError) as error:
            raise fail(position, f"item {number + 1} cannot be read as JSON ({error})") from error
        number += 1
        if has_escapes and _has_half_character(data):
            _report(number, fail(position, f"item {number}: {_HALF_CHARACTER}"), on_broken)
        elif isinstance(data, dict):
            yield Row(str(file), number, data)
        else:
            _report(number, fail(position, f"item {number} is a JSON {type(data).__name__}"), on_broken)
        position = skip(after)
        if text[position : position + 1] == ",":
            position = skip(position + 1)
        elif text[position : position + 1] != "]":
            raise fail(position, f"broken JSON (no comma or ] after item {number})")
    if skip(position + 1) != len(text):
        raise fail(position + 1, "text after the end of the array")


def _read_csv(file: Path, on_broken: OnBroken | None) -> Iterator[Row]:
    """Comma-separated, first line the column names; every value is text. Rows are counted without the header."""
    csv.field_size_limit(sys.maxsize)  # the default refuses texts over 128 KiB
    expected = "comma-separated UTF-8 text whose first line names the columns"
    try:
        reader = csv.DictReader((line.decode() for _, line in _lines(file, expected)), strict=True)
        for number, data in enumerate(reader, 1):
            columns = len(reader.fieldnames or ())
            if None in data or None in data.values():
                problem = f"{file} row {number}: not the {columns} fields that the first line names"
                _report(number, DataError(f"{problem} ({', '.join(reader.fieldnames or ())})"), on_broken)
            else:
                yield Row(str(file), number, data)
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read as CSV ({error}); expected {expected}") from error


def _read_text(file: Path, on_broken: OnBroken | None) -> Iterator[Row]:
    """One row `{"text": line}` per line that is not blank."""
    for number, line in _lines(file, "UTF-8 text, one row per line"):
        if line.strip():
            try:
                yield Row(str(file), number, {"text": line.decode().rstrip("\r\n")})
            except UnicodeDecodeError as error:
                _report(number, DataError(f"{file} line {number}: is not UTF-8 text ({error.reason})"), on_broken)


def _open_parquet(file: Path) -> Any:
    try:
        return pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file}: cannot be read as Parquet ({error})") from error


def _read_parquet(file: Path, on_broken: OnBroken | None) -> Iterator[Row]:
    yield from _batch_rows(file, _open_parquet(file).iter_batches(batch_size=1024))


def _read_arrow(file: Path, on_broken: OnBroken | None) -> Iterator[Row]:
    """Both layouts of Arrow's IPC format; `datasets` writes the streaming one."""
    with pa.memory_map(str(file)) as memory:
        try:
            yield from _batch_rows(file, pa.ipc.open_stream(memory))
            return
        except pa.ArrowInvalid:
            memory.seek(0)
        try:
            table = pa.ipc.open_file(memory)
        except pa.ArrowException as error:
            raise DataError(f"{file}: cannot be read as Arrow ({error})") from error
        yield from _batch_rows(file, (table.get_batch(index) for index in range(table.num_record_batches)))


def _batch_rows(file: Path, batches: Any) -> Iterator[Row]:
    number = 0
    try:
        for batch in batches:
            for data in batch.to_pylist():
                number += 1
                yield Row(str(file), number, without_padding(data))
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read beyond row {number} ({error})") from error


def without_padding(row: dict[str, Any]) -> dict[str, Any]:
    """The row without the nulls that Arrow adds inside structs: rows with different keys share one struct type, so
    `{"city": "Rome"}` comes back as `{"city": "Rome", "date": None}`. Null columns stay."""

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: strip(item) for name, item in value.items() if item is not None}
        return [strip(item) for item in value] if isinstance(value, list) else value

    return {name: strip(value) for name, value in row.items()}


READERS: dict[str, Callable[[Path, OnBroken | None], Iterator[Row]]] = {
    "json": _read_json,
    "csv": _read_csv,
    "parquet": _read_parquet,
    "arrow": _read_arrow,
    "text": _read_text,
}


def count_rows(file: Path, kind: str) -> int | None:
    if kind == "parquet":
        return int(_open_parquet(file).metadata.num_rows)
    if kind not in ("json", "text") or file.suffix.lower() in COMPRESSED:
        return None
    lines, last = 0, b"\n"
    with file.open("rb") as stream:
        if kind == "json" and stream.read(1) == b"[":
            return None
        stream.seek(0)
        while chunk := stream.read(1 << 20):
            lines, last = lines + chunk.count(b"\n"), chunk[-1:]
    return lines + (last != b"\n")
