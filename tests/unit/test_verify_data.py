"""E5 on stored samples: a change of a sample is seen, and nothing else is."""

from __future__ import annotations

import numpy as np

from eft.data.dataset_meta import DatasetMeta
from eft.data.sample_set import digests_of
from eft.data.store import as_token_dataset
from eft.verify.data import check_store

ROWS = [{"input_ids": [1, i % 97, i // 97, 5], "labels": [-100, -100, i // 97, 5]} for i in range(250)]


def test_stored_samples_pass_also_where_a_digest_ends_in_zero() -> None:
    dataset = as_token_dataset(ROWS)
    endings = {digests_of(dataset.sample(index))[1][-1] for index in range(len(ROWS))}
    assert 0 in endings, "or this test shows nothing"
    assert check_store(DatasetMeta(dataset, None, 1), 100).status == "pass"


def test_a_sample_that_changed_after_it_was_counted_is_found() -> None:
    rows = [dict(row) for row in ROWS]
    dataset = as_token_dataset(rows)
    rows[3] = {**rows[3], "input_ids": [2, *rows[3]["input_ids"][1:]]}
    result = check_store(DatasetMeta(dataset, None, 1), 100)
    assert result.status == "fail"
    assert "training sample 3: its content is not what was stored" in result.detail
    assert np.isclose(result.numbers["faults"], 1)
