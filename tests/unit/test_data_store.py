"""The token store: what goes in comes out, as views, from disk, in any order, in another process."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eft.core.constants import IGNORE_INDEX
from eft.core.errors import DataError
from eft.core.records import TokenSample
from eft.data import store_writer
from eft.data.encoded import StoredSample, encode_samples
from eft.data.sample_set import TokenView, digests_of, measure
from eft.data.store import TokenStore, as_token_dataset, open_store, write_store
from eft.data.store_writer import StoreWriter


def a_sample(rng: np.random.Generator, length: int, weighted: bool = False) -> TokenSample:
    ids = rng.integers(0, 1000, length).astype(np.int32)
    labels = np.where(rng.random(length) < 0.5, ids, IGNORE_INDEX).astype(np.int32)
    return TokenSample(ids, labels, rng.random(length).astype(np.float32) if weighted else None)


def samples_of(count: int, seed: int = 0, weighted_every: int = 0) -> list[TokenSample]:
    rng = np.random.default_rng(seed)
    weighted = [bool(weighted_every) and index % weighted_every == 0 for index in range(count)]
    return [a_sample(rng, int(rng.integers(1, 40)), flag) for flag in weighted]


def stored(folder: Path, samples: list[TokenSample]) -> TokenStore:
    return write_store(folder, ((f"file{i % 2}.jsonl", 10 * i, sample) for i, sample in enumerate(samples)))


def assert_equal(found: TokenSample, expected: TokenSample) -> None:
    np.testing.assert_array_equal(found.input_ids, expected.input_ids)
    np.testing.assert_array_equal(found.labels, expected.labels)
    assert (found.weights is None) == (expected.weights is None)
    if found.weights is not None and expected.weights is not None:
        np.testing.assert_array_equal(found.weights, expected.weights)


@pytest.mark.parametrize("weighted_every", [0, 3])
@pytest.mark.parametrize("shard_blocks", [1, 7, 64])
def test_samples_come_back_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_blocks: int, weighted_every: int
) -> None:
    monkeypatch.setattr(store_writer, "SHARD_BLOCKS", shard_blocks)
    samples = samples_of(50, weighted_every=weighted_every)
    store = stored(tmp_path / "s", samples)
    assert len(store) == 50
    for index in np.random.default_rng(1).permutation(50):
        assert_equal(store.sample(int(index)), samples[index])
    assert store.lengths.tolist() == [len(sample.input_ids) for sample in samples]
    assert store.row_ids.tolist() == [10 * index for index in range(50)]
    assert store.source_names == ["file0.jsonl", "file1.jsonl"]
    assert store.source_ids.tolist() == [index % 2 for index in range(50)]
    assert store.origin(3) == "file1.jsonl row 30"


def test_columns_have_the_types_of_the_protocol(tmp_path: Path) -> None:
    store = stored(tmp_path / "s", samples_of(9))
    view = store.select([3, 1])
    for dataset in (store, view):
        assert dataset.lengths.dtype == np.int32
        assert dataset.trainable_counts.dtype == np.int32
        assert dataset.weight_sums.dtype == np.float64
        assert dataset.sample(0).input_ids.dtype == np.int32
        assert dataset.sample(0).labels.dtype == np.int32


def test_samples_are_views_of_the_mapped_file(tmp_path: Path) -> None:
    sample = stored(tmp_path / "s", samples_of(3)).sample(1)
    assert not sample.input_ids.flags.owndata
    assert not sample.input_ids.flags.writeable


def test_weight_sums_leave_out_the_first_position_and_the_context(tmp_path: Path) -> None:
    ids = np.arange(4, dtype=np.int32)
    labels = np.array([0, -100, 2, 3], dtype=np.int32)
    weights = np.array([8.0, 4.0, 2.0, 0.5], dtype=np.float32)
    store = write_store(
        tmp_path / "s", [("f", 1, TokenSample(ids, labels)), ("f", 2, TokenSample(ids, labels, weights))]
    )
    assert store.trainable_counts.tolist() == [2, 2]
    assert store.weight_sums.tolist() == [2.0, 2.5]


def test_items_for_loaders_and_lists(tmp_path: Path) -> None:
    samples = samples_of(5)
    store = stored(tmp_path / "s", samples)
    assert store.column_names == ("input_ids", "labels")
    np.testing.assert_array_equal(store[-1]["labels"], samples[4].labels)
    assert len(list(store)) == 5
    for index in (5, -6):
        with pytest.raises(IndexError):
            store[index]
    with pytest.raises(IndexError):
        store.select([5])


def test_a_pickled_store_and_view_are_paths_not_tokens(tmp_path: Path) -> None:
    samples = samples_of(400)
    store = stored(tmp_path / "s", samples)
    assert len(pickle.dumps(store)) < 400
    view = pickle.loads(pickle.dumps(store.select([7, 3])))
    assert_equal(view.sample(0), samples[7])


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_views_of_views_of_many_stores(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("views")
    counts = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    all_samples: list[TokenSample] = []
    bases = []
    for number, count in enumerate(counts):
        samples = samples_of(count, seed=number, weighted_every=number)
        bases.append(stored(folder / str(number), samples))
        all_samples += samples
    positions = data.draw(st.lists(st.integers(0, len(all_samples) - 1), max_size=8))
    chosen = data.draw(st.lists(st.integers(0, len(positions) - 1), max_size=8)) if positions else []
    view = TokenView(bases, np.asarray(positions, dtype=np.int64)).select(chosen)
    expected = [all_samples[positions[index]] for index in chosen]
    assert len(view) == len(expected)
    for index, sample in enumerate(expected):
        assert_equal(view.sample(index), sample)
        assert view.lengths[index] == len(sample.input_ids)
        assert view.bases[view.base_ids()[index]] in bases


def test_the_fingerprint_is_of_the_content_in_order(tmp_path: Path) -> None:
    samples = samples_of(6, weighted_every=2)
    first = stored(tmp_path / "a", samples)
    assert stored(tmp_path / "b", samples).fingerprint == first.fingerprint
    assert first.select(range(6)).fingerprint == first.fingerprint
    assert first.select([1, 0, 2, 3, 4, 5]).fingerprint != first.fingerprint
    for change in ("input_ids", "labels", "weights"):
        changed = [TokenSample(s.input_ids.copy(), s.labels.copy(), s.weights) for s in samples]
        altered = changed[0]
        if change == "weights":
            assert altered.weights is not None
            changed[0] = TokenSample(altered.input_ids, altered.labels, altered.weights + 1)
        else:
            getattr(altered, change)[0] += 1
        assert stored(tmp_path / change, changed).fingerprint != first.fingerprint, change


def test_the_same_samples_give_the_same_files(tmp_path: Path) -> None:
    stored(tmp_path / "a", samples_of(6, weighted_every=2))
    stored(tmp_path / "b", samples_of(6, weighted_every=2))
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "b").iterdir())
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_conversations_are_kept_beside_the_tokens(tmp_path: Path) -> None:
    sample = samples_of(1)[0]
    with StoreWriter(tmp_path) as writer:
        text = '{"messages": [{"role": "user", "content": "hé"}], "tools": null}'.encode()
        writer.append(encode_samples("f", [StoredSample(1, 1, sample, text), StoredSample(2, 2, sample, None)]), dict)
        writer.finish({"note": "kept"}, {})
    store = open_store(tmp_path)
    assert store.meta["note"] == "kept"
    assert store.conversation(0) == {"messages": [{"role": "user", "content": "hé"}], "tools": None}
    assert store.conversation(1) is None
    assert store.select([0]).conversation(0) == store.conversation(0)


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), max_size=12), seed=st.integers(0, 9), every=st.integers(0, 3))
def test_a_block_measures_its_samples_as_one_by_one(lengths: list[int], seed: int, every: int) -> None:
    rng = np.random.default_rng(seed)
    samples = [a_sample(rng, length, bool(every) and index % every == 0) for index, length in enumerate(lengths)]
    rows = encode_samples("f", [StoredSample(i, i, sample, None) for i, sample in enumerate(samples)])
    measured = [measure(sample) for sample in samples]
    assert rows.columns["trainable_counts"].tolist() == [count for count, _ in measured]
    np.testing.assert_allclose(rows.columns["weight_sums"], [weight for _, weight in measured], rtol=1e-12)
    digests = [digests_of(sample) for sample in samples]
    found = zip(rows.columns["id_digests"], rows.columns["sample_digests"], strict=True)
    assert [(a.ljust(16, b"\0"), b.ljust(16, b"\0")) for a, b in found] == digests


def append_all(writer: StoreWriter, samples: list[TokenSample]) -> None:
    """One block per sample; the state is the number of the block."""
    for number in range(writer.num_blocks, len(samples)):
        block = encode_samples("f", [StoredSample(number, number, samples[number], None)])
        writer.append(block, lambda number=number: {"after": number})  # type: ignore[misc]


@pytest.mark.parametrize("damage", ["nothing", "cut", "changed", "no manifest", "half a line", "a stray file"])
def test_an_unfinished_store_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    monkeypatch.setattr(store_writer, "SHARD_BLOCKS", 4)
    samples = samples_of(14, weighted_every=3)
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    for folder, kept in ((straight, samples), (killed, samples[:11])):
        folder.mkdir()
        with StoreWriter(folder) as writer:
            append_all(writer, kept)
            if folder == straight:
                writer.finish({}, {})
    second = killed / "tokens-00001.arrow"
    manifest = killed / "manifest.jsonl"
    expected_blocks = 8
    if damage == "cut":
        second.write_bytes(second.read_bytes()[:-1])
        expected_blocks = 4
    elif damage == "changed":
        content = bytearray(second.read_bytes())
        content[len(content) // 2] ^= 1
        second.write_bytes(content)
        expected_blocks = 4
    elif damage == "no manifest":
        manifest.unlink()
        expected_blocks = 0
    elif damage == "half a line":
        manifest.write_bytes(manifest.read_bytes()[:-30])
        expected_blocks = 4
    elif damage == "a stray file":
        (killed / "lengths.npy").write_bytes(b"old")
    with StoreWriter(killed) as writer:
        assert writer.num_blocks == expected_blocks
        assert writer.state == ({"after": expected_blocks - 1} if expected_blocks else None)
        append_all(writer, samples)
        writer.finish({}, {})
    names = sorted(path.name for path in straight.iterdir())
    assert names == sorted(path.name for path in killed.iterdir())
    for name in names:
        assert (straight / name).read_bytes() == (killed / name).read_bytes(), name


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    def rows() -> Any:
        yield "f", 1, samples_of(1)[0]
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        write_store(tmp_path / "s", rows())
    assert list(tmp_path.iterdir()) == []


def test_damaged_and_foreign_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a token store"):
        open_store(tmp_path)
    store = stored(tmp_path / "s", samples_of(3))
    (store.path / "tokens-00000.arrow").write_bytes(b"short")
    with pytest.raises(DataError, match=r"tokens-00000\.arrow"):
        open_store(store.path)


def test_foreign_rows_are_taken_as_they_are(tmp_path: Path) -> None:
    rows = [
        {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]},
        {"input_ids": [4, 5], "labels": [4, -100], "attention_mask": [1, 1]},
    ]
    dataset = as_token_dataset(rows)
    assert dataset.lengths.tolist() == [3, 2]
    assert dataset.trainable_counts.tolist() == [2, 0]
    assert dataset.sample(0).labels.tolist() == [-100, 2, 3]
    assert as_token_dataset(dataset) is dataset
    same = write_store(tmp_path / "s", [("f", i, dataset.sample(i)) for i in range(2)])
    assert same.fingerprint == dataset.fingerprint
    assert as_token_dataset(same) is same


def test_a_plain_datasets_dataset_is_accepted() -> None:
    import datasets

    rows = {"input_ids": [[1, 2, 3], [4, 5], [6, 7]], "labels": [[-100, 2, 3], [4, 5], [6, 7]]}
    table = datasets.Dataset.from_dict(rows).select([2, 0])
    dataset = as_token_dataset(table)
    assert dataset.sample(0).input_ids.tolist() == [6, 7]
    assert dataset.sample(1).labels.tolist() == [-100, 2, 3]
    assert dataset.sample(1).labels.dtype == np.int32


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input_ids": [1, 2]}, "row 1 .* no 'labels'"),
        ({"labels": [1, 2]}, "row 1 .* no field 'input_ids'"),
        ({"input_ids": [1, 2], "labels": [1]}, "row 1 .* 1 labels for 2 input_ids"),
        ({"input_ids": [], "labels": []}, "row 1 .* no tokens"),
        ({"input_ids": [1, 2], "labels": [2, -100]}, "row 1 .* not shifted"),
        ({"input_ids": [1.5, 2.0], "labels": [1, 2]}, "row 1 .* integers"),
        ({"input_ids": [[1], [1, 2]], "labels": [1, 2]}, "row 1 .* integers"),
        ({"input_ids": [1, 2**40], "labels": [1, -100]}, "row 1 .* 32 bits"),
        ({"input_ids": [1, -2], "labels": [1, -100]}, "row 1 .* 0 or more"),
        ({"input_ids": None, "labels": [1, 2]}, "row 1 .* null"),
        ({"input_ids": [1, 0], "labels": [1, -100], "attention_mask": [1, 0]}, "row 1 .* padded"),
        ({"input_ids": [1, 0], "labels": [1, 0], "weights": [1, -1]}, "row 1 .*weights"),
        (["no mapping"], "row 1 .* list"),
    ],
)
def test_foreign_rows_that_cannot_be_trained_are_named(row: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        as_token_dataset([{"input_ids": [1, 2], "labels": [1, 2]}, row])


def test_a_stream_is_refused() -> None:
    with pytest.raises(DataError, match="without length"):
        as_token_dataset(iter([]))
