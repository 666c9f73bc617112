"""Streams: the same steps on every world size, from any step on, with every row in the ledger and memory bounded."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eft.config.load import config_from_mapping
from eft.config.root import TrainConfig
from eft.core.errors import ConfigError, DataError
from eft.data.balance import RankShare
from eft.data.collators import Groups, PackedCollator
from eft.data.ledger import Ledger
from eft.data.loader import build_stream_loader
from eft.data.readers import BLOCK_BYTES
from eft.data.stream import StreamDataset, WindowRule
from eft.data.stream_plan import StreamPlan, StreamStep, build_stream_plan, stream_steps
from eft.data.stream_prepare import plan_of_stream, prepare_stream
from tests.tiny import tiny_tokenizer

CAPACITY = 24
TOKENIZER = tiny_tokenizer()


def write_rows(path: Path, lengths: list[int], first: int) -> Path:
    """Tokenised rows; every id of row i is first + i."""
    rows = [{"input_ids": [first + i] * length, "labels": [first + i] * length} for i, length in enumerate(lengths)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


def config_of(paths: list[Path], **keys: Any) -> TrainConfig:
    values = {
        "base_model": "none",
        "output_dir": "none",
        "learning_rate": 1e-3,
        "datasets": [{"path": str(path)} for path in paths],
        "streaming": True,
        "max_steps": 12,
        "sequence_len": CAPACITY,
        "sample_packing": True,
        "streaming_multipack_buffer_size": 10,
    }
    return config_from_mapping({**values, **keys})


def stream_of(config: TrainConfig) -> StreamDataset:
    stream = prepare_stream(config, TOKENIZER).train
    assert isinstance(stream, StreamDataset)
    return stream


def plan_of(config: TrainConfig, global_batch_size: int = 4) -> StreamPlan:
    return plan_of_stream(config, stream_of(config), global_batch_size)


def rows_in(step: StreamStep) -> list[list[int]]:
    """The number of each row, bin by bin."""
    return [[int(step.samples[i].input_ids[0]) for i in ids] for ids in step.plan.bins]


@pytest.fixture(scope="module")
def two_files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("stream")
    lengths = np.random.default_rng(0).integers(2, CAPACITY + 1, 60).tolist()
    return [write_rows(folder / "a.jsonl", lengths[:23], 3), write_rows(folder / "b.jsonl.gz", lengths[23:], 103)]


def test_a_step_is_whole_bins_of_the_capacity(two_files: list[Path]) -> None:
    steps = list(plan_of(config_of(two_files)).steps_from(0))
    assert [step.plan.step for step in steps] == list(range(12))
    for step in steps:
        assert len(step.plan.bins) == 4
        assert all(sum(step.lengths[ids]) <= CAPACITY for ids in step.plan.bins)
        assert step.plan.tokens == sum(len(sample.input_ids) for sample in step.samples)
        assert step.plan.weight == sum(len(sample.input_ids) - 1 for sample in step.samples)


@pytest.mark.parametrize("buffer", [12, 1000])
def test_every_row_of_a_round_is_trained_once_before_any_is_trained_again(tmp_path: Path, buffer: int) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [3, 9, 5, 7, 4, 8, 6, 20, 11, 2, 13, 24], 3)
    plan = plan_of(config_of([path], streaming_multipack_buffer_size=buffer, max_steps=30), global_batch_size=1)
    seen = [row for step in plan.steps_from(0) for row in sum(rows_in(step), [])]
    for start in range(0, len(seen) - 12, 12):
        assert sorted(seen[start : start + 12]) == list(range(3, 15))
    assert seen[:12] != seen[12:24], "another round is another order"


@given(
    lengths=st.lists(st.integers(2, CAPACITY), min_size=1, max_size=40),
    buffer=st.integers(1, 17),
    shape=st.sampled_from([(1, 4, 1), (2, 2, 1), (4, 1, 1), (2, 1, 2), (1, 2, 2), (1, 1, 4)]),
    packed=st.booleans(),
)
@settings(max_examples=30, deadline=None)
def test_every_world_size_trains_the_same_global_batches(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[int],
    buffer: int,
    shape: tuple[int, int, int],
    packed: bool,
) -> None:
    path = write_rows(tmp_path_factory.mktemp("world") / "rows.jsonl", lengths, 3)
    config = config_of([path], streaming_multipack_buffer_size=buffer, sample_packing=packed, max_steps=5)
    stream = stream_of(config)
    expected = [
        sorted(sorted(ids) for ids in rows_in(step)) for step in plan_of_stream(config, stream, 4).steps_from(0)
    ]
    world_size, accumulation, micro_batch_size = shape
    found: list[list[list[int]]] = [[] for _ in expected]
    weights: dict[int, set[float]] = {}
    for rank in range(world_size):
        loader = build_stream_loader(
            plan_of_stream(config, stream, 4),
            lambda bins: {"bins": bins},
            share=RankShare(rank, world_size, accumulation, micro_batch_size),
            cursor=lambda: 0,
        )
        batches = list(loader)
        assert len(batches) == len(loader) == 5 * accumulation
        for batch in batches:
            assert len(batch["bins"]) <= micro_batch_size
            found[batch["step"]] += [sorted(int(sample.input_ids[0]) for sample in each) for each in batch["bins"]]
            weights.setdefault(batch["step"], set()).add(batch["step_weight"])
    assert [sorted(step) for step in found] == expected
    assert all(len(each) == 1 for each in weights.values())


@pytest.mark.parametrize("keys", [{}, {"curriculum_sampling": True}, {"sample_packing": False}])
def test_a_stream_goes_on_from_any_step(two_files: list[Path], keys: dict[str, Any]) -> None:
    config = config_of(two_files, **keys)
    stream = stream_of(config)
    straight = plan_of_stream(config, stream, 4)
    states, steps = [straight.state_at(0)], []
    for step in straight.steps_from(0):
        steps.append(rows_in(step))
        states.append(json.loads(json.dumps(straight.state_at(step.plan.step + 1))))
    for number in range(12):
        resumed = plan_of_stream(config, stream_of(config), 4)
        assert resumed.fingerprint == straight.fingerprint
        resumed.restore(number, states[number])
        assert [rows_in(step) for step in resumed.steps_from(number)] == steps[number:], number
        assert resumed.ledger_at(12) == straight.ledger_at(12)
        assert resumed.state_at(12) == states[12]


def test_resuming_tokenises_the_open_window_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    for number in range(6):
        write_rows(folder / f"part-{number}.jsonl", [9] * 40, 3 + 40 * number)
    config = config_of([folder], streaming_multipack_buffer_size=20, max_steps=40)
    straight = plan_of(config)
    list(straight.steps_from(0))
    resumed = plan_of(config)
    resumed.restore(20, straight.state_at(20))
    first = next(iter(resumed.steps_from(20)))
    opened = resumed._marks[21].facts
    assert opened is not None
    assert opened.start.window == straight._marks[20].window.window or first.plan.step == 20
    before = straight._marks[20].window.sources[0].account.rows
    # What is counted anew are the rows of the blocks that the window is made of.
    assert opened.accounts[0].rows - before <= 80


def test_the_ledger_says_where_every_row_is(two_files: list[Path]) -> None:
    plan = plan_of(config_of(two_files, max_steps=40))
    trained: Counter[int] = Counter()
    for step in plan.steps_from(0):
        trained.update(row for ids in rows_in(step) for row in ids)
        ledger = plan.ledger_at(step.plan.step + 1)
        ledger.check()
        assert sum(source.samples for source in ledger.sources) == trained.total()
    first, second = ledger.sources
    assert first.rounds >= 1, "a stream that comes to its end begins anew, and the ledger says so"
    assert first.samples == sum(count for row, count in trained.items() if row < 100)
    assert first.samples + first.dropped["not_reached"].rows == first.rows
    assert second.name.endswith("b.jsonl.gz")
    assert Ledger.from_json(json.loads(json.dumps(ledger.to_json()))) == ledger


def test_dropped_rows_are_counted_and_held_out_ones_left_out(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [5, 6, CAPACITY + 1, 7], 3)
    with path.open("a") as file:
        file.write("{broken\n")
    test = write_rows(tmp_path / "test.jsonl", [6], 4)
    keys = {
        "malformed_rows": "drop",
        "test_datasets": [{"path": str(test)}],
        "dataset_prepared_path": str(tmp_path / "prepared"),
    }
    plan = plan_of(config_of([path], max_steps=3, streaming_multipack_buffer_size=2, **keys), 1)
    rows = {row for step in plan.steps_from(0) for ids in rows_in(step) for row in ids}
    assert rows == {3, 6}
    account = plan.ledger_at(3).sources[0]
    account.check()
    assert set(account.dropped) >= {"malformed", "too_long", "held_out_duplicate"}


def test_sources_share_the_tokens_by_their_size(tmp_path: Path) -> None:
    small, large = write_rows(tmp_path / "s.jsonl", [8] * 20, 3), write_rows(tmp_path / "l.jsonl", [8] * 80, 103)
    plan = plan_of(config_of([small, large], max_steps=60))
    tokens = np.zeros(2)
    for step in plan.steps_from(0):
        tokens += np.bincount(step.owners, step.lengths, minlength=2)
    sizes = np.array([small.stat().st_size, large.stat().st_size])
    assert np.allclose(tokens / tokens.sum(), sizes / sizes.sum(), atol=0.02)


def test_a_budget_is_exact() -> None:
    assert stream_steps(2_000_000_000, 64, 4096) == -(-2_000_000_000 // (64 * 4096)) == 7630
    assert stream_steps(64 * 4096, 64, 4096) == 1
    assert stream_steps(64 * 4096 + 1, 64, 4096) == 2
    large = 10**15 + 1
    assert stream_steps(large, 1, 2) == 5 * 10**14 + 1, "no floating point on the way"


@pytest.mark.parametrize(
    ("given_keys", "total", "steps", "by"),
    [
        ({"max_steps": 7}, 3, 7, "max_steps"),
        ({"max_steps": None, "streaming_token_budget": 100}, 3, 3, "total_num_steps"),
        ({"max_steps": None, "streaming_token_budget": 100}, None, 2, "streaming_token_budget"),
    ],
)
def test_who_decides_the_steps(
    two_files: list[Path], given_keys: dict[str, Any], total: int | None, steps: int, by: str
) -> None:
    config = config_of(two_files, **given_keys)
    rule = WindowRule(10, CAPACITY, "fit", True, None, True, 1)
    plan = build_stream_plan(
        stream_of(config),
        rule,
        global_batch_size=3,
        max_steps=config.max_steps,
        token_budget=config.streaming_token_budget,
        total_num_steps=total,
    )
    assert (plan.total_steps, plan.decided_by, plan.epoch_ends) == (steps, by, [steps])
    assert plan.epoch_at(steps) == 1.0


def test_numbers_such_as_2e9_are_integers() -> None:
    config = config_of([Path("x")], max_steps=None, streaming_token_budget=2e9)
    assert config.streaming_token_budget == 2_000_000_000


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"max_steps": None}, ["streaming_token_budget", "max_steps"]),
        ({"num_epochs": 2}, ["num_epochs", "streaming_token_budget"]),
        ({"streaming_token_budget": 10}, ["max_steps", "streaming_token_budget", "keep one"]),
        ({"val_set_size": 0.1}, ["val_set_size", "test_datasets"]),
        ({"dataset_exact_deduplication": True}, ["dataset_exact_deduplication"]),
        ({"balance_buffer_steps": 4}, ["balance_buffer_steps"]),
        ({"dataloader_num_workers": 2}, ["dataloader_num_workers", "dataset_processes"]),
        ({"preflight": True}, ["preflight"]),
        ({"streaming": False, "streaming_token_budget": 5}, ["streaming_token_budget", "streaming"]),
    ],
)
def test_what_a_stream_cannot_do_is_said_by_name(keys: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        config_of([Path("x")], **keys)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_bad_row_is_named_when_it_is_reached(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [5] * 20, 3)
    with path.open("a") as file:
        file.write('{"input_ids": "text"}\n')
    config = config_of([path], streaming_multipack_buffer_size=4)
    # All rows are in the first block, so that it is told before the training.
    with pytest.raises(DataError, match=r"rows\.jsonl row 21: .*input_ids"):
        stream_of(config)


def test_a_source_without_samples_is_refused(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [CAPACITY + 5] * 3, 3)
    with pytest.raises(DataError, match=r"rows\.jsonl: none of the first rows can be trained on"):
        stream_of(config_of([path]))
    good = write_rows(tmp_path / "good.jsonl", [5] * 3, 3)
    with pytest.raises(DataError, match=r"rows\.jsonl: none of its rows can be trained on: 3 too long"):
        list(plan_of(config_of([good, path])).steps_from(0))
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match=r"empty\.jsonl: no rows"):
        stream_of(config_of([tmp_path / "empty.jsonl"]))


def test_ids_that_the_model_has_no_row_for_are_named(two_files: list[Path]) -> None:
    rule = WindowRule(10, CAPACITY, "fit", True, None, True, 1, vocabulary_rows=110)
    plan = StreamPlan(stream_of(config_of(two_files)), rule, 4, 9, "max_steps")
    with pytest.raises(DataError, match=r"b\.jsonl\.gz row \d+: the id 1\d\d is none of the model's 110"):
        list(plan.steps_from(0))


def test_rows_of_files_that_datasets_reads(tmp_path: Path) -> None:
    """A hub data set is streamed; its loaders also read local files."""
    path = write_rows(tmp_path / "rows.jsonl", [5, 6, 7, 8], 3)
    config = config_of([Path("json")], datasets=[{"path": "json", "data_files": str(path)}], max_steps=6)
    local = [rows_in(step) for step in plan_of(config_of([path], max_steps=6), 2).steps_from(0)]
    plan = plan_of(config, 2)
    assert [rows_in(step) for step in plan.steps_from(0)] == local
    resumed = plan_of(config, 2)
    resumed.restore(3, plan.state_at(3))
    assert [rows_in(step) for step in resumed.steps_from(3)] == local[3:]


def test_workers_give_the_same_steps(two_files: list[Path]) -> None:
    config = config_of(two_files, dataset_processes=2, max_steps=4)
    alone = [rows_in(step) for step in plan_of(config_of(two_files, max_steps=4)).steps_from(0)]
    assert [rows_in(step) for step in plan_of(config).steps_from(0)] == alone


def test_batches_say_which_data_set_each_trained_token_is_of(two_files: list[Path]) -> None:
    plan = plan_of(config_of(two_files))
    loader = build_stream_loader(plan, PackedCollator(), share=RankShare(accumulation=4), cursor=lambda: 0)
    for batch in loader:
        groups = batch["groups"]
        assert isinstance(groups, Groups)
        assert groups.names == ("a", "b")
        targets = batch["shift_labels"].reshape(-1)[batch["trained_positions"]]
        assert batch["trained_groups"].tolist() == [int(target >= 100) for target in targets]
        assert groups.weights == [float((targets < 100).sum()), float((targets >= 100).sum())]


def memory_peak(steps: Iterator[Any], count: int) -> int:
    """Bytes that Python and numpy hold at most while `count` steps are made."""
    tracemalloc.start()
    for _ in islice(steps, count):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_a_long_stream_takes_no_more_memory_than_a_short_one(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    row = json.dumps({"input_ids": [7] * 200, "labels": [7] * 200}) + "\n"
    path.write_text(row * 4000)
    config = config_of([path], streaming_multipack_buffer_size=400, sequence_len=400, max_steps=1000)
    assert path.stat().st_size > 5 * BLOCK_BYTES
    short = memory_peak(plan_of(config, 10).steps_from(0), 30)  # a window and a half
    long = memory_peak(plan_of(config, 10).steps_from(0), 210)  # ten and a half
    assert long < 1.25 * short, (short, long)
