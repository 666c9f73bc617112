"""Activations wait in host memory between forward and backward pass; the numbers stay the same.

What autograd saves is copied off the device when it is saved and back before the backward pass asks for it, in the same
dtype, shape and strides, so that the backward kernels compute the same bits. Parameters and their views stay where they
are; what is saved twice travels once.

On CUDA the copies run on a stream of their own. A tensor's memory is given back only after the computing stream has
been made to wait for its copy, so nothing can be overwritten while it is still being read; at most `WINDOW_BYTES` are
on their way out. What was saved last is needed first and never leaves; in the backward pass the next `WINDOW_BYTES`
are fetched ahead.

With activation checkpointing the inputs of the recomputed layers are what is saved, and what travels.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

MIN_BYTES = 1 << 18
"""Smaller tensors stay on the device: a copy would cost more than the memory is worth."""
WINDOW_BYTES = 1 << 28
"""Bytes of tensors in flight: leaving, or fetched ahead."""


@dataclass
class OffloadCounters:
    """What was moved in one pass, forward and backward."""

    tensors: int = 0
    """Copied to the host, each once."""
    num_bytes: int = 0
    kept: int = 0
    """Saved tensors that stayed: parameters, small ones, those on another device or beyond the host's share."""
    shared: int = 0
    """Saved again, unchanged: no second copy."""
    fetched: int = 0
    """Copied back."""
    stayed: int = 0
    """Needed again before the copy had replaced the original."""


class Copies(Protocol):
    """Copies between a device and the host. A token stands for a copy that was started."""

    def out(self, tensor: Tensor) -> tuple[Tensor, Any]:
        """Start a copy to the host, strides included."""
        ...

    def back(self, host: Tensor, device: torch.device) -> tuple[Tensor, Any]:
        """Start a copy to `device`, strides included."""
        ...

    def wait(self, token: Any) -> None:
        """Whatever is computed from now on happens after that copy."""
        ...


class PlainCopies:
    """Copies that are over when they return."""

    def out(self, tensor: Tensor) -> tuple[Tensor, Any]:
        """See `Copies`."""
        return self.back(tensor, torch.device("cpu"))

    def back(self, host: Tensor, device: torch.device) -> tuple[Tensor, Any]:
        """See `Copies`."""
        return torch.empty_strided(host.size(), host.stride(), dtype=host.dtype, device=device).copy_(host), None

    def wait(self, token: Any) -> None:
        """Nothing to wait for."""


class CudaCopies:
    """Copies on a stream of their own, through page-locked host memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def out(self, tensor: Tensor) -> tuple[Tensor, Any]:
        """See `Copies`. The caller holds `tensor` until it has waited."""
        host = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, pin_memory=True)
        return host, self._copy(host, tensor)

    def back(self, host: Tensor, device: torch.device) -> tuple[Tensor, Any]:
        """See `Copies`."""
        # Allocated for the computing stream: the copy waits for whatever used this memory before.
        fresh = torch.empty_strided(host.size(), host.stride(), dtype=host.dtype, device=device)
        return fresh, self._copy(fresh, host)

    def wait(self, token: Any) -> None:
        """See `Copies`."""
        torch.cuda.current_stream(self._device).wait_event(token)

    def _copy(self, target: Tensor, source: Tensor) -> Any:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        return self._stream.record_event()


class _Saved:
    """A tensor that autograd saved, on its way to the host, there, or back."""

    def __init__(self, owner: _Pass, place: int, tensor: Tensor, size: torch.Size) -> None:
        """`tensor` has length 1 where the saved one, of `size`, was expanded (stride 0)."""
        self.owner = owner
        self.place = place
        self.size = size
        self.device = tensor.device
        self.num_bytes = tensor.nbytes
        self.uses = 1
        """How often autograd saved it, less how often it has asked for it."""
        self.present: Tensor | None = tensor
        """On the device: the original, or the copy that came back."""
        self.is_original = True
        self.host, self.token = owner.copies.out(tensor)

    def leave(self) -> None:
        """Let go of the original, once the copy is sure to be read before anything else."""
        if self.is_original:
            self._settle()
            self.present, self.is_original = None, False

    def fetch(self) -> None:
        """Start the way back, unless it is here."""
        if self.present is None:
            self.present, self.token = self.owner.copies.back(self.host, self.device)
            self.owner.counters.fetched += 1

    def take(self) -> Tensor:
        """The tensor as it was saved."""
        self.owner.counters.stayed += self.is_original
        self.fetch()
        if not self.is_original:
            self._settle()
        present = self.present
        assert present is not None
        self.uses -= 1
        if self.uses <= 0 and not self.is_original:
            self.present = None  # autograd holds it now
        return present.expand(self.size)

    def _settle(self) -> None:
        if self.token is not None:
            self.owner.copies.wait(self.token)
            self.token = None

    def __del__(self) -> None:
        # Fetched ahead and never asked for: its memory must not be used while the copy still writes to it.
        if not self.is_original:
            self._settle()


class _Pass:
    """One forward pass and its backward pass. Holds what it saved by weak references only: autograd owns it."""

    def __init__(self, copies: Copies, counters: OffloadCounters, window: int, host_limit: int | None) -> None:
        self.copies = copies
        self.counters = counters
        self._window = window
        self._host_limit = host_limit
        self._saved: list[tuple[int, weakref.ref[_Saved]]] = []
        self._leaving: deque[weakref.ref[_Saved]] = deque()
        self._leaving_bytes = 0
        self._known: weakref.WeakValueDictionary[tuple[Any, ...], _Saved] = weakref.WeakValueDictionary()
        self._storages: dict[int, StorageWeakRef] = {}

    def has_room(self, num_bytes: int) -> bool:
        """Whether the host may take so much more."""
        return self._host_limit is None or self.counters.num_bytes + num_bytes <= self._host_limit

    def save(self, tensor: Tensor) -> _Saved:
        """Send `tensor` to the host, or find that it was sent before."""
        key = self._key(tensor)
        known = self._known.get(key)
        if known is not None:
            known.uses += 1
            self.counters.shared += 1
            return known
        saved = _Saved(self, len(self._saved), _compact(tensor), tensor.size())
        self._known[key] = saved
        self._saved.append((saved.num_bytes, weakref.ref(saved)))
        self.counters.tensors += 1
        self.counters.num_bytes += saved.num_bytes
        self._leaving.append(weakref.ref(saved))
        self._leaving_bytes += saved.num_bytes
        while self._leaving_bytes > self._window:
            self._leave_oldest()
        return saved

    def restore(self, saved: _Saved) -> Tensor:
        """The tensor, after the ones that are needed next were asked for."""
        saved.fetch()
        self._fetch_ahead(saved.place)
        return saved.take()

    def end_forward(self) -> None:
        """Nothing more is saved: forget what was only needed to recognise a tensor."""
        self._known.clear()
        self._storages.clear()

    def _leave_oldest(self) -> None:
        oldest = self._leaving.popleft()()
        if oldest is None:
            # Autograd has let go of it; how large it was is not known any more, so count anew.
            self._leaving_bytes = sum(saved.num_bytes for reference in self._leaving if (saved := reference()))
        else:
            self._leaving_bytes -= oldest.num_bytes
            oldest.leave()

    def _fetch_ahead(self, place: int) -> None:
        """Backward passes go from the last saved to the first."""
        ahead = 0
        for index in range(place - 1, -1, -1):
            num_bytes, reference = self._saved[index]
            saved = reference()
            if saved is None or saved.uses <= 0:
                continue
            ahead += num_bytes
            if ahead > self._window:
                return
            saved.fetch()

    def _key(self, tensor: Tensor) -> tuple[Any, ...]:
        """Equal for the same elements of the same storage, not written to in between."""
        reference = StorageWeakRef(tensor.untyped_storage())
        # Holding a weak reference keeps the number from being given to another storage.
        self._storages.setdefault(reference.cdata, reference)
        place = (tensor.storage_offset(), tensor.size(), tensor.stride(), tensor.dtype)
        return (reference.cdata, *place, tensor._version)


@contextmanager
def activation_offloading(
    enabled: bool,
    device: torch.device | None = None,
    *,
    parameters: Iterable[Tensor] = (),
    host_limit: int | None = None,
    exercise: bool = False,
) -> Iterator[OffloadCounters]:
    """While active, tensors that autograd saves on `device` are kept in host memory.

    Args:
        enabled: off, this does nothing.
        device: whose tensors move; None: the current accelerator, if any. On the CPU there is nothing to move.
        parameters: these and their views stay.
        host_limit: bytes that may lie in host memory at once; what is saved beyond them stays. None: no limit.
        exercise: move CPU tensors of any size as well, into other CPU memory: the tests of the mechanism.

    Yields:
        Counters of this pass; the backward pass still adds to them.
    """
    counters = OffloadCounters()
    cpu = torch.device("cpu")
    target = cpu if exercise else device or torch.accelerator.current_accelerator() or cpu
    if not enabled or (target.type == "cpu" and not exercise):
        yield counters
        return
    stays = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    # Copies that are over at once need no window.
    copies, window = (_cuda_copies(target), WINDOW_BYTES) if target.type == "cuda" else (PlainCopies(), 0)
    run = _Pass(copies, counters, window, host_limit)
    min_bytes = 0 if exercise else MIN_BYTES

    def pack(tensor: Tensor) -> Tensor | _Saved:
        moves = tensor.device.type == target.type and tensor.nbytes >= min_bytes and _is_plain(tensor)
        if moves and tensor.untyped_storage().data_ptr() not in stays and run.has_room(tensor.nbytes):
            return run.save(tensor.detach())
        counters.kept += 1
        return tensor.detach()  # the tensor itself would keep its own graph alive in a cycle

    with torch.autograd.graph.saved_tensors_hooks(pack, _unpack):
        try:
            yield counters
        finally:
            run.end_forward()


@cache
def _cuda_copies(device: torch.device) -> CudaCopies:
    """One stream for the whole run."""
    return CudaCopies(device)


def _unpack(packed: Tensor | _Saved) -> Tensor:
    return packed.owner.restore(packed) if isinstance(packed, _Saved) else packed


def _is_plain(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and tensor.numel() > 0 and type(tensor) in (Tensor, torch.nn.Parameter)


def _compact(tensor: Tensor) -> Tensor:
    """Without the repetitions of an expanded tensor. Gaps stay: other strides could pick another backward kernel."""
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0 and tensor.size(dim) > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor
