"""The whole model's weights, whatever it is wrapped in."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from tempfile import NamedTemporaryFile

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from eft.core.atomic import TEMPORARY_MARK
from eft.parallel.deepspeed_state import is_partitioned, whole_parameter

_ALIGNMENT = 64


def unwrap(model: nn.Module) -> nn.Module:
    """The model as it was before DDP or `torch.compile` wrapped it; a PeftModel stays one."""
    inner: nn.Module = model
    while True:
        if isinstance(inner, DistributedDataParallel):
            inner = inner.module
        elif (compiled := _compiled(inner)) is not None:
            inner = compiled
        else:
            return inner


def _compiled(model: nn.Module) -> nn.Module | None:
    # torch.compile's wrapper has no public type; this is the one name it is documented to keep the original under.
    original = getattr(model, "_orig_mod", None)
    return original if isinstance(original, nn.Module) else None


def forget_gathered(model: nn.Module) -> None:
    """Drop whole copies of sharded weights that a forward pass has left behind, since a backward did not follow it.

    FSDP2 keeps those of the last layers for the backward pass. Whoever changes weights outside an update calls this, or
    the next forward pass computes with the old ones.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def is_sharded(model: nn.Module) -> bool:
    """Whether processes hold parts of this model's weights."""
    return any(isinstance(parameter, DTensor) or is_partitioned(parameter) for parameter in model.parameters())


def whole_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor of which this process may hold a part; a collective over the processes of its mesh."""
    if is_partitioned(tensor):
        return whole_parameter(tensor)
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def full_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the unwrapped model's state under its own name, whole, one after the other.

    Each process gets every tensor and must go through all of them. Where nothing is sharded they share memory with the
    model; else no more than one is whole at a time, unless the caller keeps it.
    """
    for name, tensor in unwrap(model).state_dict(keep_vars=True).items():
        yield name, whole_tensor(tensor).detach()


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """`full_tensors` all at once."""
    return dict(full_tensors(model))


def fill_whole(model: nn.Module, whole: nn.Module | None) -> None:
    """Copy the weights of a sharded `model` into `whole`, its like on one process; None where nothing is to be kept."""
    target = {} if whole is None else whole.state_dict()
    with torch.no_grad():
        for name, tensor in full_tensors(model):
            if whole is not None:
                target[name].copy_(tensor)


def keep_in_file(model: nn.Module, folder: Path, dtypes: Callable[[Tensor], torch.dtype]) -> None:
    """Move the parameters of `model`, without what they hold, into a file in `folder` that has no name.

    So a model that is filled tensor by tensor takes no memory of the process: the system writes its pages to the disk
    when it needs the room. `dtypes` says which dtype a parameter has from now on. Tied parameters stay tied.

    Raises:
        OSError: the disk is too full.
    """
    parameters = list(model.parameters())
    kinds = [dtypes(parameter) for parameter in parameters]
    exact = [parameter.numel() * kind.itemsize for parameter, kind in zip(parameters, kinds, strict=True)]
    sizes = [-(-size // _ALIGNMENT) * _ALIGNMENT for size in exact]
    with NamedTemporaryFile(dir=folder, prefix=TEMPORARY_MARK) as file:
        # Without the space a write to memory would be the end of the process.
        os.posix_fallocate(file.fileno(), 0, max(1, sum(sizes)))
        memory = torch.from_file(file.name, shared=True, size=sum(sizes), dtype=torch.uint8)
    starts = accumulate(sizes, initial=0)
    for parameter, kind, size, start in zip(parameters, kinds, exact, starts, strict=False):
        parameter.data = memory[start : start + size].view(kind).view(parameter.shape)
