"""What a process of a sharded run has in memory of its own: its part, where the model is split while it is loaded.

Counted are pages that belong to the process alone (RssAnon): those of files are shared by all processes of a machine.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from eft.config.parallel import ParallelConfig
from eft.models.adapters import set_dtypes
from eft.parallel.engine import load_time_sharding
from eft.parallel.plan import Degrees
from eft.parallel.state_dict import fill_whole, full_tensors, keep_in_file
from tests.distributed.ranks import Ranks, ranks

MIB = 2**20
SHAPE = LlamaConfig(
    vocab_size=2048,
    hidden_size=512,
    intermediate_size=2048,
    num_hidden_layers=6,
    num_attention_heads=8,
    tie_word_embeddings=False,
)
IN_PARTS: dict[str, dict[str, Any]] = {
    "FSDP2 in parts": {"fsdp_config": {"cpu_ram_efficient_loading": True}},
    "TP": {"tensor_parallel_size": 2},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bf16 model of 27 million weights, 104 MiB in fp32."""
    path = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    LlamaForCausalLM(SHAPE).to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def fresh() -> Iterator[Ranks]:
    """Two ranks that were not forked: a model would lie in what this process has free."""
    with ranks(2, "spawn") as group:
        yield group


def own_memory() -> float:
    """MiB that belong to this process alone."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is free is not in use
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def load(folder: Path, keys: dict[str, Any]) -> Any:
    parallel = ParallelConfig(**keys)
    with torch.device("meta"):
        split = load_time_sharding(parallel, Degrees.resolve(2, parallel), LlamaForCausalLM(SHAPE))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", distributed_config=split)
    set_dtypes(model)
    return model


def memory_of_loading(rank: int, folder: Path, keys: dict[str, Any]) -> tuple[float, float]:
    """MiB of the model's weights in fp32, and what this process has more in memory once it is ready to train them."""
    before = own_memory()
    model = load(folder, keys)
    more = own_memory() - before
    return sum(parameter.numel() for parameter in model.parameters()) * 4 / MIB, more


@pytest.mark.parametrize("mode", IN_PARTS)
def test_a_process_holds_its_part_only(mode: str, fresh: Ranks, folder: Path) -> None:
    for whole, more in fresh.run(memory_of_loading, folder, IN_PARTS[mode]):
        assert whole > 100
        assert 0.45 * whole < more < 0.65 * whole


def test_without_parts_a_process_holds_the_whole(fresh: Ranks, folder: Path) -> None:
    """What the test above is measured against."""
    for whole, more in fresh.run(memory_of_loading, folder, {"fsdp_version": 2}):
        assert more > 0.95 * whole


def gather(rank: int, folder: Path, keys: dict[str, Any], disk: Path) -> tuple[float, bool, list[str]]:
    """MiB that rank 0 has more in memory of its own with the whole model than before; whether that is exact."""
    model = load(folder, keys)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.001)  # no bf16 number any more
    before = own_memory()
    whole = None
    if rank == 0:
        whole = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        keep_in_file(whole, disk, lambda tensor: torch.float32)
    fill_whole(model, whole)
    more = own_memory() - before
    pairs = [(tensor, None if whole is None else whole.state_dict()[name]) for name, tensor in full_tensors(model)]
    return more, all(mine is None or torch.equal(tensor, mine) for tensor, mine in pairs), [*map(str, disk.iterdir())]


@pytest.mark.parametrize("mode", IN_PARTS)
def test_gathering_the_whole_model_takes_memory_for_one_tensor(
    mode: str, fresh: Ranks, folder: Path, tmp_path: Path
) -> None:
    largest = SHAPE.hidden_size * SHAPE.intermediate_size * 4 / MIB
    for more, exact, left in fresh.run(gather, folder, IN_PARTS[mode], tmp_path):
        assert more < 4 * largest
        assert exact
        assert left == []
