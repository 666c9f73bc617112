"""The processes of a run as one: the group they join, what one does for all, and what they agree on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]  # torch's own stubs lack them

from eft.core.errors import ConfigError
from eft.parallel.failures import OtherRankFailed

T = TypeVar("T")


@contextmanager
def process_group(world_size: int, device: torch.device, timeout_s: float) -> Iterator[None]:
    """The group of all processes that the launcher started, by its environment; left at the end.

    Nothing with one process, and where there is a group already. Collectives that wait longer than `timeout_s` fail.
    """
    if world_size == 1 or dist.is_initialized():
        yield
        return
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT", "RANK") if name not in os.environ]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE says {world_size} processes, but they cannot find each other without {', '.join(missing)}: "
            f"start them with `eft train --nproc {world_size}` or torchrun, or unset WORLD_SIZE."
        )
    # On accelerators, too, objects and flags go over gloo: they do not wait in the stream behind the step.
    backend = "gloo" if device.type == "cpu" else None
    timeout = timedelta(seconds=timeout_s)
    store = _store_of_this_attempt(world_size, timeout)
    if store is None:
        dist.init_process_group(backend, timeout=timeout)
    else:
        rank = int(os.environ["RANK"])
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _store_of_this_attempt(world_size: int, timeout: timedelta) -> Store | None:
    """Where processes that torchrun has started again meet; None: as torch does by itself.

    torchrun keeps one store over all restarts, and torch 2.13 no longer keeps what the dead processes left there apart:
    the living would connect to their addresses. Several machines count their restarts each for itself.
    """
    variables = os.environ
    attempt = variables.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0" or variables.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    if variables.get("GROUP_WORLD_SIZE", "1") != "1":
        return None
    address, port = variables["MASTER_ADDR"], int(variables["MASTER_PORT"])
    store = TCPStore(address, port, world_size, is_master=False, timeout=timeout)
    return PrefixStore(f"eft/attempt/{attempt}", store)


def is_first_rank() -> bool:
    """Whether this process writes what belongs to all."""
    return not dist.is_initialized() or dist.get_rank() == 0


def from_first_rank(work: Callable[[], T]) -> T:
    """What `work` gives on rank 0, which alone runs it; the others wait. Its result must pickle.

    Raises:
        OtherRankFailed: on the others, where it failed; rank 0 raises its own error.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return work()
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = work()
        except BaseException as error:
            box[1] = f"rank 0: {type(error).__name__}: {error}"
            dist.broadcast_object_list(box)
            raise
    dist.broadcast_object_list(box)
    if box[1] is not None:
        raise OtherRankFailed(box[1])
    result: T = box[0]
    return result


def from_all(value: T) -> list[T]:
    """What every process of the run gives, by rank. It must pickle, and every process must call it."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def wait_for_all() -> None:
    """Return once every process has come here."""
    if dist.is_initialized():
        dist.barrier()


def subgroup_of(rank: int, size: int, world_size: int) -> dist.ProcessGroup:
    """The group of `size` neighbouring ranks that `rank` is in; every process must ask for it."""
    group: dist.ProcessGroup | None = None
    for first in range(0, world_size, size):
        made = dist.new_group(list(range(first, first + size)))
        if first <= rank < first + size:
            group = made
    assert group is not None
    return group


class Agreement:
    """The largest of a number over all processes, one call late, so that nobody waits for it.

    Every process must call it equally often. It travels over gloo, beside the step.
    """

    def __init__(self) -> None:
        alone = not dist.is_initialized() or dist.get_world_size() == 1
        self._group = None if alone else dist.new_group(backend="gloo")
        self._pending: tuple[Any, Tensor] | None = None

    def __call__(self, value: int) -> int:
        """The largest `value` of the call before; alone: `value`."""
        if self._group is None:
            return value
        before = 0
        if self._pending is not None:
            before = _all_reduced(*self._pending)
        tensor = torch.tensor([value])
        self._pending = (dist.all_reduce(tensor, dist.ReduceOp.MAX, self._group, async_op=True), tensor)
        return before


def _all_reduced(work: Any, tensor: Tensor) -> int:
    # A function of its own: by its name the watch knows what a process waits in here.
    work.wait()
    return int(tensor)


def share_threads(world_size: int, device: torch.device) -> None:
    """On a CPU, divide the cores between the processes of this machine; OMP_NUM_THREADS has the last word."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    if device.type == "cpu" and local > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // local))
