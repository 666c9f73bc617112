"""Every kind of source gives the same rows; every broken one gives one message naming file, line and expectation."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from eft.config.data import DatasetConfig
from eft.core.errors import DataError
from eft.data import readers, sources
from eft.data.json_rows import quick_row
from eft.data.rows import examined_row
from eft.data.rows import rows_of as rows_of_block
from eft.data.sources import count_hint, iter_blocks, iter_rows, source_fingerprint

ROWS: list[dict[str, Any]] = [{"text": "one, two\nthree"}, {"text": "zwölf 😀"}, {"text": 'a "quoted" one'}]


def jsonl(rows: list[dict[str, Any]] = ROWS) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write_csv(path: Path) -> None:
    path.write_text('text\n"one, two\nthree"\nzwölf 😀\n"a ""quoted"" one"\n', encoding="utf-8")


def write_arrow(path: Path, new: Callable[..., Any]) -> None:
    table = pa.Table.from_pylist(ROWS)
    with path.open("wb") as file, new(file, table.schema) as writer:
        writer.write_table(table)


WRITERS: dict[str, Callable[[Path], Any]] = {
    "data.jsonl": lambda path: path.write_bytes(jsonl()),
    "data.json": lambda path: path.write_text(json.dumps(ROWS, indent=1)),
    "compact.json": lambda path: path.write_text(json.dumps(ROWS)),
    "lines.json": lambda path: path.write_bytes(b"\xef\xbb\xbf" + jsonl() + b"\n"),
    "data.jsonl.gz": lambda path: path.write_bytes(gzip.compress(jsonl())),
    "two frames.jsonl.zst": lambda path: path.write_bytes(
        zstandard.compress(jsonl()[:40]) + zstandard.compress(jsonl()[40:])
    ),
    "data.jsonl.zst": lambda path: path.write_bytes(zstandard.compress(jsonl())),
    "data.csv": write_csv,
    "data.parquet": lambda path: pq.write_table(pa.Table.from_pylist(ROWS), path),
    "stream.arrow": lambda path: write_arrow(path, pa.ipc.new_stream),
    "file.arrow": lambda path: write_arrow(path, pa.ipc.new_file),
}


def spec(path: Path | str, **keys: Any) -> DatasetConfig:
    return DatasetConfig(path=str(path), **keys)


def rows_of(path: Path | str, **keys: Any) -> list[dict[str, Any]]:
    return [row.data for row in iter_rows(spec(path, **keys))]


def error_of(path: Path | str, **keys: Any) -> str:
    with pytest.raises(DataError) as caught:
        list(iter_rows(spec(path, **keys)))
    return str(caught.value)


@pytest.mark.parametrize("name", WRITERS)
def test_each_kind_gives_the_rows_with_their_numbers(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    WRITERS[name](path)
    rows = list(iter_rows(spec(path)))
    assert [row.data for row in rows] == ROWS
    assert [row.number for row in rows] == [1, 2, 3]
    assert rows[2].where == f"{path} row 3"
    assert count_hint(spec(path)) in (3, 4 if name == "lines.json" else 3, None)


def test_text_rows_are_lines_that_are_not_blank(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\n\n two \r\nthree")
    assert [(row.number, row.data["text"]) for row in iter_rows(spec(path))] == [(1, "one"), (3, " two "), (4, "three")]


def test_saved_datasets_folder_and_its_splits(tmp_path: Path) -> None:
    train, test = datasets.Dataset.from_list(ROWS), datasets.Dataset.from_list(ROWS[:1])
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(str(tmp_path / "both"))
    train.save_to_disk(str(tmp_path / "one"))
    assert rows_of(tmp_path / "both") == rows_of(tmp_path / "one") == ROWS
    assert rows_of(tmp_path / "both", split="test") == ROWS[:1]
    assert rows_of(tmp_path / "both", split="train[1:]") == ROWS[1:]
    assert count_hint(spec(tmp_path / "both", split="test")) == 1
    assert "no split 'tset'; it has train, test; did you mean 'test'?" in error_of(tmp_path / "both", split="tset")
    assert "without splits" in error_of(tmp_path / "one", split="test")
    assert source_fingerprint(spec(tmp_path / "both")) != source_fingerprint(spec(tmp_path / "both", split="test"))


def test_folder_files_by_data_files_split_and_kind(tmp_path: Path) -> None:
    for name, row in (("b/train-0.jsonl", ROWS[0]), ("extra.jsonl", ROWS[1]), ("test.jsonl", ROWS[2])):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(jsonl([row]))
    (tmp_path / "README.md").write_text("not data")
    assert rows_of(tmp_path) == ROWS[:2]  # the test file is never trained on
    assert rows_of(tmp_path, split="test") == ROWS[2:]
    assert rows_of(tmp_path, data_files=["test.jsonl", "b/*.jsonl"]) == [ROWS[2], ROWS[0]]
    assert "did you mean" in error_of(tmp_path, data_files="extrra.jsonl")
    assert "no split 'validation'; by their names its files belong to: test, train" in error_of(
        tmp_path, split="validation"
    )
    write_csv(tmp_path / "more.csv")
    assert "csv and json files; say which with `ds_type`" in error_of(tmp_path)
    assert rows_of(tmp_path, ds_type="csv") == ROWS


def test_slices_of_a_local_split(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"text": str(number)} for number in range(10)]
    path.write_bytes(jsonl(rows))
    assert rows_of(path, split="train[2:4]") == rows[2:4]
    assert rows_of(path, split="train[-3:]") == rows[-3:]
    assert rows_of(path, split="train[50%:]") == rows[5:]
    assert [row.number for row in iter_rows(spec(path, split="train[:10%]"))] == [1]
    assert count_hint(spec(path, split="train[80%:]")) == 2
    assert "not understood" in error_of(path, split="train[a:b]")
    assert "only the split 'train'" in error_of(path, split="test")


def test_arrow_padding_is_taken_out_of_structs_and_null_columns_stay(tmp_path: Path) -> None:
    calls = [{"arguments": {"city": "Rome"}}, {"arguments": {"date": "now"}}]
    pq.write_table(pa.Table.from_pylist([{"calls": calls, "tools": None}]), tmp_path / "a.parquet")
    assert rows_of(tmp_path / "a.parquet") == [{"calls": calls, "tools": None}]
    (tmp_path / "a.jsonl").write_bytes(jsonl([{"call": {"city": None}}]))
    assert rows_of(tmp_path / "a.jsonl") == [{"call": {"city": None}}]  # a null that the user wrote


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"
BROKEN: dict[str, tuple[str, bytes, str]] = {
    "broken line": ("a.jsonl", b'{"text": "x"}\n{"text": \n', "a.jsonl line 2, column 9: broken JSON"),
    "not an object": ("a.jsonl", b'{"text": "x"}\n"word"\n', "a.jsonl line 2: is a JSON str; expected an object"),
    "not UTF-8": ("a.jsonl", b'{"text": "\xff"}\n', "a.jsonl line 1: is not UTF-8"),
    "array without comma": ("a.json", b'[{"a": 1}\n{"a": 2}]', "a.json line 2: broken JSON (no comma or ]"),
    "array cut short": ("a.json", b'[{"a": 1},\n{"a": 2', "a.json line 2: broken JSON"),
    "array of numbers": ("a.json", b"[1, 2]", "item 1 is a JSON int; expected an array of objects"),
    "empty": ("a.jsonl", b"", "no rows"),
    "empty array": ("a.json", b"[]", "no rows"),
    "blank lines": ("a.jsonl", b"\n\n", "no rows"),
    "unknown extension": ("a.dat", b"{}", "cannot tell the file format from its name; expected one of .json, .jsonl"),
    "Parquet named JSONL": ("a.jsonl", b"PAR1xxxx", "is a Parquet file by its content; expected one JSON object"),
    "no Parquet": ("a.parquet", b"hello", "cannot be read as Parquet"),
    "no Arrow": ("a.arrow", b"hello there", "cannot be read as Arrow"),
    "cut gzip": ("a.jsonl.gz", gzip.compress(jsonl() * 50)[:-9], "cannot be read"),
    "damaged gzip": ("a.jsonl.gz", gzip.compress(jsonl() * 50)[:10] + b"\xff" * 50, "cannot be read"),
    "nested too deeply": ("a.jsonl", b'{"a": ' + b"[" * 100_000, "a.jsonl line 1: cannot be read as JSON"),
    "array nested too deeply": ("a.json", b'[{"a": ' + b"[" * 100_000, "line 1: item 1 cannot be read as JSON"),
    "endless number": ("a.jsonl", b'{"a": ' + b"1" * 5000 + b"}", "a.jsonl line 1: cannot be read as JSON"),
    "half a character": (
        "a.jsonl",
        rb'{"a": "\ud83d\ude00"}' + b"\n" + rb'{"a": "\ud83d"}',
        "a.jsonl line 2: has an esc",
    ),
    "array with half a character": ("a.json", rb'[{"a": "\ud83d\ude00"}, {"a": "\ude00"}]', "item 2 has an escape"),
    "a key twice": ("a.jsonl", b'{"a": 1}\n{"a": {"b": 1, "c": 2, "b": 3}}\n', "a.jsonl line 2: has the key 'b' twice"),
    "a key twice in an array": (
        "a.json",
        b'[{"a": 1},\n {"a": 1, "a": 2}]',
        "a.json line 2: item 2 has the key 'a' twice",
    ),
    "an array that is not UTF-8": ("a.json", b'[{"a": "\xff"}]', "a.json: is not UTF-8 text"),
    "UTF-16": ("a.jsonl", '{"a": 1}'.encode("utf-16"), "a.jsonl: is UTF-16 text, which is not read; expected UTF-8 ("),
    "UTF-16 without its mark": ("a.jsonl", '{"a": 1}'.encode("utf-16-be"), "a.jsonl: is UTF-16 text"),
    "a hole of zeros, which a lost disk block leaves": (
        "a.jsonl",
        bytes(512) + jsonl(),
        "a.jsonl line 1, column 1: broken JSON",
    ),
    "CSV in UTF-16": ("a.csv", "a,b\n1,2\n".encode("utf-16"), "a.csv: is UTF-16 text"),
    "a pointer of Git LFS": (
        "a.jsonl",
        POINTER,
        "a.jsonl: is a pointer of Git LFS, not the data; expected its",
    ),
    "a pointer in place of Parquet": ("a.parquet", POINTER, "a.parquet: is a pointer of Git LFS"),
    "CSV with semicolons": ("a.csv", b"a;b\n1;2\n", "a.csv line 1: names one column, 'a;b'; expected commas"),
    "CSV with tabs": ("a.csv", b"a\tb\n1\t2\n", "expected commas between fields, not '\\t'"),
    "text after the array": ("a.json", b'[{"a": 1}] {"a": 2}', "text after the end of the array"),
    "CSV that is not UTF-8": ("a.csv", b"a,b\n1,2\n\xff,4\n", "a.csv line 3: cannot be read as CSV"),
    "CSV with a column twice": ("a.csv", b"a,a\n1,2\n", "a.csv line 1: the column 'a' is named twice"),
    "CSV with an open quote": ("a.csv", b'a,b\n1,"2\n3,4\n', "cannot be read as CSV"),
    "JSONL named CSV": ("a.csv", b'{"text": "x", "n": 1}\n', "no rows"),
    "gzip without its suffix": ("a.jsonl", gzip.compress(jsonl()), "is a gzip file by its content"),
    "gzip suffix on plain text": ("a.jsonl.gz", jsonl(), "cannot be read"),
    "an empty gzip": ("a.jsonl.gz", b"", "no rows"),
    "an empty Parquet": ("a.parquet", b"", "cannot be read as Parquet"),
    "an empty Arrow": ("a.arrow", b"", "cannot be read as Arrow"),
    "an empty CSV": ("a.csv", b"", "no rows"),
    "a CSV of names only": ("a.csv", b"a,b\n", "no rows"),
    "two zstd frames, one cut": (
        "a.jsonl.zst",
        zstandard.compress(jsonl()) + zstandard.compress(jsonl() * 50)[:-20],
        "cannot be read (the compressed data end in the middle)",
    ),
    "text after zstd": ("a.jsonl.zst", zstandard.compress(jsonl()) + b"{}", "cannot be read"),
    "cut zstd": ("a.jsonl.zst", zstandard.compress(jsonl() * 500)[:-20], "cannot be read"),
    "zip": ("a.jsonl", b"PK\x03\x04xxxx", "is a zip file by its content"),
    "no zstd": ("a.jsonl.zst", b"hello there", "cannot be read"),
    "CSV with a long row": ("a.csv", b"a,b\n1,2,3\n", "a.csv row 1: not the 2 fields that the first line names (a, b)"),
    "CSV with a short row": ("a.csv", b"a,b\n1,2\n1\n", "a.csv row 2: not the 2 fields"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_gives_one_message(tmp_path: Path, case: str) -> None:
    name, content, message = BROKEN[case]
    (tmp_path / name).write_bytes(content)
    assert message in error_of(tmp_path / name)


def test_a_part_of_more_than_the_whole_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl())
    with pytest.raises(DataError, match=r"split 'train\[:200%\]' asks for more than the whole; expected 0% to 100%"):
        list(iter_rows(spec(tmp_path / "a.jsonl", split="train[:200%]")))


def test_the_same_bytes_under_another_compression_are_other_rows(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.jsonl.gz", "b.jsonl.gz"):
        (tmp_path / name).write_bytes(gzip.compress(jsonl()))
    plain, packed, moved = (source_fingerprint(spec(tmp_path / n)) for n in ("a.jsonl", "a.jsonl.gz", "b.jsonl.gz"))
    assert plain != packed == moved


def test_unreadable_lines_can_be_left_out_and_are_reported(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\n{broken\n7\n{"a": 2}\n')
    left_out: list[tuple[int, str]] = []
    rows = list(iter_rows(spec(tmp_path / "a.jsonl"), lambda number, error: left_out.append((number, str(error)))))
    assert [(row.number, row.data) for row in rows] == [(1, {"a": 1}), (4, {"a": 2})]
    assert [number for number, _ in left_out] == [2, 3]
    assert "broken JSON" in left_out[0][1]


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(jsonl())
    assert f"did you mean {tmp_path / 'train.jsonl'}?" in error_of(tmp_path / "trian.jsonl")
    assert "does not exist either" in error_of(tmp_path / "nowhere" / "a.jsonl")
    assert "`data_files` has no meaning" in error_of(tmp_path / "train.jsonl", data_files="x")


def test_a_big_file_is_not_read_ahead(tmp_path: Path) -> None:
    """The second line is broken: whoever reads only the first row must not notice."""
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\n{broken\n')
    assert next(iter_rows(spec(tmp_path / "a.jsonl"))).data == {"a": 1}


def test_the_fingerprint_is_that_of_the_bytes(tmp_path: Path) -> None:
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_bytes(jsonl())
    second.write_bytes(jsonl())
    assert source_fingerprint(spec(first)) == source_fingerprint(spec(second))
    second.write_bytes(jsonl(ROWS[::-1]))
    assert source_fingerprint(spec(first)) != source_fingerprint(spec(second))


def test_hub_data_sets_go_through_load_dataset_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def load_dataset(path: str, name: str | None, **keys: Any) -> datasets.Dataset:
        asked.append((path, name, keys))
        if keys["split"] == "tset":
            raise ValueError("Unknown split 'tset'. Should be one of ['train'].")
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    sources._hub_dataset.cache_clear()
    hub = spec("someone/some-data", name="main", split="train[:5]", revision="v1", data_files="a/*.json")
    assert [row.data for row in iter_rows(hub)] == ROWS
    assert next(iter_rows(hub)).where == "someone/some-data row 1"
    assert count_hint(hub) == 3
    assert source_fingerprint(hub)
    assert asked == [
        ("someone/some-data", "main", {"data_files": ["a/*.json"], "revision": "v1", "split": "train[:5]"})
    ]
    message = error_of("someone/some-data", split="tset")
    assert message.startswith("someone/some-data: no local file or folder, and no readable hub data set (ValueError: ")
    assert "Unknown split 'tset'" in message
    sources._hub_dataset.cache_clear()


def test_a_parquet_file_damaged_in_its_middle_names_the_row(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    texts = [f"text {index} " * 50 for index in range(3000)]
    pq.write_table(pa.table({"text": texts}), path, row_group_size=1000, use_dictionary=False)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 2000] = b"\xff" * 2000
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.parquet: cannot be read beyond row \d+"):
        list(iter_rows(spec(path)))


def chunked(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(readers, "BLOCK_BYTES", size)
    monkeypatch.setattr(readers, "BLOCK_ROWS", size)


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("size", [1, 3, 16, 64])
def test_however_a_file_is_cut_its_rows_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, size: int
) -> None:
    WRITERS[name](tmp_path / name)
    whole = [(row.number, row.data) for row in iter_rows(spec(tmp_path / name))]
    chunked(monkeypatch, size)
    blocks = list(iter_blocks(spec(tmp_path / name)))
    assert [(row.number, row.data) for block in blocks for row in rows_of_block(block, None)] == whole
    assert [block.first for block in blocks] == sorted(block.first for block in blocks)


@pytest.mark.parametrize("case", BROKEN)
def test_however_a_broken_file_is_cut_its_message_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    name, content, message = BROKEN[case]
    (tmp_path / name).write_bytes(content)
    if "Parquet" not in message and "too deeply" not in case:  # one tells the format by the first bytes
        chunked(monkeypatch, 16)
    assert message in error_of(tmp_path / name)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


# fmt: off
PIECES_OF_JSON = [
    '"a":', '"a" :', '"b":', '"a\\\\":', '"\\u0061":', "{", "}", "[", "]", ",", "1", '"x"', '":"', '"\\":"', "1e400",
    '"\\ud800"', '"\\ud83d\\ude00"', "NaN", "-0", "18446744073709551616", "-9223372036854775809", "\t", "é", "01",
]
# fmt: on
LINES = st.one_of(
    JSON_VALUES.map(json.dumps),
    JSON_VALUES.map(lambda value: json.dumps({"a": value}, ensure_ascii=False)),
    st.dictionaries(st.text(max_size=4), JSON_VALUES).map(lambda row: json.dumps(row, separators=(" ,", "\t:"))),
    st.lists(st.sampled_from(PIECES_OF_JSON), max_size=9).map(lambda parts: "{" + "".join(parts) + "}"),
)


@settings(max_examples=600, deadline=None)
@given(line=LINES)
@example('{"a":1,"a":2}')
@example('{"a" :1,"a":2}')
@example('{"a" :1,"a":"\\":"}')
@example('{"a":123456789012345678901234567890}')
def test_a_row_read_quickly_is_the_row_read_with_care(line: str) -> None:
    content = line.encode("utf-8", "surrogatepass")
    quick, careful = quick_row(content), examined_row("f line 1", content)
    assert quick is None or repr(quick) == repr(careful)


def test_usual_rows_are_read_quickly() -> None:
    rows = [
        {"messages": [{"role": "user", "content": '\u201ca" \\ b\u201d'}], "ids": [1, -2], "weight": 0.5, "no": None}
    ]
    for row in rows:
        assert quick_row(json.dumps(row).encode()) == row
        assert quick_row(json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode() + b"\r") == row


@settings(max_examples=60, deadline=None)
@given(
    items=st.lists(st.dictionaries(st.text(max_size=5), JSON_VALUES, max_size=3), min_size=1, max_size=5),
    indent=st.sampled_from([None, 0, 2]),
    size=st.integers(1, 40),
)
def test_arrays_are_read_through_any_window(
    tmp_path_factory: pytest.TempPathFactory, items: list[dict[str, Any]], indent: int | None, size: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "window.json"
    path.write_text(json.dumps(items, indent=indent, ensure_ascii=False), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        chunked(patch, size)
        assert [row.data for row in iter_rows(spec(path))] == items


def test_shards_of_different_columns_are_read_as_they_are(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([{"text": "a", "n": 1}]), tmp_path / "1.parquet")
    pq.write_table(pa.Table.from_pylist([{"text": "b", "n": "one", "more": [1.5]}]), tmp_path / "2.parquet")
    pq.write_table(pa.Table.from_pylist([{"other": None}]), tmp_path / "3.parquet")
    assert rows_of(tmp_path) == [
        {"text": "a", "n": 1},
        {"text": "b", "n": "one", "more": [1.5]},
        {"other": None},
    ]


def test_empty_files_among_others_have_no_rows(tmp_path: Path) -> None:
    (tmp_path / "1.jsonl").write_bytes(b"")
    (tmp_path / "2.jsonl").write_bytes(jsonl())
    (tmp_path / "3.jsonl").write_bytes(b"\n")
    assert rows_of(tmp_path) == ROWS
    assert {row.file for row in iter_rows(spec(tmp_path))} == {str(tmp_path / "2.jsonl")}


def test_what_a_folder_may_hold(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(jsonl())
    for name in ("README.md", "_SUCCESS", ".hidden.jsonl", "LICENSE", "dataset_infos.yaml"):
        (tmp_path / name).write_text("not data")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x.jsonl").write_text("not data")
    (tmp_path / "folder.jsonl").mkdir()
    assert rows_of(tmp_path) == ROWS
    (tmp_path / "rows-2.jsonl.bz2").write_bytes(b"BZh")
    message = error_of(tmp_path)
    assert "rows-2.jsonl.bz2: .bz2 files cannot be read, and leaving it out might lose rows" in message
    assert rows_of(tmp_path, data_files="rows.jsonl") == ROWS
    (tmp_path / "rows-2.jsonl.bz2").unlink()
    (tmp_path / "more.jsonl").symlink_to(tmp_path / "gone.jsonl")
    assert "more.jsonl: is a link to something that does not exist" in error_of(tmp_path)
    (tmp_path / "more.jsonl").unlink()
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert "pipe.jsonl: is no regular file" in error_of(tmp_path)
    assert "pipe.jsonl: is no regular file" in error_of(tmp_path / "pipe.jsonl")


def test_a_line_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "_LONGEST_LINE", 1 << 20)
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\n' + b"x" * (3 << 20))
    assert "a.jsonl line 2: is longer than 1 MiB" in error_of(tmp_path / "a.jsonl")
