"""Where the tensors of this process lie within the whole ones that a checkpoint holds.

A checkpoint has one format, whatever trained it: whole tensors under fully qualified names, in safetensors files of
bounded size, byte for byte the same on one process, with DDP, sharded or split. So a sharded run gathers one tensor at
a time when it saves, and reads only its own slices when it loads. `Sharding` is all that saving and loading know of it.

To plug in DTensors (FSDP2, HSDP, tensor parallelism): write a class with these members and hand it to
`CheckpointStore(sharding=...)` on every rank.

    whole_shape  live.shape (a DTensor's shape is that of the whole)
    whole        live.full_tensor() for a DTensor, else live; a collective, called on every rank for the same names in
                 the same order, always in the main thread, one tensor at a time. Where the copy lies does not matter.
    part         the slices of the whole that lie here, one per dimension; () for a tensor that is here as a whole
    local        live.to_local() for a DTensor, else live: the memory that loading fills, of the shape of `part`
    like         a DTensor of the parameter's mesh and placements around `part` (DTensor.from_local): optimizer state
    by_parameter the optimizer itself; loaded: nothing

The optimizer's state of a parameter is sharded like the parameter where it has the parameter's shape, and whole on
every rank otherwise (step counts). Everything else is done: the files are shared out over the ranks (file number k to
rank k mod world size), each rank writes its files and its generators beside the training into a folder of its own, and
rank 0 moves them into the checkpoint. That takes an output folder that all ranks see.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

Index = tuple[slice | tuple[slice, ...], ...] | slice
"""Slices of a whole tensor with plain bounds, one per dimension, or several one after the other; () is all of it. One
slice alone: of its flattened numbers."""


class Sharding(Protocol):
    """How the live tensors of one process relate to the whole ones. `name` is fully qualified."""

    @property
    def rank(self) -> int:
        """Of this process, 0 ≤ rank < world_size."""
        ...

    @property
    def world_size(self) -> int:
        """Processes that save and load together."""
        ...

    def whole_shape(self, name: str, live: Tensor) -> torch.Size:
        """The shape of the whole tensor."""
        ...

    def whole(self, name: str, live: Tensor) -> Tensor:
        """The whole tensor, `live` itself where it is whole already. Every rank calls it, in the same order."""
        ...

    def part(self, name: str, live: Tensor) -> Index:
        """Which part of the whole lies here."""
        ...

    def local(self, name: str, live: Tensor) -> Tensor:
        """The memory of that part."""
        ...

    def like(self, name: str, parameter: Tensor, part: Tensor) -> Tensor:
        """State `name` (`parameter/state`) of `parameter`, of which `part` was read, as its optimizer keeps it."""
        ...

    def by_parameter(self, optimizer: Optimizer) -> AbstractContextManager[Optimizer]:
        """Inside it the optimizer's groups and state are those of the model's own parameters."""
        ...

    def loaded(self, model: nn.Module) -> None:
        """The weights of `model` were filled."""
        ...


@dataclass(frozen=True)
class Replicas:
    """Every process holds every tensor whole: one process, or DDP."""

    rank: int = 0
    world_size: int = 1

    def whole_shape(self, name: str, live: Tensor) -> torch.Size:
        """Its own."""
        return live.shape

    def whole(self, name: str, live: Tensor) -> Tensor:
        """Itself."""
        return live

    def part(self, name: str, live: Tensor) -> Index:
        """All of it."""
        return ()

    def local(self, name: str, live: Tensor) -> Tensor:
        """Itself."""
        return live

    def like(self, name: str, parameter: Tensor, part: Tensor) -> Tensor:
        """Itself, on the parameter's device."""
        return part.to(parameter.device)

    def by_parameter(self, optimizer: Optimizer) -> AbstractContextManager[Optimizer]:
        """Itself."""
        return nullcontext(optimizer)

    def loaded(self, model: nn.Module) -> None:
        """Nothing follows."""


ONE_PROCESS = Replicas()
