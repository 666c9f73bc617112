"""Mixtures through `eft.load_datasets`: what is trained, what the ledger says, and that ranks have no say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import eft
from eft.core.errors import ConfigError
from eft.data.dataset_meta import DatasetMeta
from eft.inputs import plan_of
from eft.report.terminal import ledger_table
from eft.start_table import mixture_text
from eft.verify.data import check_ledger, check_plan
from tests.tiny import tiny_tokenizer


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EFT_CACHE", str(tmp_path / "cache"))


def load(
    tmp_path: Path, entries: list[dict[str, Any]], counts: tuple[int, ...] = (60, 20, 30), **keys: Any
) -> DatasetMeta:
    datasets = []
    for number, (entry, count) in enumerate(zip(entries, counts, strict=False)):
        rows = [{"text": f"{number} {index} " + "one two " * (1 + (index * 7) % 9)} for index in range(count)]
        path = tmp_path / f"part{number}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        datasets.append({"path": str(path), "type": "completion", **entry})
    config = {"base_model": "none", "learning_rate": 1e-3, "num_epochs": 1, "datasets": datasets, **keys}
    return eft.load_datasets(config, tiny_tokenizer())


def tokens_of(meta: DatasetMeta) -> list[int]:
    data: Any = meta.train_dataset
    owners = data.base_ids()
    return [int(data.lengths[owners == number].sum()) for number in range(len(data.bases))]


def test_shares_are_trained_and_accounted_for(tmp_path: Path) -> None:
    meta = load(tmp_path, [{"token_share": 0.2}, {"token_share": 0.7}, {}], val_set_size=5)
    assert meta.ledger is not None
    meta.ledger.check()
    sources = meta.ledger.of("train")
    found = tokens_of(meta)
    assert [source.trainable + source.context for source in sources] == found
    held_out = sum(source.held_out.tokens for source in sources)
    total = sum(source.raw for source in sources) - held_out
    data: Any = meta.train_dataset
    for share, tokens, base in zip((0.2, 0.7, 0.1), found, data.bases, strict=True):
        assert abs(tokens - share * total) <= int(base.lengths.max())
    assert sources[0].dropped["not_drawn"].rows > 0
    assert sources[0].epochs < 1 < 2 < sources[1].epochs
    assert sources[1].repeated.rows == sources[1].samples - len(np.unique(data.positions[data.base_ids() == 1]))
    assert check_ledger(meta).status == "pass"
    cells = meta.ledger.table()[1]
    assert f"(× {sources[1].epochs:.3g})" in cells[2]
    assert ledger_table(meta.ledger.table()).row_count == 4
    text = mixture_text(sources)
    assert (
        f"part1.jsonl {100 * found[1] / sum(found):.2f} % of the tokens, {sources[1].epochs:.3g} epochs of it" in text
    )


def test_an_epoch_has_the_tokens_that_were_asked_for(tmp_path: Path) -> None:
    meta = load(tmp_path, [{"token_share": 0.5}, {"token_share": 0.5}], epoch_tokens=4000)
    longest = int(meta.train_dataset.lengths.max())
    assert all(abs(tokens - 2000) <= longest for tokens in tokens_of(meta))


def test_weights_and_caps(tmp_path: Path) -> None:
    meta = load(tmp_path, [{"weight": 0.5}, {"weight": 2.5}, {"max_rows": 7}])
    assert meta.ledger is not None
    samples = [source.samples for source in meta.ledger.of("train")]
    assert samples == [30, 50, 7]
    dropped = [
        {reason: portion.rows for reason, portion in source.dropped.items()} for source in meta.ledger.of("train")
    ]
    assert dropped == [{"not_drawn": 30}, {}, {"over_cap": 23}]
    capped = load(tmp_path, [{"max_tokens": 100}])
    assert 80 < tokens_of(capped)[0] <= 100


def test_the_same_mixture_again_and_on_any_world_size(tmp_path: Path) -> None:
    entries = [{"weight": 1.5}, {"token_share": 0.4}]
    metas = [load(tmp_path, entries, seed=seed) for seed in (1, 1, 2)]
    fingerprints = [meta.train_dataset.fingerprint for meta in metas]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]
    from eft.config.load import config_from_mapping

    config = config_from_mapping(
        {"base_model": "none", "learning_rate": 1e-3, "datasets": [{"path": "x"}], "global_batch_size": 12}
    )
    plans = [plan_of(config, metas[0].train_dataset, world_size) for world_size in (1, 2, 3)]
    assert len({plan.summary()["fingerprint"] for plan in plans}) == 1
    assert check_plan(plans[0], 1).status == "pass"


def test_order_without_shuffling_is_that_of_the_files(tmp_path: Path) -> None:
    meta = load(tmp_path, [{"weight": 2.0}, {"max_rows": 3}], (4, 9), shuffle_merged_datasets=False)
    data: Any = meta.train_dataset
    rows = [data.origin(index).rsplit("/", 1)[1] for index in range(len(data))]
    assert rows[:8] == [f"part0.jsonl row {number}" for number in (1, 2, 3, 4, 1, 2, 3, 4)]
    assert rows[8:] == sorted(rows[8:])


def test_named_held_out_sets(tmp_path: Path) -> None:
    for name in ("law", "code"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": f"held out {name} one"}) + "\n")
    tests = [{"path": str(tmp_path / f"{name}.jsonl"), "type": "completion"} for name in ("law", "code")]
    tests[0]["name"] = "statutes"
    meta = load(tmp_path, [{}], test_datasets=tests)
    assert isinstance(meta.eval_dataset, dict)
    assert list(meta.eval_dataset) == ["statutes", "code"]


def test_a_mixture_tokenises_nothing_anew(tmp_path: Path) -> None:
    load(tmp_path, [{}, {}])
    meta = load(tmp_path, [{"weight": 3.0}, {"token_share": 0.9}])
    assert meta.cache_note.count("reused") == 2


def test_shares_that_cannot_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="1.2 together"):
        load(tmp_path, [{"token_share": 0.6}, {"token_share": 0.6}])
    with pytest.raises(ConfigError, match="`weight`: not used because `token_share`"):
        load(tmp_path, [{"token_share": 0.6, "weight": 2.0}, {}])
