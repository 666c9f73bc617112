"""Processes that have joined one gloo group and run what they are told: made once per world size, forked from here.

A new interpreter would import for ten seconds per rank; a fork of this warm one takes milliseconds.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState, PartialState

from eft.parallel.watch import end_with_launcher

ANSWER_S = 240.0


class RankError(AssertionError):
    """What went wrong, by rank."""


class Ranks:
    """The processes of one group."""

    def __init__(self, world_size: int, method: str = "fork", answer_s: float = ANSWER_S) -> None:
        """`method` "spawn": processes that know nothing of this one; they take seconds to import everything."""
        self.world_size = world_size
        self._answer_s = answer_s
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        context: Any = multiprocessing.get_context(method)
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(world_size):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world_size, port, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(mine)
            self._processes.append(process)

    def run(self, work: Callable[..., Any], *arguments: Any) -> list[Any]:
        """`work(rank, *arguments)` in every process at once; what each returned, by rank. All must pickle."""
        for pipe in self._pipes:
            pipe.send((work, arguments))
        answers = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(self._answer_s):
                self.close()
                raise RankError(f"rank {rank} has not answered for {self._answer_s} s")
            answers.append(pipe.recv())
        errors = [f"rank {rank}:\n{text}" for rank, (text, _) in enumerate(answers) if text]
        if errors:
            raise RankError("\n".join(errors))
        return [value for _, value in answers]

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()


@contextmanager
def ranks(world_size: int, method: str = "fork", answer_s: float = ANSWER_S) -> Iterator[Ranks]:
    """Ranks that end with the block, or with this process."""
    group = Ranks(world_size, method, answer_s)
    try:
        yield group
    finally:
        group.close()


def _serve(rank: int, world_size: int, port: int, pipe: Connection) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size)
    )
    torch.set_num_threads(1)
    end_with_launcher()
    # accelerate 1.15 asks for HSDP's mesh in a way that torch 2.13 would rather not see.
    warnings.filterwarnings("ignore", message="Slicing a flattened dim")
    # Ours are not changed in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    warnings.filterwarnings("ignore", message="DTensor random operators may not have complete support")
    # DeepSpeed 0.19 calls collectives by the names that torch 2.13 has replaced.
    warnings.filterwarnings("ignore", message="`torch.distributed.* is deprecated", category=FutureWarning)
    forget_devices()
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=ANSWER_S / 2),
    )
    while True:
        try:
            work, arguments = pipe.recv()
        except EOFError:
            return
        try:
            forget_devices()
            answer = ("", work(rank, *arguments))
        except BaseException:
            answer = (traceback.format_exc(), None)
        pipe.send(answer)


def forget_devices() -> None:
    """accelerate keeps what it once found out in class attributes, also across a fork."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    PartialState._reset_state()
