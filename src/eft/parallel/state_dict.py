"""The whole model's weights, whatever it is wrapped in."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel


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


def is_sharded(model: nn.Module) -> bool:
    """Whether processes hold parts of this model's weights."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def whole_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor of which this process may hold a part; a collective over the processes of its mesh."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def full_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the unwrapped model's state under its own name, whole, one after the other.

    Each process gets every tensor and must go through all of them. Where nothing is sharded they share memory with the
    model; else no more than one is whole at a time, unless the caller keeps it.
    """
    for name, tensor in unwrap(model).state_dict().items():
        yield name, whole_tensor(tensor)


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
