"""What the trainer asks for: ids that the model knows, and one reading of a held-out set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eft.core.errors import DataError
from eft.core.records import TokenSample
from eft.data.balance import RankShare
from eft.data.batches import BatchSource, check_vocabulary
from eft.data.collators import PackedCollator
from eft.data.store import as_token_dataset, open_store, write_store

ROWS = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}, {"input_ids": [4, 9, 5], "labels": [-100, 9, 5]}]


def source(vocabulary_rows: int, position_rows: int | None = None) -> BatchSource:
    return BatchSource(
        collator=PackedCollator(),
        capacity=8,
        packed=True,
        eval_packed=True,
        sequential=False,
        strategy="auto",
        bin_samples=None,
        balance_buffer=None,
        shuffle=True,
        seed=0,
        num_epochs=1,
        max_steps=None,
        global_batch_size=1,
        share=RankShare(),
        eval_batch_size=1,
        num_workers=0,
        pin_memory=False,
        vocabulary_rows=vocabulary_rows,
        position_rows=position_rows,
    )


def test_an_id_without_a_row_in_the_embedding_is_named_before_anything_runs() -> None:
    assert source(10).make_plan(ROWS, None).total_steps == 1
    with pytest.raises(DataError, match=r"row 1: input_ids\[1\] is 9, but the model's embedding has 9 rows"):
        source(9).make_plan(ROWS, None)
    with pytest.raises(DataError, match="embedding has 9 rows"):
        source(9).eval_loader(ROWS)


def test_a_sample_longer_than_the_table_of_positions_is_named_before_anything_runs() -> None:
    assert source(10, 3).make_plan(ROWS, None).total_steps == 1
    with pytest.raises(DataError, match="row 0: 3 tokens, .* positions has 2; set `sequence_len: 2`"):
        source(10, 2).make_plan(ROWS, None)
    with pytest.raises(DataError, match="learned positions"):
        source(10, 2).eval_loader(ROWS)


def test_a_store_knows_its_largest_id_and_a_view_without_it_passes(tmp_path: Path) -> None:
    samples = [TokenSample(np.array(row["input_ids"]), np.array(row["labels"])) for row in ROWS]
    write_store(tmp_path / "s", [("f.jsonl", number, sample) for number, sample in enumerate(samples, 1)])
    store = open_store(tmp_path / "s")
    assert store.largest_id == 9
    check_vocabulary(store, 10)
    check_vocabulary(store.select([0]), 4)
    with pytest.raises(DataError, match=r"f\.jsonl row 2: input_ids\[1\] is 9"):
        check_vocabulary(store.select([1]), 5)


def test_a_held_out_set_of_someone_elses_is_read_once_for_all_evaluations(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def counted(dataset: Any) -> Any:
        calls.append(dataset)
        return as_token_dataset(dataset)

    monkeypatch.setattr("eft.data.batches.as_token_dataset", counted)
    batches, rows = source(10), [dict(row) for row in ROWS]
    first, second = ([batch["num_tokens"] for batch in batches.eval_loader(rows)] for _ in range(2))
    assert first == second == [6]
    batches.eval_loader(ROWS)
    assert calls == [rows, ROWS]
