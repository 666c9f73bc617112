"""How much memory a piece of work takes, and how much there is: on the host and on an accelerator."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import resource
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import psutil  # type: ignore[import-untyped]  # has no types
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

_PROC = Path("/proc/self")
_CGROUPS = Path("/sys/fs/cgroup")
_GUARD_SLACK = 1 << 30
"""Mappings that the work may make beyond its budget without touching them: stacks of threads, arenas of malloc."""
_M_MMAP_THRESHOLD = -3
"""The number of that parameter in <malloc.h>."""
_HOST_FAILURES = (
    "can't allocate memory",
    "cannot allocate memory",
    "could not create a memory",
    "could not create a primitive",
    "bad_alloc",
)


@dataclass
class Peak:
    """Filled when the measured work is over."""

    num_bytes: int = 0
    """The most that was in use at once, above what was in use before."""


class Gauge(Protocol):
    """Memory of one kind."""

    def available(self) -> int:
        """Bytes that this process may still take."""
        ...

    def measured(self, budget: int, model: nn.Module) -> AbstractContextManager[Peak]:
        """Measures what happens inside, mostly passes of `model`. Where the system would kill a process that takes more
        than `budget` bytes, taking them is an error instead (`is_out_of_memory`)."""
        ...

    def holding(self, num_bytes: int) -> AbstractContextManager[None]:
        """Inside, so much is set aside for what will be allocated later."""
        ...

    def clean(self) -> None:
        """Give back what is held but not used."""
        ...


def gauge_of(device: torch.device, processes: int = 1) -> Gauge:
    """The memory in which a model on `device` is trained; `processes` of this machine share the host's."""
    return HostMemory(processes) if device.type == "cpu" else AcceleratorMemory(device)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on whatever device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError | OSError) and any(words in text for words in _HOST_FAILURES)


class HostMemory:
    """Main memory, within the limits of this process's control group. Linux."""

    MAPPED_FROM = 8 << 20
    """Bytes of the smallest block that gets a mapping of its own (`map_large_blocks`)."""

    def __init__(self, processes: int = 1) -> None:
        """`processes` of the machine divide it evenly."""
        self._processes = processes

    def available(self) -> int:
        """See `Gauge`: what the machine could free, or what is left of the container's share if that is less."""
        return min([int(psutil.virtual_memory().available), *_left_in_cgroups()]) // self._processes

    @contextmanager
    def measured(self, budget: int, model: nn.Module) -> Iterator[Peak]:
        """See `Gauge`. Resident memory, by the kernel's own high-water mark.

        It is compared with the budget before every module and after every gradient. A single allocation that goes far
        beyond is refused by the system, which is told the limit.
        """
        peak = Peak()
        with contextlib.suppress(OSError):  # some sandboxes do not let a process reset its mark
            (_PROC / "clear_refs").write_text("5")
        before, mark = _status("VmRSS"), _status("VmHWM")

        def check(*_: Any) -> None:
            if _status("VmRSS") - before > budget:
                raise MemoryError(f"more than {budget:,} bytes in use")

        handles = [register_module_forward_pre_hook(check)]
        handles += [p.register_post_accumulate_grad_hook(check) for p in model.parameters() if p.requires_grad]
        with _data_limit(_status("VmData") + budget + _GUARD_SLACK):
            try:
                yield peak
            finally:
                for handle in handles:
                    handle.remove()
                after = _status("VmHWM")
                # A mark that did not rise tells only that the process was this large before.
                peak.num_bytes = after - before if after > mark else 0

    def holding(self, num_bytes: int) -> AbstractContextManager[None]:
        """See `Gauge`. Nothing: memory that nobody touches is not taken; `budget` says what is left."""
        return contextlib.nullcontext()

    def clean(self) -> None:
        """See `Gauge`. What malloc keeps for itself would make the next measurement too small."""
        gc.collect()
        library = ctypes.CDLL(None)
        if hasattr(library, "malloc_trim"):  # glibc's own
            library.malloc_trim(0)

    @staticmethod
    def map_large_blocks() -> None:
        """From now on, each tensor of `MAPPED_FROM` or more lies in a mapping of its own, which ends as it does.

        By itself glibc raises that limit to the largest block it saw freed, up to 32 MiB: large tensors are then cut
        out of one heap, and the holes that they leave do not fit the next ones. What somebody has set stays.
        """
        library = ctypes.CDLL(None)
        is_set = "MALLOC_MMAP_THRESHOLD_" in os.environ or "mmap_threshold" in os.environ.get("GLIBC_TUNABLES", "")
        if hasattr(library, "mallopt") and not is_set:
            library.mallopt(_M_MMAP_THRESHOLD, HostMemory.MAPPED_FROM)


class AcceleratorMemory:
    """Memory of a GPU, as torch's allocator counts it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def available(self) -> int:
        """See `Gauge`: what the device has left, and what the allocator holds unused."""
        free, _ = torch.accelerator.get_memory_info(self._device)
        reserved = torch.accelerator.memory_reserved(self._device)
        return int(free) + reserved - torch.accelerator.memory_allocated(self._device)

    @contextmanager
    def measured(self, budget: int, model: nn.Module) -> Iterator[Peak]:
        """See `Gauge`. The device refuses what it does not have, so `budget` needs no guard."""
        peak = Peak()
        torch.accelerator.reset_peak_memory_stats(self._device)
        before = torch.accelerator.memory_allocated(self._device)
        try:
            yield peak
        finally:
            peak.num_bytes = torch.accelerator.max_memory_allocated(self._device) - before

    @contextmanager
    def holding(self, num_bytes: int) -> Iterator[None]:
        """See `Gauge`."""
        held = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        yield
        del held

    def clean(self) -> None:
        """See `Gauge`."""
        gc.collect()
        torch.accelerator.empty_cache()


def _status(name: str) -> int:
    """A field of /proc/self/status, in bytes."""
    for line in (_PROC / "status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"/proc/self/status has no {name}")


@contextmanager
def _data_limit(num_bytes: int) -> Iterator[None]:
    """Inside, allocations beyond `num_bytes` of private memory fail, in place of the whole process later on."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limits = [limit for limit in (num_bytes, soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_DATA, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _left_in_cgroups() -> Iterator[int]:
    """Bytes left under the limit of each control group that this process is in, of versions 1 and 2."""
    for line in (_PROC / "cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, limit, usage, cache = _CGROUPS, "memory.max", "memory.current", ("inactive_file", "active_file")
        elif "memory" in controllers.split(","):
            root, limit, usage = _CGROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = ("total_inactive_file", "total_active_file")
        else:
            continue
        folder = root / path.lstrip("/")
        # A container sees its own group as the root.
        for group in (folder, *folder.parents):
            if group.is_relative_to(root):
                yield from _left_in_group(group, limit, usage, cache)


def _left_in_group(group: Path, limit: str, usage: str, cache: tuple[str, ...]) -> Iterator[int]:
    try:
        most, used = (group / limit).read_text().strip(), int((group / usage).read_text())
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except OSError:
        return  # no such group, or no memory controller in it
    if most != "max":
        # Cached files are dropped before anything fails.
        yield max(0, int(most) - used + sum(int(statistics.get(name, 0)) for name in cache))
