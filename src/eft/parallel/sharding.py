"""Where the parts of DTensors lie (FSDP2, HSDP, tensor parallelism): what saving and loading ask of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


@dataclass(frozen=True)
class TensorShards:
    """`runtime.sharding.Sharding` of DTensors; plain tensors are whole on every process."""

    rank: int
    world_size: int

    def whole_shape(self, name: str, live: Tensor) -> torch.Size:
        """A DTensor has the shape of the whole."""
        return live.shape

    def whole(self, name: str, live: Tensor) -> Tensor:
        """All of it, gathered from the processes of its mesh."""
        return live.full_tensor() if isinstance(live, DTensor) else live

    def part(self, name: str, live: Tensor) -> tuple[slice, ...]:
        """The slices that lie here; () for a plain tensor."""
        if not isinstance(live, DTensor):
            return ()
        shape, offset = compute_local_shape_and_global_offset(live.shape, live.device_mesh, live.placements)
        # The offset of an empty shard may lie beyond the end.
        starts = (min(start, size) for start, size in zip(offset, live.shape, strict=True))
        return tuple(slice(start, start + length) for start, length in zip(starts, shape, strict=True))

    def local(self, name: str, live: Tensor) -> Tensor:
        """The memory of that part."""
        return live.to_local() if isinstance(live, DTensor) else live

    def like(self, name: str, parameter: Tensor, part: Tensor) -> Tensor:
        """State of `parameter`: in parts as it is."""
        if not isinstance(parameter, DTensor):
            return part.to(parameter.device)
        return DTensor.from_local(
            part.to(parameter.to_local().device),
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )
