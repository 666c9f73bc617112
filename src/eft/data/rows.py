"""Blocks of a file → rows, each with its number."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa

from eft.core.errors import DataError
from eft.data.json_rows import DECODER, KeyTwiceError, json_problem, quick_row
from eft.data.readers import JSON_EXPECTED, Block, Numbered, Row

OnBroken = Callable[[int, DataError], None]
"""Receives the number of an unreadable row and what is wrong with it."""


def rows_of(block: Block, on_broken: OnBroken | None) -> Iterator[Row]:
    """The rows of a block, in order.

    Unreadable ones go to `on_broken` and are left out; None: the first one raises DataError.
    """
    for number, data, raw in decoded(block):
        if not isinstance(data, DataError):
            yield Row(block.file, number, data, raw)
        elif on_broken is None:
            raise data
        else:
            on_broken(number, data)


def decoded(block: Block) -> Iterator[Numbered]:
    """The rows of a block, the unreadable ones too."""
    return _DECODERS[block.kind](block)


def _json_rows(block: Block) -> Iterator[Numbered]:
    for number, line in enumerate(block.data.split(b"\n"), block.first):
        if line and not line.isspace():
            data = quick_row(line)
            yield number, examined_row(f"{block.file} line {number}", line) if data is None else data, line


def examined_row(where: str, line: bytes) -> Any:
    """The row, or what is wrong with it."""
    try:
        text = line.decode().rstrip()
        data = DECODER.decode(text)
    except UnicodeDecodeError as error:
        return DataError(f"{where}: is not UTF-8 text ({error.reason})")
    except json.JSONDecodeError as error:
        return DataError(f"{where}, column {error.colno}: broken JSON ({error.msg}); expected {JSON_EXPECTED}")
    except KeyTwiceError as error:
        return DataError(f"{where}: {error}")
    except (RecursionError, ValueError) as error:  # nested too deeply, a number of thousands of digits
        return DataError(f"{where}: cannot be read as JSON ({error})")
    problem = json_problem(data, text)
    if problem is None:
        return data
    expected = "" if isinstance(data, dict) else '; expected an object, such as {"text": …}'
    return DataError(f"{where}: {problem}{expected}")


def _text_rows(block: Block) -> Iterator[Numbered]:
    for number, line in enumerate(block.data.split(b"\n"), block.first):
        if line and not line.isspace():
            try:
                data: Any = {"text": line.decode().rstrip("\r")}
            except UnicodeDecodeError as error:
                data = DataError(f"{block.file} line {number}: is not UTF-8 text ({error.reason})")
            yield number, data, line


def _arrow_rows(block: Block) -> Iterator[Numbered]:
    number = block.first
    try:
        with pa.ipc.open_stream(block.data) as stream:
            for batch in stream:
                for data in batch.to_pylist():
                    yield number, without_padding(data), None
                    number += 1
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{block.file}: cannot be read beyond row {number - 1} ({error})") from error


def _decoded_rows(block: Block) -> Iterator[Numbered]:
    yield from block.data


_DECODERS: dict[str, Callable[[Block], Iterator[Numbered]]] = {
    "json": _json_rows,
    "text": _text_rows,
    "arrow": _arrow_rows,
    "rows": _decoded_rows,
}


def without_padding(row: dict[str, Any]) -> dict[str, Any]:
    """The row without the nulls that Arrow adds inside structs: rows with different keys share one struct type, so
    `{"city": "Rome"}` comes back as `{"city": "Rome", "date": None}`. Null columns stay."""

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: strip(item) for name, item in value.items() if item is not None}
        return [strip(item) for item in value] if isinstance(value, list) else value

    return {name: strip(value) for name, value in row.items()}
