"""Activations wait in host memory between forward and backward pass; the numbers stay the same.

What autograd saves is copied off the device when it is saved and back when the backward pass asks for it, in the same
dtype, shape and strides, so that the backward kernels compute the same bits. Copies run on the stream that computes,
which keeps them in order without waiting. Parameters stay where they are.

Inside non-reentrant gradient checkpointing, torch's own hooks come first: only what is saved outside it is offloaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

MIN_BYTES = 1 << 16
"""Smaller tensors stay on the device: a copy would cost more than the memory is worth."""


@dataclass
class OffloadCounters:
    """What was moved in one pass."""

    tensors: int = 0
    num_bytes: int = 0
    kept: int = 0
    """Saved tensors that stayed: parameters, small ones, those on another device."""


@dataclass(frozen=True)
class _Offloaded:
    """A saved tensor in host memory. `data` has length 1 where the tensor was expanded (stride 0)."""

    data: Tensor
    size: torch.Size
    device: torch.device


@contextmanager
def activation_offloading(
    enabled: bool,
    device: torch.device | None = None,
    *,
    parameters: Iterable[Tensor] = (),
    exercise: bool = False,
) -> Iterator[OffloadCounters]:
    """While active, tensors that autograd saves on `device` are kept in host memory.

    Args:
        enabled: off, this does nothing.
        device: whose tensors move; None: the current accelerator, if any. On the CPU there is nothing to move.
        parameters: these and their views stay.
        exercise: move CPU tensors of any size as well, into other CPU memory: the tests of the mechanism.

    Yields:
        Counters of this pass.
    """
    counters = OffloadCounters()
    cpu = torch.device("cpu")
    target = cpu if exercise else device or torch.accelerator.current_accelerator() or cpu
    if not enabled or (target.type == "cpu" and not exercise):
        yield counters
        return
    stays = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    min_bytes = 0 if exercise else MIN_BYTES

    def pack(tensor: Tensor) -> Tensor | _Offloaded:
        if tensor.device.type != target.type or tensor.nbytes < min_bytes or not _is_plain(tensor):
            counters.kept += 1
            return tensor.detach()  # the tensor itself would keep its own graph alive in a cycle
        if tensor.untyped_storage().data_ptr() in stays:
            counters.kept += 1
            return tensor.detach()
        counters.tensors += 1
        counters.num_bytes += tensor.nbytes
        return _to_host(tensor)

    with torch.autograd.graph.saved_tensors_hooks(pack, _to_device):
        yield counters


def _is_plain(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and tensor.numel() > 0 and type(tensor) in (Tensor, torch.nn.Parameter)


def _to_host(tensor: Tensor) -> _Offloaded:
    compact = tensor.detach()
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0 and tensor.size(dim) > 1:
            compact = compact.narrow(dim, 0, 1)
    # Exact strides, gaps included: another layout could make the backward pass pick another kernel.
    pinned = tensor.device.type == "cuda"
    host = torch.empty_strided(compact.size(), compact.stride(), dtype=tensor.dtype, device="cpu", pin_memory=pinned)
    host.copy_(compact, non_blocking=pinned)
    return _Offloaded(host, tensor.size(), tensor.device)


def _to_device(packed: Tensor | _Offloaded) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    data = packed.data
    fresh = torch.empty_strided(data.size(), data.stride(), dtype=data.dtype, device=packed.device)
    fresh.copy_(data, non_blocking=data.is_pinned())
    return fresh.expand(packed.size)
