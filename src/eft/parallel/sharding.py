"""Where the parts of DTensors lie (FSDP2, HSDP, tensor parallelism): what saving and loading ask of them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard
from torch.optim import Optimizer

from eft.parallel.state_dict import forget_gathered

Index = tuple[slice | tuple[slice, ...], ...]
"""As `runtime.sharding.Index`."""


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

    def part(self, name: str, live: Tensor) -> Index:
        """The slices that lie here; () for a plain tensor.

        Several of one dimension where fused matrices (gate and up) are split each for itself.
        """
        if not isinstance(live, DTensor):
            return ()
        shape, offset = compute_local_shape_and_global_offset(live.shape, live.device_mesh, live.placements)
        # The offset of an empty shard may lie beyond the end.
        starts = (min(start, size) for start, size in zip(offset, live.shape, strict=True))
        parts = [slice(start, start + length) for start, length in zip(starts, shape, strict=True)]
        scattered = {entry.dim % live.ndim for entry in live.placements if isinstance(entry, _StridedShard)}
        return tuple(_runs(live, dim) if dim in scattered else whole for dim, whole in enumerate(parts))

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

    def by_parameter(self, optimizer: Optimizer) -> AbstractContextManager[Optimizer]:
        """Itself."""
        return nullcontext(optimizer)

    def loaded(self, model: nn.Module) -> None:
        """The next forward pass must gather anew."""
        forget_gathered(model)


def _runs(live: DTensor, dim: int) -> slice | tuple[slice, ...]:
    """What of dimension `dim` lies here: found by splitting a small tensor of indices in the same way."""
    shape = [live.device_mesh.size()] * live.ndim
    shape[dim] = live.shape[dim]
    indices = torch.arange(live.shape[dim], device=live.to_local().device)
    indices = indices.view([-1 if axis == dim else 1 for axis in range(live.ndim)]).expand(shape)
    split = distribute_tensor(indices, live.device_mesh, live.placements, src_data_rank=None).to_local()
    here = split.movedim(dim, 0).flatten(1)[:, 0].tolist()
    ends = [place + 1 for place, index in enumerate(here) if here[place + 1 : place + 2] != [index + 1]]
    runs = tuple(slice(here[start], here[end - 1] + 1) for start, end in zip([0, *ends], ends, strict=False))
    return runs[0] if len(runs) == 1 else runs
