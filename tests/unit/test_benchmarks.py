"""The benchmarks' own arithmetic, and that the peers get exactly the rows that eft trains."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from eft.core.constants import IGNORE_INDEX
from eft.data.collators import PackedCollator

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def workload() -> Iterator[ModuleType]:
    """The benchmarks are scripts beside each other: their folder is on the path while they run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        import workload

        yield workload
    for name in ("workload", "tables"):
        sys.modules.pop(name, None)


def test_exported_rows_are_the_batches_of_the_plan(workload: ModuleType, tmp_path: Path) -> None:
    options = workload.RowOptions(vocab=300, capacity=128, steps=6, accumulation=2, median=30)
    folder = workload.prepare_rows(options, tmp_path)
    store = workload.store_of(folder)
    ids, labels, positions, ends = (
        np.load(folder / f"row_{name}.npy") for name in ("ids", "labels", "positions", "ends")
    )
    bins = workload.planned_bins(store, options)
    assert len(bins) == len(ends) >= 12
    for number, bin_ids in enumerate(bins):
        batch = PackedCollator()([[store.sample(int(index)) for index in bin_ids]])
        span = slice(ends[number - 1] if number else 0, ends[number])
        assert np.array_equal(ids[span], batch["input_ids"][0])
        assert np.array_equal(positions[span], batch["position_ids"][0])
        # A model shifts its labels within the row; a document's first one is masked, so no target crosses over.
        assert np.array_equal([*labels[span][1:], IGNORE_INDEX], batch["shift_labels"][0])
        squares = np.load(folder / "row_squares.npy")[number]
        assert squares == np.square(store.lengths[bin_ids].astype(float)).sum()


def test_rows_are_masked_as_asked_and_made_once(workload: ModuleType, tmp_path: Path) -> None:
    options = workload.RowOptions(vocab=300, capacity=512, steps=40, accumulation=1)
    folder = workload.prepare_rows(options, tmp_path)
    store = workload.store_of(folder)
    masked = 1 - store.trainable_counts.sum() / store.lengths.sum()
    assert masked == pytest.approx(0.6, abs=0.05)
    assert store.lengths.sum() >= 40 * 512
    made = (folder / "options.json").stat().st_mtime_ns
    assert workload.prepare_rows(options, tmp_path) == folder
    assert (folder / "options.json").stat().st_mtime_ns == made
    whole = workload.prepare_rows(workload.RowOptions(300, 512, 3, 1, median=0), tmp_path)
    assert set(workload.store_of(whole).lengths.tolist()) == {512}


def test_useful_operations_follow_the_parameters(workload: ModuleType) -> None:
    shape = workload.SHAPES["135m"]
    assert shape.layer_parameters == 30 * (576 * 576 * 2 + 576 * 192 * 2 + 3 * 576 * 1536)
    flops = shape.useful_flops(1000, 400, 0.0)
    assert flops == 6 * (1000 * shape.layer_parameters + 400 * 576 * 49152)
    assert workload.SHAPES["8b-lora"].useful_flops(10, 4, 0.0) == 4 * (
        10 * workload.SHAPES["8b-lora"].layer_parameters + 4 * 4096 * 128256
    )
    # One document of 1,000 tokens: half of the score matrix, twice two products for three passes.
    assert shape.useful_flops(0, 0, 1e6) == pytest.approx(30 * 576 * 3 * 2 * 2 * 1e6 / 2)


def test_a_run_rewrites_its_own_section_only(workload: ModuleType) -> None:
    import tables  # type: ignore[import-not-found]  # a script's neighbour

    page = "# Benchmarks\n\n<!-- a -->\nold\n<!-- /a -->\n\n<!-- b -->\nkept\n<!-- /b -->\n"
    page = tables.replace_section(page, "a", "new")
    assert page == "# Benchmarks\n\n<!-- a -->\nnew\n<!-- /a -->\n\n<!-- b -->\nkept\n<!-- /b -->\n"
    assert tables.replace_section("# Benchmarks\n", "c", "x") == "# Benchmarks\n\n<!-- c -->\nx\n<!-- /c -->\n"
    assert tables.spread([3.0, 1.0, 2.0]) == "2.00 (1.00 to 3.00)"
