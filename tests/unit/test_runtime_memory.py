"""Memory gauges: the peak of some work, what is left, and an error in place of a killed process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from eft.runtime import memory
from eft.runtime.memory import AcceleratorMemory, HostMemory, gauge_of, is_out_of_memory

MIB = 1 << 20


def test_the_peak_is_what_was_in_use_at_once() -> None:
    gauge = HostMemory()
    with gauge.measured(1 << 31, nn.Identity()) as peak:
        for _ in range(3):
            block = torch.ones(16 * MIB)  # 64 MiB
            del block
    assert 60 * MIB < peak.num_bytes < 100 * MIB
    with gauge.measured(1 << 31, nn.Identity()) as peak:
        pass
    assert peak.num_bytes < 4 * MIB


def test_taking_too_much_is_an_error_that_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_GUARD_SLACK", 16 * MIB)
    gauge = HostMemory()
    for take in (lambda: torch.empty(1 << 28), lambda: np.empty(1 << 28)):
        with pytest.raises((RuntimeError, MemoryError)) as error, gauge.measured(64 * MIB, nn.Identity()):
            take()
        assert is_out_of_memory(error.value)
    assert torch.empty(1 << 28).numel() == 1 << 28, "the limit is gone"
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    assert not is_out_of_memory(ValueError("can't allocate memory"))


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_pass_that_takes_too_much_is_stopped_on_the_way(where: str) -> None:
    """Layer by layer, long before the system would refuse anything."""
    layers = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(16)))  # 4 MiB of gradient each
    rows = torch.ones(1 if where == "backward" else 2048, 1024)  # 8 MiB of activations each
    reached = []
    for number, layer in enumerate(layers):
        layer.register_forward_hook(lambda *_, number=number: reached.append(number))
    gauge = HostMemory()
    gauge.clean()
    with pytest.raises(MemoryError), gauge.measured(40 * MIB, layers):
        layers(rows).sum().backward()
    assert len(reached) == 16 if where == "backward" else 1 < len(reached) < 16
    assert 0 < sum(parameter.grad is not None for parameter in layers.parameters()) < 32 or where == "forward"
    layers.zero_grad()
    layers(rows).sum().backward()  # nothing is left of the check


def test_what_is_left_is_the_least_of_all_limits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A container of 3 GiB inside a slice of 2 GiB, on a machine with more."""
    for path, limit, used, cached in (
        ("", "max", 9 << 30, 0),
        ("slice", str(2 << 30), 1 << 30, 1 << 28),
        ("slice/box", str(3 << 30), 1 << 29, 0),
    ):
        group = tmp_path / "cgroup" / path
        group.mkdir(parents=True, exist_ok=True)
        (group / "memory.max").write_text(f"{limit}\n")
        (group / "memory.current").write_text(f"{used}\n")
        (group / "memory.stat").write_text(f"anon 5\ninactive_file {cached}\nactive_file 0\n")
    (tmp_path / "cgroup" / "slice" / "other").mkdir()
    proc = tmp_path / "proc"
    proc.mkdir()
    (proc / "cgroup").write_text("0::/slice/box\n")
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "_PROC", proc)
    assert HostMemory().available() == (1 << 30) + (1 << 28)
    (proc / "cgroup").write_text("0::/slice/other\n")  # has no memory controller of its own
    assert HostMemory().available() == (1 << 30) + (1 << 28)


def test_the_first_version_of_control_groups(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    group = tmp_path / "cgroup" / "memory"
    group.mkdir(parents=True)
    (group / "memory.limit_in_bytes").write_text(f"{1 << 30}\n")
    (group / "memory.usage_in_bytes").write_text(f"{3 << 28}\n")
    (group / "memory.stat").write_text("total_inactive_file 100\ntotal_active_file 11\n")
    proc = tmp_path / "proc"
    proc.mkdir()
    # The path is the host's, which a container does not see.
    (proc / "cgroup").write_text("5:cpu:/\n4:hugetlb,memory:/docker/abc\n0::/\n")
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "_PROC", proc)
    assert HostMemory().available() == (1 << 28) + 111


def test_each_device_has_its_gauge() -> None:
    assert isinstance(gauge_of(torch.device("cpu")), HostMemory)
    assert isinstance(gauge_of(torch.device("cuda", 0)), AcceleratorMemory)
    assert HostMemory().available() > 1 << 27


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_an_accelerators_gauge() -> None:
    gauge = AcceleratorMemory(torch.device("cuda", 0))
    gauge.clean()
    before = gauge.available()
    with gauge.holding(512 * MIB):
        assert before - gauge.available() == pytest.approx(512 * MIB, rel=0.05)
        with gauge.measured(before, nn.Identity()) as peak:
            torch.empty(64 * MIB, device="cuda")
    assert peak.num_bytes == 256 * MIB
    with pytest.raises(torch.OutOfMemoryError) as error, gauge.measured(before, nn.Identity()):
        torch.empty(before, device="cuda")
    assert is_out_of_memory(error.value)
    gauge.clean()
    assert gauge.available() == pytest.approx(before, rel=0.02)


_BLOCKS = """
import ctypes, sys
import torch
from eft.runtime.memory import HostMemory

class Counts(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd usmblks".split()]
    _fields_ += [(name, ctypes.c_size_t) for name in "fsmblks uordblks fordblks keepcost".split()]

mallinfo = ctypes.CDLL(None).mallinfo2
mallinfo.restype = Counts
if sys.argv[1] == "mapped":
    HostMemory.map_large_blocks()
block = torch.ones(4 << 20)  # 16 MiB
del block  # by itself malloc cuts blocks of this size out of its heap from now on
before = mallinfo().hblkhd
block = torch.ones(4 << 20)
print((mallinfo().hblkhd - before) >> 20)
"""


@pytest.mark.parametrize(
    ("way", "variables", "mib"),
    [("mapped", {}, 16), ("left", {}, 0), ("mapped", {"MALLOC_MMAP_THRESHOLD_": "33554432"}, 0)],
)
def test_large_blocks_are_mapped_unless_somebody_has_set_that(way: str, variables: dict[str, str], mib: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _BLOCKS, way], capture_output=True, text=True, env=os.environ | variables, check=True
    )
    assert int(done.stdout) == mib
