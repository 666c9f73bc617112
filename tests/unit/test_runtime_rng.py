"""Random generators: captured and restored bit for bit, through files too."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eft.core.errors import CheckpointError
from eft.runtime.rng import capture_rng, load_rng, restore_rng, save_rng, seed_everything


@pytest.fixture(autouse=True)
def _own_generators() -> Iterator[None]:
    before = capture_rng()
    yield
    restore_rng(before)


def draw() -> list[float]:
    """A few numbers of each kind; odd counts of normals, so that cached halves matter."""
    numbers = [random.random(), random.gauss(0, 1), float(np.random.rand()), float(np.random.randn())]
    numbers += torch.rand(3).tolist() + torch.randn(17).tolist()
    numbers += [float(torch.nn.functional.dropout(torch.ones(50), 0.5).sum())]
    return numbers


@given(seed=st.integers(0, 2**32 - 1), before=st.integers(0, 3))
def test_capture_and_restore(seed: int, before: int) -> None:
    seed_everything(seed)
    for _ in range(before):
        draw()
    state = capture_rng()
    first = draw()
    assert draw() != first
    restore_rng(state)
    assert draw() == first
    restore_rng(state)  # the state itself was not used up
    assert draw() == first


def test_capturing_draws_nothing() -> None:
    seed_everything(5)
    expected = draw()
    seed_everything(5)
    capture_rng()
    assert draw() == expected


def test_through_files_without_pickle(tmp_path: Path) -> None:
    seed_everything(11)
    draw()
    random.gauss(0, 1)  # leaves a cached half
    np.random.randn()
    save_rng(tmp_path)
    expected = draw()
    assert load_rng(tmp_path)
    assert draw() == expected
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}


def test_each_rank_has_its_own(tmp_path: Path) -> None:
    expected = []
    for rank in range(2):
        seed_everything(rank)
        save_rng(tmp_path, rank=rank, world_size=2)
        expected.append(draw())
    for rank in range(2):
        assert load_rng(tmp_path, rank=rank, world_size=2)
        assert draw() == expected[rank]


def test_another_world_size_gets_distinct_reproducible_states(tmp_path: Path) -> None:
    seed_everything(3)
    save_rng(tmp_path, rank=0, world_size=1)
    drawn = []
    for rank in (0, 1, 2):
        assert not load_rng(tmp_path, rank=rank, world_size=3)
        drawn.append(draw())
    assert len({tuple(numbers) for numbers in drawn}) == 3
    assert not load_rng(tmp_path, rank=1, world_size=3)
    assert draw() == drawn[1]


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"rng_0\.json: missing"):
        load_rng(tmp_path)
    save_rng(tmp_path, world_size=2)
    with pytest.raises(CheckpointError, match=r"rng_1\.json: missing; rank 1's"):
        load_rng(tmp_path, rank=1, world_size=2)
    (tmp_path / "rng_0.json").write_text(json.dumps({"python": []}))
    with pytest.raises(CheckpointError, match="lacks numpy, world_size"):
        load_rng(tmp_path)
    (tmp_path / "rng_0.json").write_text("{")
    with pytest.raises(CheckpointError, match="broken"):
        load_rng(tmp_path)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_generators(tmp_path: Path) -> None:
    torch.rand(1, device="cuda")
    save_rng(tmp_path)
    expected = torch.randn(9, device="cuda")
    assert load_rng(tmp_path)
    assert torch.equal(torch.randn(9, device="cuda"), expected)
