"""One format whatever holds the tensors: files of bounded size, the same bytes on any number of processes."""

from __future__ import annotations

import json
import threading
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from eft.core.errors import CheckpointError
from eft.runtime import shares
from eft.runtime.checkpoint import CheckpointStore, verify_manifest
from eft.runtime.draft import Draft, TensorCopies, partition
from eft.runtime.rng import add_rng
from eft.runtime.sharding import Index
from eft.runtime.tensors import TensorFiles, same_bits
from tests.tiny_models import tiny_model

SHARD_BYTES = 20_000


@dataclass(frozen=True)
class Halves:
    """Two processes, each with half of the rows of every matrix and all of every vector. `wholes` plays the network."""

    rank: int
    wholes: dict[str, Tensor]
    world_size: int = 2

    def whole_shape(self, name: str, live: Tensor) -> torch.Size:
        return self.wholes[name].shape

    def whole(self, name: str, live: Tensor) -> Tensor:
        return self.wholes[name]

    def part(self, name: str, live: Tensor) -> Index:
        whole = self.wholes[name]
        if whole.dim() < 2:
            return ()
        half = len(whole) // 2
        rows = slice(0, half) if self.rank == 0 else slice(half, len(whole))
        return (rows, *(slice(0, size) for size in whole.shape[1:]))

    def local(self, name: str, live: Tensor) -> Tensor:
        return live

    def like(self, name: str, parameter: Tensor, part: Tensor) -> Tensor:
        return part

    def by_parameter(self, optimizer: torch.optim.Optimizer) -> AbstractContextManager[torch.optim.Optimizer]:
        return nullcontext(optimizer)

    def loaded(self, model: nn.Module) -> None:
        pass


class HalfModel(nn.Module):
    """What one of the two processes holds of `whole`."""

    def __init__(self, whole: nn.Module, rank: int) -> None:
        super().__init__()
        self.sharding = Halves(rank, {})
        for name, parameter in whole.named_parameters():
            flat = name.replace(".", "_")
            self.sharding.wholes[flat] = parameter.detach()
            self.register_parameter(flat, nn.Parameter(parameter.detach()[self.sharding.part(flat, parameter)].clone()))


class WholeModel(nn.Module):
    """`whole` under the same names."""

    def __init__(self, whole: nn.Module) -> None:
        super().__init__()
        for name, parameter in whole.named_parameters():
            self.register_parameter(name.replace(".", "_"), nn.Parameter(parameter.detach().clone()))


def stepped(model: nn.Module, gradient: dict[str, Tensor]) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for name, parameter in model.named_parameters():
        parameter.grad = gradient[name].clone()
    optimizer.step()
    return optimizer


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def save(store: CheckpointStore, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    def fill(draft: Draft) -> None:
        store.add_weights(draft, model)
        store.add_optimizer(draft, model, optimizer)
        add_rng(draft, rank=store.sharding.rank, world_size=store.sharding.world_size)

    store.save(1, None, {}, keep=False, fill=fill)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_two_processes_write_the_bytes_of_one(tmp_path: Path, asynchronous: bool) -> None:
    torch.manual_seed(1)
    base = tiny_model("llama")
    whole = WholeModel(base)
    gradient = {name: torch.randn_like(parameter) for name, parameter in whole.named_parameters()}
    optimizer = stepped(whole, gradient)
    alone = CheckpointStore(tmp_path / "one", save_total_limit=None, shard_bytes=SHARD_BYTES)
    save(alone, whole, optimizer)

    names = {id(parameter): name for name, parameter in whole.named_parameters()}
    wholes = {
        f"{names[id(parameter)]}/{key}": value for parameter, s in optimizer.state.items() for key, value in s.items()
    }
    weights = {name: parameter.detach() for name, parameter in whole.named_parameters()}
    stores, models = [], []
    for rank in (0, 1):
        half = HalfModel(whole, rank)
        half.sharding.wholes.update(wholes | weights)
        halves = stepped(HalfModel(base, rank), {n: g[half.sharding.part(n, g)] for n, g in gradient.items()})
        # The parameters have stepped with the whole model; only the state is taken over.
        state = dict(zip(half.parameters(), halves.state.values(), strict=True))
        mine = torch.optim.AdamW(half.parameters(), lr=0.1)
        mine.state.update(state)
        stores.append(
            CheckpointStore(
                tmp_path / "two",
                save_total_limit=None,
                asynchronous=asynchronous,
                sharding=half.sharding,
                shard_bytes=SHARD_BYTES,
            )
        )
        models.append((half, mine))
    other = threading.Thread(target=lambda: (save(stores[1], *models[1]), stores[1].wait()))
    other.start()
    save(stores[0], *models[0])
    stores[0].wait()
    other.join()

    one, two = bytes_of(tmp_path / "one" / "checkpoint-1"), bytes_of(tmp_path / "two" / "checkpoint-1")
    own = {"manifest.json", "rng_0.json", "rng_1.json", "rng_1.safetensors"}
    assert {name: data for name, data in one.items() if name not in own} == {
        name: data for name, data in two.items() if name not in own
    }
    assert sum(name.startswith("model-") for name in one) > 2
    assert sum(name.startswith("optimizer-") for name in one) > 3
    verify_manifest(tmp_path / "two" / "checkpoint-1")
    assert not list((tmp_path / "two").glob(".tmp-*"))

    for rank, (half, mine) in enumerate(models):
        kept = {name: parameter.detach().clone() for name, parameter in half.named_parameters()}
        moments = {name: dict(mine.state[p]) for name, p in half.named_parameters()}
        mine.state.clear()
        with torch.no_grad():
            for parameter in half.parameters():
                parameter.zero_()
        folder = tmp_path / ("one" if rank else "two") / "checkpoint-1"
        stores[rank].load_weights(folder, half)
        stores[rank].load_optimizer(folder, half, mine)
        for name, parameter in half.named_parameters():
            assert same_bits(parameter, kept[name])
            for key, value in moments[name].items():
                assert same_bits(mine.state[parameter][key], value), f"{name} {key}"


def test_plain_transformers_reads_the_shards(tmp_path: Path) -> None:
    model = tiny_model("llama")
    store = CheckpointStore(tmp_path, save_total_limit=None, shard_bytes=SHARD_BYTES)
    store.save(1, None, {}, keep=False, fill=lambda draft: store.add_weights(draft, model))
    folder = store.path(1)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    assert all(path.stat().st_size < 2 * SHARD_BYTES for path in folder.glob("model-*"))
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    assert all(same_bits(loaded[name], value) for name, value in model.state_dict().items())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    store.load_weights(folder, model)
    assert all(same_bits(value, before[name]) for name, value in model.state_dict().items())

    next(folder.glob("model-00002*")).unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-.*missing"):
        store.load_weights(folder, model)


def test_a_shard_of_another_model_is_found(tmp_path: Path) -> None:
    draft = Draft(shard_bytes=40)
    draft.add_tensors("m.safetensors", {"a": torch.ones(8), "b": torch.ones(8)})
    draft.write(tmp_path)
    (tmp_path / "m-00001-of-00002.safetensors").write_bytes((tmp_path / "m-00002-of-00002.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="lacks 1 tensor: a"):
        TensorFiles(tmp_path / "m.safetensors")
    (tmp_path / "m.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"index\.json: broken"):
        TensorFiles(tmp_path / "m.safetensors")


def test_one_tensor_at_a_time_is_gathered_in_every_rank_s_order(tmp_path: Path) -> None:
    """The collectives must be the same on every rank, whoever writes the file, and even where nothing is written."""
    orders = []

    class Listening(Halves):
        def whole(self, name: str, live: Tensor) -> Tensor:
            orders[-1].append(name)
            return super().whole(name, live)

    tensors = {name: torch.ones(4, 4) for name in "badc"}
    for rank, copies, folder in ((0, None, True), (1, None, True), (0, None, False), (1, TensorCopies(), True)):
        orders.append([])
        draft = Draft(copies, Listening(rank, tensors), shard_bytes=128)
        draft.add_tensors("m.safetensors", tensors)
        draft.finish()
        target = tmp_path / f"{len(orders)}"
        target.mkdir()
        draft.write(target if folder else None)
        written = {path.name for path in target.iterdir()}
        shards = {f"m-0000{rank + 1}-of-00002.safetensors"} if folder else set()
        assert written == shards | ({"m.safetensors.index.json"} if folder and rank == 0 else set())
    assert orders == [list("abcd")] * 4


def test_a_share_that_fails_ends_the_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shares, "WAIT_S", 5.0)
    tensors = {"a": torch.ones(4, 4), "b": torch.ones(4, 4)}
    stores = [CheckpointStore(tmp_path, save_total_limit=1, sharding=Halves(rank, tensors)) for rank in (0, 1)]

    def fill(draft: Draft) -> None:
        if draft.sharding.rank == 1:
            draft.add_own_tensors("own.safetensors", {"a": torch.ones(1)})
            draft._others.append(lambda folder: (_ for _ in ()).throw(PermissionError("planted")))
        draft.add_tensors("m.safetensors", tensors)

    with pytest.raises(PermissionError):
        stores[1].save(3, None, {}, keep=False, fill=fill)
    with pytest.raises(CheckpointError, match="process 1 failed: PermissionError: planted"):
        stores[0].save(3, None, {}, keep=False, fill=fill)
    assert stores[0].steps() == []
    monkeypatch.setattr(shares, "WAIT_S", 0.1)
    with pytest.raises(CheckpointError, match="nothing came from process 1"):
        stores[0].save(4, None, {}, keep=False, fill=fill)
    assert stores[0].steps() == []


def test_a_kept_checkpoint_takes_no_shares(tmp_path: Path) -> None:
    tensors: dict[str, Any] = {"a": torch.ones(4, 4)}
    stores = [CheckpointStore(tmp_path, save_total_limit=1, sharding=Halves(rank, tensors)) for rank in (0, 1)]
    for _ in range(2):
        for store in reversed(stores):
            store.save(3, None, {}, keep=True, fill=lambda draft: draft.add_tensors("m.safetensors", tensors))
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-3", "saves.jsonl"}


@given(st.lists(st.integers(0, 50), max_size=30), st.integers(1, 60))
def test_partition(sizes: list[int], limit: int) -> None:
    named = {f"{number:03}": size for number, size in enumerate(sizes)}
    parts = partition(named, limit)
    assert [name for part in parts for name in part] == list(named)
    for part in parts:
        assert len(part) <= 1 or sum(named[name] for name in part) <= limit
    for part, following in pairwise(parts):
        assert part
        assert sum(named[name] for name in part) + named[following[0]] > limit
