"""E3 across topologies: saved by some processes, continued by others, what follows is what one process does."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from eft.core.hashing import hash_file
from eft.runtime.checkpoint import verify_manifest
from tests.distributed.ranks import Ranks
from tests.distributed.training import STEPS, Trained, differences, save_again, settings, train
from tests.functional.reference import token_rows

MIDDLE = 5
WAYS: dict[str, dict[str, Any]] = {
    "one": {},
    "DDP": {},
    "FSDP2": {"fsdp_version": 2},
    "HSDP": {"dp_shard_size": 2, "dp_replicate_size": 2},
    "CP": {"context_parallel_size": 2},
    "FSDP2 in parts": {"fsdp_config": {"cpu_ram_efficient_loading": True}},
    "TP": {"tensor_parallel_size": 2},
    "TP × FSDP2": {"tensor_parallel_size": 2, "fsdp_version": 2},
}
KEYS: dict[str, Any] = {"save_strategy": "steps", "save_steps": 100}


def slow(value: str) -> Any:
    """A parameter that only the long run of the tests tries."""
    return pytest.param(value, marks=pytest.mark.slow)


@cache
def alone(kind: str) -> Trained:
    return train(0, kind, settings(Path("/tmp/eft-alone-writes-nothing")))


def run(group: Ranks | None, kind: str, folder: Path, way: str, **options: Any) -> Trained:
    keys = settings(folder, **KEYS, **WAYS[way])
    if group is None:
        return train(0, kind, keys, None, options.get("resume"), options.get("stop_after"))
    return group.run(train, kind, keys, None, options.get("resume"), options.get("stop_after"))[0]  # type: ignore[no-any-return]


def check(kind: str, ways: list[tuple[str, Ranks | None]], tmp_path: Path) -> None:
    """Stop after step 5 in the first way, after step 8 in the second, finish in the last."""
    stops, resume, start = [MIDDLE, 8], None, 0
    for number, (way, group) in enumerate(ways):
        stop = stops[number] if number + 1 < len(ways) else None
        folder = tmp_path / str(number)
        got = run(group, kind, folder, way, resume=resume, stop_after=stop)
        expected = alone(kind)
        end = stop or STEPS
        if stop is not None:
            expected, got = replace(expected, weights={}), replace(got, weights={})
        until = replace(expected, losses=expected.losses[:end], norms=expected.norms[:end])
        assert differences(got, until, start=start) == []
        if stop is not None:
            checkpoint = folder / f"checkpoint-{stop}"
            verify_manifest(checkpoint)
            assert set(load_file(checkpoint / weights_file(kind))) == names_of(kind, tmp_path)
            resume, start = str(checkpoint), stop


def weights_file(kind: str) -> str:
    return "adapter_model.safetensors" if kind.endswith("lora") else "model.safetensors"


def names_of(kind: str, tmp_path: Path) -> set[str]:
    """What one process saves: an adapter is complete, and never empty."""
    folder = tmp_path / "names"
    if not folder.exists():
        train(0, kind, settings(folder, **KEYS), None, None, 1)
    names = set(load_file(folder / "checkpoint-1" / weights_file(kind)))
    assert len(names) >= 12
    return names


@pytest.mark.parametrize("kind", [slow("llama"), "llama lora"])
def test_one_to_ddp_to_one(kind: str, two: Ranks, tmp_path: Path) -> None:
    check(kind, [("one", None), ("DDP", two), ("one", None)], tmp_path)


@pytest.mark.parametrize("kind", ["llama tied", slow("llama lora")])
def test_fsdp2_to_one_to_fsdp2(kind: str, two: Ranks, tmp_path: Path) -> None:
    check(kind, [("FSDP2", two), ("one", None), ("FSDP2", two)], tmp_path)


@pytest.mark.parametrize("way", ["DDP", slow("FSDP2")])
def test_the_same_processes_go_on_bit_for_bit_with_dropout(way: str, two: Ranks, tmp_path: Path) -> None:
    """An evaluation comes before the checkpoint: whatever it leaves behind would show in what follows."""
    held_out = token_rows(5, longest=24, seed=9)
    keys = {**KEYS, **WAYS[way], "test_datasets": [{"path": "given"}], "eval_steps": 3}
    folders = [settings(tmp_path / name, **keys) for name in ("straight", "cut")]
    straight = two.run(train, "llama lora dropout", folders[0], held_out)[0]
    two.run(train, "llama lora dropout", folders[1], held_out, None, MIDDLE)
    checkpoint = str(tmp_path / "cut" / f"checkpoint-{MIDDLE}")
    resumed = two.run(train, "llama lora dropout", folders[1], held_out, checkpoint)[0]
    assert resumed.losses == straight.losses[MIDDLE:]
    assert all(torch.equal(resumed.weights[name], tensor) for name, tensor in straight.weights.items())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "llama tied", "llama lora"])
@pytest.mark.parametrize("first", ["DDP", "FSDP2", "HSDP"])
def test_four_to_one_to_four(first: str, kind: str, four: Ranks, tmp_path: Path) -> None:
    others = {"DDP": "FSDP2", "FSDP2": "HSDP", "HSDP": "DDP"}
    check(kind, [(first, four), ("one", None), (others[first], four)], tmp_path)


@pytest.mark.slow
def test_context_parallel_to_sharded(two: Ranks, tmp_path: Path) -> None:
    check("llama", [("CP", two), ("FSDP2", two), ("CP", two)], tmp_path)


@pytest.mark.parametrize("kind", ["llama", slow("llama lora"), slow("qwen3_moe"), slow("qwen3 lora")])
def test_tensor_parallel_and_sharded_to_one_and_back(kind: str, four: Ranks, tmp_path: Path) -> None:
    check(kind, [("TP × FSDP2", four), ("one", None), ("TP × FSDP2", four)], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "llama lora", "qwen3_moe"])
def test_tensor_parallel_to_sharded_in_parts_and_back(kind: str, two: Ranks, tmp_path: Path) -> None:
    check(kind, [("TP", two), ("FSDP2 in parts", two), ("TP", two)], tmp_path)


@pytest.mark.parametrize("kind", [slow("llama tied"), "llama lora"])
def test_a_checkpoint_is_the_same_bytes_whoever_writes_it(kind: str, two: Ranks, tmp_path: Path) -> None:
    """What one process has written, two have read, each its parts, and written again: no bit is lost."""
    keys = {**KEYS, "max_steps": 3}
    train(0, kind, settings(tmp_path / "one", **keys))
    source = tmp_path / "one" / "checkpoint-3"
    for way in ("DDP", "FSDP2"):
        two.run(save_again, kind, settings(tmp_path / way, **keys, **WAYS[way]), str(source))
        written = tmp_path / way / "checkpoint-3"
        for name in (weights_file(kind), "optimizer.safetensors", "optimizer.json"):
            assert hash_file(written / name) == hash_file(source / name)
        more = {path.name for path in written.iterdir()} - {path.name for path in source.iterdir()}
        assert more == {"rng_1.json", "rng_1.safetensors"}
