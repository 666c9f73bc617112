"""The ledger balances, says what does not, and survives the disk."""

from __future__ import annotations

import json

import pytest

from eft.core.errors import PromiseBroken
from eft.data.ledger import HEADER, ROWS_KEPT, Ledger, SourceLedger


def balanced() -> SourceLedger:
    source = SourceLedger(
        "chats.jsonl", rows=6, raw=100, samples=2, trainable=30, context=20, truncated_rows=1, truncated=9
    )
    source.held_out.add("chats.jsonl:4", 11)
    source.drop("too_long", "chats.jsonl:2", 25)
    source.drop("duplicate", "chats.jsonl:3", 5)
    source.drop("malformed", "chats.jsonl:9", 0)
    return source


def test_a_balanced_ledger_passes() -> None:
    Ledger([balanced(), SourceLedger("empty", split="eval")]).check()


@pytest.mark.parametrize("column", ["raw", "trainable", "context", "truncated"])
def test_a_lost_token_is_named_with_source_and_numbers(column: str) -> None:
    source = balanced()
    setattr(source, column, getattr(source, column) + 1)
    with pytest.raises(PromiseBroken, match=r"E5: the tokens of chats\.jsonl \(train\).*too_long 1 rows 25 tokens"):
        Ledger([source]).check()


@pytest.mark.parametrize("column", ["rows", "samples"])
def test_a_lost_row_is_named(column: str) -> None:
    source = balanced()
    setattr(source, column, getattr(source, column) - 1)
    with pytest.raises(PromiseBroken, match=r"E5: the rows of chats\.jsonl"):
        source.check()


def test_a_lost_drop_or_held_out_row_is_named() -> None:
    source = balanced()
    source.drop("too_short", "chats.jsonl:1", 1)
    with pytest.raises(PromiseBroken, match="dropped 31 = 101"):
        source.check()
    source = balanced()
    source.held_out.add("chats.jsonl:8", 2)
    with pytest.raises(PromiseBroken, match="held out 13"):
        source.check()


def test_only_the_first_rows_are_kept() -> None:
    source = SourceLedger("x")
    for number in range(3 * ROWS_KEPT):
        source.drop("too_long", f"x:{number}", 2)
    portion = source.dropped["too_long"]
    assert (portion.rows, portion.tokens) == (3 * ROWS_KEPT, 6 * ROWS_KEPT)
    assert portion.first_rows == [f"x:{number}" for number in range(ROWS_KEPT)]


def test_json_there_and_back() -> None:
    ledger = Ledger([balanced()])
    again = Ledger.from_json(json.loads(json.dumps(ledger.to_json())))
    assert again == ledger
    again.sources[0].drop("too_long", "more", 1)
    assert ledger == Ledger([balanced()]), "from_json shares nothing with its input"


def test_the_table_has_one_row_per_source_and_totals() -> None:
    rows = Ledger([balanced()]).table()
    assert len(rows) == 1
    assert rows[0][:6] == ["chats.jsonl", "6", "2", "100", "30 (60%)", "20"]
    assert rows[0][6:8] == ["9 (1 rows)", "11 (1 rows)"]
    assert rows[0][8].splitlines() == [
        "too long: 1 rows, 25 tokens", "duplicate: 1 rows, 5 tokens", "malformed: 1 rows"
    ]  # fmt: skip
    second = balanced()
    second.split = "eval"
    rows = Ledger([balanced(), balanced(), second]).table()
    assert [row[0] for row in rows] == ["chats.jsonl", "chats.jsonl", "chats.jsonl (evaluation)", "all (train)"]
    assert rows[-1][3] == "200"
    assert "too long: 2 rows, 50 tokens" in rows[-1][8]
    assert all(len(row) == len(HEADER) for row in rows)
