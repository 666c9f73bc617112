"""A save of a sharded model has one file's tensors in memory and one tensor more, however large the model is."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from eft.runtime.draft import Draft
from eft.runtime.sharding import Replicas
from eft.runtime.tensors import TensorFiles
from eft.runtime.weights import add_weights

ROWS, COLUMNS, LAYERS = 64, 256, 24
TENSOR_BYTES = ROWS * COLUMNS * 4
SHARD_BYTES = 4 * TENSOR_BYTES


@dataclass(frozen=True)
class Counted(Replicas):
    """Every tensor lies in parts: a gathered one is new memory, counted while anybody keeps it."""

    held: dict[str, int] = field(default_factory=lambda: {"now": 0, "peak": 0})

    def whole(self, name: str, live: Tensor) -> Tensor:
        gathered = live.clone()
        self.held["now"] += gathered.nbytes
        self.held["peak"] = max(self.held.values())
        weakref.finalize(gathered, self._let_go, gathered.nbytes)
        return gathered

    def _let_go(self, size: int) -> None:
        self.held["now"] -= size


@pytest.mark.parametrize("rank", [0, 1])
def test_a_save_holds_one_file_and_one_tensor(rank: int, tmp_path: Path) -> None:
    model = nn.Sequential(*(nn.Linear(COLUMNS, ROWS, bias=False) for _ in range(LAYERS)))
    sharding = Counted(rank, 2)
    draft = Draft(None, sharding, SHARD_BYTES)
    add_weights(draft, model)
    assert sharding.held["peak"] == 0
    draft.write(tmp_path)
    assert TENSOR_BYTES * LAYERS > 4 * SHARD_BYTES
    assert sharding.held == {"now": 0, "peak": sharding.held["peak"]}
    assert sharding.held["peak"] <= SHARD_BYTES + TENSOR_BYTES
    written = sorted(tmp_path.glob("*.safetensors"))
    assert len(written) == 3
    for path in written:
        files = TensorFiles(path)
        assert all(torch.equal(files.read(name), model.state_dict()[name]) for name in files.names)
