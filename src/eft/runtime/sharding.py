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

The optimizer's state of a parameter is sharded like the parameter where it has the parameter's shape, and whole on
every rank otherwise (step counts). Everything else is done: the files are shared out over the ranks (file number k to
rank k mod world size), each rank writes its files and its generators beside the training into a folder of its own, and
rank 0 moves them into the checkpoint. That takes an output folder that all ranks see.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Index = tuple[slice, ...]
"""Slices of a whole tensor, one per dimension, with plain bounds; () is all of it."""


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
        """State of `parameter`, of which `part` was read (`part(name, parameter)`), as its optimizer keeps it."""
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


ONE_PROCESS = Replicas()
