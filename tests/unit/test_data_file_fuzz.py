"""Hundreds of damaged files of every kind through the whole preparation: rows that are accounted for one by one, or one
message that names the file; never another exception, a row that is lost, or a store that is not whole."""

from __future__ import annotations

import gzip
import io
import json
import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from eft.core.errors import DataError
from eft.data import readers
from eft.data.prepare import prepare_datasets
from eft.data.store import open_store
from tests.unit.test_data_prepare import byte_tokenizer, config

TOKENIZER = byte_tokenizer()
MUTANTS = 50
LONGEST_MESSAGE = 1500

ROWS: list[dict[str, Any]] = [
    {
        "text": f"Zeile {number}: naïve “text”, 中文 😀\n" * (1 + number % 3),
        "n": number,
        "tags": [{"name": "a", "weight": 0.5}, {"name": "b", "weight": None}][: number % 3],
    }
    for number in range(40)
]


def jsonl() -> bytes:
    return "".join(json.dumps(row, ensure_ascii=number % 2 == 0) + "\n" for number, row in enumerate(ROWS)).encode()


def csv_text() -> bytes:
    lines = ["text,n", *(f'"{row["text"]}",{row["n"]}' for row in ROWS)]
    return "\r\n".join(lines).encode() + b"\r\n"


def arrow(new: Callable[[Any, pa.Schema], Any]) -> bytes:
    table, sink = pa.Table.from_pylist(ROWS), io.BytesIO()
    with new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=16)
    return sink.getvalue()


def parquet() -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), sink, row_group_size=16)
    return sink.getvalue()


FILES: dict[str, Callable[[], bytes]] = {
    "lines.jsonl": jsonl,
    "array.json": lambda: json.dumps(ROWS, indent=1, ensure_ascii=False).encode(),
    "table.csv": csv_text,
    "plain.txt": lambda: "".join(row["text"] for row in ROWS).encode(),
    "table.parquet": parquet,
    "file.arrow": lambda: arrow(pa.ipc.new_file),
    "stream.arrow": lambda: arrow(pa.ipc.new_stream),
    "lines.jsonl.gz": lambda: gzip.compress(jsonl(), mtime=0),
    "lines.jsonl.zst": lambda: zstandard.compress(jsonl()),
}

PIECES = [
    b"\x00", b"\x00" * 300, b"\xef\xbb\xbf", b"\xff\xfe", b"\xc3", b"\r", b"\r\n", b"\n", b"\n\n\n", b'"', b"'", b"\\",
    b"\\ud800", b"{", b"}", b"[", b"]", b",", b"[" * 3000, b'{"a":' * 3000, b"NaN", b"1" * 5000, b"1e400",
    b'"text": 3, ', b'"text": "x", ', b"null\n", b"7\n", b'"word"\n', b"[1, 2]\n", b'{"other": 1}\n', b"\x1f\x8b",
    b"PAR1", b"PK\x03\x04", b"\xed\xa0\x80", b" " * 4000, b"x" * 70_000,
]  # fmt: skip


def damaged(content: bytes, chance: random.Random) -> bytes:
    """The bytes with one to three faults."""
    for _ in range(chance.choice([1, 1, 2, 3])):
        first, last = sorted(chance.randrange(len(content) + 1) for _ in range(2))
        fault = chance.randrange(8)
        if fault == 0:
            content = content[:first]
        elif fault == 1:
            content = content[:first] + content[min(last, first + 200) :]
        elif fault == 2:
            content = content[:last] + content[first:]
        elif fault == 3:
            changed = bytearray(content)
            for _ in range(min(len(changed), chance.choice([1, 1, 5, 30]))):
                changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
            content = bytes(changed)
        elif fault == 4:
            content = content[:first] + bytes(min(last - first, 500)) + content[min(last, first + 500) :]
        elif fault == 5:
            content = chance.choice([content.replace(b"\n", b"\r\n"), content.replace(b"\n", b"\r"), b""])
        else:
            content = content[:first] + chance.choice(PIECES) + content[first:]
    return content


def lines_in(name: str, content: bytes) -> int | None:
    """Rows that a readable file of lines has; None for other kinds."""
    if name.endswith((".jsonl", ".txt")) and not content.lstrip(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        return sum(not line.isspace() for line in content.removeprefix(b"\xef\xbb\xbf").split(b"\n") if line)
    return None


WHERE = re.compile(
    r" (line|row|item) \d+|cannot be read|no rows|is a \w+ file|none of its \d+ rows|is not UTF-8 text"
    r"|is UTF-16 text"  # a byte order mark is among the pieces
)


def require_message(error: DataError, path: Path) -> None:
    message = str(error)
    assert message.startswith(str(path)), message[:300]
    assert WHERE.search(message), message[:300]
    assert len(message) <= LONGEST_MESSAGE, message


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("malformed_rows", ["drop", "raise"])
def test_a_damaged_file_gives_rows_that_are_accounted_for_or_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, malformed_rows: str
) -> None:
    monkeypatch.setattr(readers, "BLOCK_BYTES", 1 << 10)
    monkeypatch.setattr(readers, "BLOCK_ROWS", 8)
    chance, outcomes = random.Random(f"{name} {malformed_rows}"), Counter[str]()
    whole, path, location = FILES[name](), tmp_path / name, tmp_path / "prepared"
    keys = {"malformed_rows": malformed_rows, "sequence_len": 4096, "dataset_prepared_path": str(location)}
    for number in range(MUTANTS):
        content = damaged(whole, chance) if number else whole
        path.write_bytes(content)
        try:
            prepared = prepare_datasets(config(str(path), type="completion", **keys), TOKENIZER)
        except DataError as error:
            require_message(error, path)
            outcomes["message"] += 1
            assert not list(location.glob(".partial-*"))
            continue
        (account,) = prepared.ledger.sources
        account.check()
        expected = lines_in(name, content) if number else None
        assert expected is None or account.rows == expected
        outcomes["dropped rows" if account.dropped else "rows"] += 1
    for folder in location.glob("[!.]*"):
        assert len(open_store(folder)) > 0
    assert outcomes["rows"] > 0
    assert outcomes["message"] > 2, outcomes
    if malformed_rows == "raise":
        assert not outcomes["dropped rows"]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_shards_that_do_not_agree_name_the_shard(tmp_path: Path, kind: str) -> None:
    """Columns of other types, missing and further ones: each shard by what it has."""
    shards: list[list[dict[str, Any]]] = [
        [{"text": "a", "n": 1}, {"text": "b", "n": 2}],
        [{"text": "c", "n": "one", "more": [1.5]}],
        [{"text": 7}, {"text": 8}],
        [{"other": "d"}],
        [{"text": ["e"]}],
    ]
    data = tmp_path / "data"
    data.mkdir()
    for number, rows in enumerate(shards):
        path = data / f"{number}.{kind}"
        if kind == "jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            pq.write_table(pa.Table.from_pylist(rows), path)
    keys = {"dataset_prepared_path": str(tmp_path / "prepared")}
    with pytest.raises(DataError, match=rf"2\.{kind} row 1: .*text"):
        prepare_datasets(config(str(data), type="completion", **keys), TOKENIZER)
    prepared = prepare_datasets(config(str(data), type="completion", malformed_rows="drop", **keys), TOKENIZER)
    (account,) = prepared.ledger.sources
    assert (account.rows, len(prepared.train), account.dropped["malformed"].rows) == (7, 3, 4)
    places = [message.split(":")[0] for message in account.dropped["malformed"].first_rows]
    assert [Path(place).name for place in places] == [
        f"2.{kind} row 1",
        f"2.{kind} row 2",
        f"3.{kind} row 1",
        f"4.{kind} row 1",
    ]


def test_a_huge_text_is_one_row(tmp_path: Path) -> None:
    path = tmp_path / "huge.jsonl"
    path.write_text(json.dumps({"text": "word " * 60_000}) + "\n" + json.dumps({"text": "short"}) + "\n")
    keys = {"dataset_prepared_path": str(tmp_path / "prepared"), "sequence_len": 1 << 17}
    prepared = prepare_datasets(config(str(path), type="completion", **keys), TOKENIZER)
    assert prepared.train.lengths.sum() == 300_000 + 5 + 2
    assert prepared.ledger.sources[0].further_samples == 2
