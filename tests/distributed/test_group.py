"""Processes that do not come, or come too late: an error after the time that the config allows, never a hang."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from eft.parallel.group import process_group
from eft.runtime.checkpoint import CheckpointStore
from eft.runtime.sharding import Replicas
from eft.runtime.shares import ENDING_S

TIMEOUT_S = 3.0
SLACK_S = 10.0


def comes_late(rank: int) -> None:
    with process_group(2, torch.device("cpu"), TIMEOUT_S):
        if rank == 1:
            time.sleep(60)
        dist.barrier()


def never_comes(rank: int) -> None:
    if rank == 1:
        time.sleep(60)
    with process_group(2, torch.device("cpu"), TIMEOUT_S):
        pass


def leaves_early(rank: int) -> None:
    with process_group(2, torch.device("cpu"), 60.0):
        dist.barrier()
        if rank == 0:
            dist.barrier()


def run_rank(work: Callable[[int], None], rank: int, port: int, pipe: Connection) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    began = time.monotonic()
    try:
        work(rank)
        pipe.send(("", time.monotonic() - began))
    except Exception as error:
        pipe.send((str(error), time.monotonic() - began))


@pytest.mark.parametrize(
    ("work", "words"),
    [
        (comes_late, ("Timed out waiting", "timed out", "Connection closed")),
        (never_comes, ("timeout", "Timed out", "timed out", "clients joined")),
        (leaves_early, ("Connection closed", "Connection reset", "Broken pipe")),
    ],
)
def test_an_uneven_end_is_an_error_in_time(work: Callable[[int], None], words: tuple[str, ...]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    pipes, processes = [], []
    for rank in range(2):
        mine, theirs = context.Pipe()
        processes.append(context.Process(target=run_rank, args=(work, rank, port, theirs), daemon=True))
        processes[-1].start()
        pipes.append(mine)
    try:
        assert pipes[0].poll(TIMEOUT_S + SLACK_S), "rank 0 hangs"
        message, seconds = pipes[0].recv()
        assert any(word in message for word in words), message
        assert seconds < TIMEOUT_S + SLACK_S
    finally:
        for process in processes:
            process.kill()
            process.join()


def test_a_failed_run_does_not_wait_for_the_share_of_a_lost_process(tmp_path: Path) -> None:
    """Leaving Python waits for the save that is under way."""
    store = CheckpointStore(tmp_path, save_total_limit=None, asynchronous=True, sharding=Replicas(0, 2))
    store.save(2, None, {}, keep=False, fill=lambda draft: draft.add_json("some.json", {}))
    began = time.monotonic()
    store.fail()
    assert time.monotonic() - began < ENDING_S + SLACK_S
    store.wait()
    assert store.steps() == []
