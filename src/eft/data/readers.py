"""File formats: one reader per `ds_type`, each a generator of blocks of rows that holds no file whole.

A block is cut from its file without looking into the rows (`rows.rows_of` does that, in any process), and always at the
same places: what is prepared from blocks does not depend on how many processes there are.
"""

from __future__ import annotations

import codecs
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
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from eft.core.errors import DataError
from eft.data.json_rows import DECODER, KeyTwiceError, json_problem

COMPRESSED = (".gz", ".zst")
"""May follow the extension of a text format."""
_MAGIC = {b"PAR1": "Parquet", b"ARRO": "Arrow", b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip"}
_BOM = b"\xef\xbb\xbf"
_UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")

BLOCK_BYTES = 1 << 18
BLOCK_ROWS = 512
_COMPRESSED_BYTES = 1 << 14
_LONGEST_LINE = 1 << 30
_LONGEST_ITEM = 1 << 28
_BLANK = re.compile(r"[ \t\r\n]*")

JSON_EXPECTED = "one JSON object per line, or one array of objects"


@dataclass(slots=True)
class Row:
    """One row as it stands in the source. `number` is the 1-based line (JSONL, text) or row number in `file`."""

    file: str
    number: int
    data: dict[str, Any]
    raw: bytes | None = None
    """The line it stands in, where it is one."""

    @property
    def where(self) -> str:
        """`data.jsonl row 17`, the start of every message about this row."""
        return f"{self.file} row {self.number}"


@dataclass(frozen=True)
class Block:
    """Some consecutive rows of one file, undecoded where that can be done later."""

    file: str
    kind: Literal["json", "text", "rows", "arrow"]
    first: int
    """Number of the first line or row in the file, from 1."""
    data: Any
    """Whole lines as bytes (`json`, `text`), an Arrow stream of one batch as bytes (`arrow`), or a list of `Numbered`
    (`rows`)."""


Numbered = tuple[int, dict[str, Any] | DataError, bytes | None]
"""A row's number, the row or what is wrong with it, and the line it stands in, where it is one."""


def _bytes_of(file: Path) -> Iterator[bytes]:
    """The bytes of a possibly compressed file in pieces, the first one of some length."""
    suffix = file.suffix.lower()
    if suffix == ".zst":
        yield from _evenly(_zstd_bytes(file))
        return
    with gzip.open(file, "rb") if suffix == ".gz" else file.open("rb") as stream:
        chunk = stream.read(max(BLOCK_BYTES, 1 << 10))
        while chunk:
            yield chunk
            chunk = stream.read(BLOCK_BYTES)


def _zstd_bytes(file: Path) -> Iterator[bytes]:
    """Pieces of any length; the library's own reader ends in silence where a file was cut short."""
    with file.open("rb") as stream:
        frame, started = zstandard.ZstdDecompressor().decompressobj(), False
        while chunk := stream.read(_COMPRESSED_BYTES):
            while chunk:
                if data := frame.decompress(chunk):
                    yield data
                started, chunk = True, frame.unused_data if frame.eof else b""
                if frame.eof:
                    frame, started = zstandard.ZstdDecompressor().decompressobj(), False
        if started:
            raise EOFError("the compressed data end in the middle")


def _evenly(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """The same bytes in pieces of BLOCK_BYTES, and one of what is left."""
    pending = bytearray()
    for piece in pieces:
        pending += piece
        while len(pending) >= BLOCK_BYTES:
            yield bytes(pending[:BLOCK_BYTES])
            del pending[:BLOCK_BYTES]
    if pending:
        yield bytes(pending)


def _is_utf16(chunk: bytes) -> bool:
    """By its byte order mark; or every other byte at the start is zero, as in a script of 256 letters."""
    halves = chunk[:64:2].count(0), chunk[1:64:2].count(0)
    return chunk.startswith(_UTF16_BOMS) or (max(halves) > len(chunk[:64]) // 3 and min(halves) == 0)


def _chunks(file: Path, expected: str) -> Iterator[bytes]:
    """The bytes of a possibly compressed text file in pieces, without a byte order mark."""
    try:
        for number, chunk in enumerate(_bytes_of(file)):
            if number == 0:
                for magic, name in _MAGIC.items():
                    if chunk.startswith(magic):
                        raise DataError(f"{file}: is a {name} file by its content; expected {expected}")
                _refuse_pointer(file, chunk)
                if _is_utf16(chunk):
                    convert = "`iconv -f UTF-16 -t UTF-8` converts it"
                    raise DataError(f"{file}: is UTF-16 text, which is not read; expected UTF-8 ({convert})")
                chunk = chunk.removeprefix(_BOM)
            yield chunk
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise DataError(f"{file}: cannot be read ({error}); expected {expected}") from error


def _refuse_pointer(file: Path, start: bytes) -> None:
    """A clone without Git LFS has small texts in the place of large files."""
    if start.startswith(b"version https://git-lfs"):
        raise DataError(f"{file}: is a pointer of Git LFS, not the data; expected its content (`git lfs pull` gets it)")


def _line_blocks(file: Path, kind: Literal["json", "text"], chunks: Iterator[bytes]) -> Iterator[Block]:
    """Blocks of whole lines, of BLOCK_BYTES and the rest of the last line."""
    pending: list[bytes] = []
    size, first = 0, 1
    for chunk in chunks:
        cut = chunk.rfind(b"\n") + 1
        if not cut:
            pending.append(chunk)
            size += len(chunk)
            if size > _LONGEST_LINE:
                raise DataError(
                    f"{file} line {first}: is longer than {_LONGEST_LINE >> 20} MiB; expected one row a line"
                )
            continue
        data = b"".join([*pending, chunk[:cut]])
        yield Block(str(file), kind, first, data)
        first += data.count(b"\n")
        pending, size = [chunk[cut:]], len(chunk) - cut
    if rest := b"".join(pending):
        yield Block(str(file), kind, first, rest)


def _read_json(file: Path) -> Iterator[Block]:
    """JSON Lines, or one JSON array of objects."""
    chunks = _chunks(file, JSON_EXPECTED)
    start: list[bytes] = []
    for chunk in chunks:
        start.append(chunk)
        if chunk.strip():
            break
    together = _after(start, chunks)
    if start and start[-1].lstrip().startswith(b"["):
        return row_blocks(str(file), _ArrayReader(file, together).items())
    return _line_blocks(file, "json", together)


def _after(first: list[bytes], others: Iterator[bytes]) -> Iterator[bytes]:
    yield from first
    yield from others


class _ArrayReader:
    """The objects of a JSON array, decoded one by one from a window of the text."""

    def __init__(self, file: Path, chunks: Iterator[bytes]):
        self._file = file
        self._chunks = chunks
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._window, self._at = "", 0
        self._lines_before = 0
        """Line breaks before the window."""
        self._is_whole = False

    def items(self) -> Iterator[Numbered]:
        """The items of the array. Raises DataError where it is broken."""
        self._skip_blank()
        self._at += 1  # the bracket
        number = 0
        while self._next_sign() != "]":
            number += 1
            yield number, self._item(number), None
            sign = self._next_sign()
            if sign == ",":
                self._at += 1
            elif sign != "]":
                raise self._wrong(self._at, f"broken JSON (no comma or ] after item {number})")
        self._at += 1
        if self._next_sign():
            raise self._wrong(self._at, "text after the end of the array")

    def _item(self, number: int) -> Any:
        decoder, twice = DECODER, None
        while True:
            try:
                value, stop = decoder.raw_decode(self._window, self._at)
            except KeyTwiceError as error:
                decoder, twice = json.JSONDecoder(), error  # which only has to find the end of the item
            except json.JSONDecodeError as error:
                if not self._may_go_on(error) or not self._read():
                    raise self._wrong(error.pos, f"broken JSON ({error.msg})") from error
            except (RecursionError, ValueError) as error:
                raise self._wrong(self._at, f"item {number} cannot be read as JSON ({error})") from error
            else:
                # A number at the very end of the window may go on; what follows an object is needed anyway.
                if stop < len(self._window) or not self._read():
                    text, at, self._at = self._window[self._at : stop], self._at, stop
                    problem = str(twice) if twice is not None else json_problem(value, text)
                    return value if problem is None else self._wrong(at, f"item {number} {problem}")

    def _may_go_on(self, error: json.JSONDecodeError) -> bool:
        """Whether the error may only mean that the window ends within the item."""
        if len(self._window) - self._at > _LONGEST_ITEM:
            return False
        return error.msg.startswith("Unterminated string") or error.pos >= len(self._window) - 12

    def _next_sign(self) -> str:
        self._skip_blank()
        return self._window[self._at : self._at + 1]

    def _skip_blank(self) -> None:
        while True:
            match = _BLANK.match(self._window, self._at)
            assert match is not None
            self._at = match.end()
            if self._at < len(self._window) or not self._read():
                return

    def _read(self) -> bool:
        """Make the window longer, at least by half; False at the end of the file."""
        if self._is_whole:
            return False
        self._lines_before += self._window.count("\n", 0, self._at)
        kept = self._window[self._at :]
        parts, wanted = [kept], len(kept) // 2
        while wanted >= 0 and not self._is_whole:
            chunk = next(self._chunks, b"")
            self._is_whole = not chunk
            try:
                parts.append(self._decoder.decode(chunk, final=self._is_whole))
            except UnicodeDecodeError as error:
                raise DataError(f"{self._file}: is not UTF-8 text ({error.reason})") from error
            wanted -= len(chunk) + 1
        self._window, self._at = "".join(parts), 0
        return True

    def _wrong(self, position: int, problem: str) -> DataError:
        line = 1 + self._lines_before + self._window.count("\n", 0, position)
        return DataError(f"{self._file} line {line}: {problem}; expected an array of objects: [{{…}}, {{…}}]")


def row_blocks(file: str, rows: Iterator[Numbered]) -> Iterator[Block]:
    """Blocks of rows that had to be decoded in reading. Rows before an error come before it."""
    numbered: list[Numbered] = []
    failure: DataError | None = None
    while failure is None:
        try:
            for row in rows:
                numbered.append(row)
                if len(numbered) == BLOCK_ROWS:
                    break
        except DataError as error:
            failure = error
        if not numbered:
            break
        yield Block(file, "rows", numbered[0][0], numbered)
        numbered = []
    if failure is not None:
        raise failure


def _read_csv(file: Path) -> Iterator[Block]:
    """Comma-separated, first line the column names; every value is text. Rows are counted without the header."""
    return row_blocks(str(file), _csv_rows(file))


def _csv_rows(file: Path) -> Iterator[Numbered]:
    csv.field_size_limit(sys.maxsize)  # the default refuses texts over 128 KiB
    expected = "comma-separated UTF-8 text whose first line names the columns"
    lines = 0

    def decoded() -> Iterator[str]:
        nonlocal lines
        for block in _line_blocks(file, "text", _chunks(file, expected)):
            for line in io.BytesIO(block.data):  # unlike `splitlines` it breaks at \n only
                lines += 1
                yield line.decode()

    try:
        reader = csv.DictReader(decoded(), strict=True)
        names = list(reader.fieldnames or ())
        twice = next((name for name in names if names.count(name) > 1), None)
        if len(names) == 1 and (other := next((sign for sign in ";\t|" if sign in names[0]), None)):
            problem = f"{file} line 1: names one column, {names[0][:80]!r}"
            raise DataError(f"{problem}; expected commas between fields, not {other!r}")
        if twice is not None:
            raise DataError(f"{file} line 1: the column {twice!r} is named twice; expected different names")
        for number, data in enumerate(reader, 1):
            if None in data or None in data.values():
                problem = f"{file} row {number}: not the {len(names)} fields that the first line names"
                yield number, DataError(f"{problem} ({', '.join(names)})"), None
            else:
                yield number, data, None
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{file} line {lines}: cannot be read as CSV ({error}); expected {expected}") from error


def _read_text(file: Path) -> Iterator[Block]:
    """One row `{"text": line}` per line that is not blank."""
    return _line_blocks(file, "text", _chunks(file, "UTF-8 text, one row per line"))


def _open_parquet(file: Path) -> Any:
    try:
        with file.open("rb") as start:
            _refuse_pointer(file, start.read(64))
        return pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file}: cannot be read as Parquet ({error})") from error


def _read_parquet(file: Path) -> Iterator[Block]:
    return _batch_blocks(file, _open_parquet(file).iter_batches(batch_size=BLOCK_ROWS))


def _read_arrow(file: Path) -> Iterator[Block]:
    """Both layouts of Arrow's IPC format; `datasets` writes the streaming one."""
    try:
        memory = pa.memory_map(str(file))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file}: cannot be read as Arrow ({error})") from error
    with memory:
        try:
            stream = pa.ipc.open_stream(memory)
        except (pa.ArrowException, OSError):
            memory.seek(0)
            stream = None
        if stream is not None:
            yield from _batch_blocks(file, stream)
            return
        try:
            table = pa.ipc.open_file(memory)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{file}: cannot be read as Arrow ({error})") from error
        yield from _batch_blocks(file, (table.get_batch(index) for index in range(table.num_record_batches)))


def _batch_blocks(file: Path, batches: Any) -> Iterator[Block]:
    number = 0
    try:
        for batch in batches:
            batch.validate(full=True)  # offsets of a damaged file would be followed out of the memory
            for start in range(0, len(batch), BLOCK_ROWS):
                part = batch.slice(start, BLOCK_ROWS)
                yield Block(str(file), "arrow", number + 1, batch_to_bytes(part))
                number += len(part)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file}: cannot be read beyond row {number} ({error})") from error


def batch_to_bytes(batch: Any) -> bytes:
    """A record batch as an Arrow stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return bytes(sink.getvalue().to_pybytes())


READERS: dict[str, Callable[[Path], Iterator[Block]]] = {
    "json": _read_json,
    "csv": _read_csv,
    "parquet": _read_parquet,
    "arrow": _read_arrow,
    "text": _read_text,
}


def count_rows(file: Path, kind: str) -> int | None:
    """The number of rows where that is cheap to know; None where it is not."""
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
