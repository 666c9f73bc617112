"""Blocks encoded by several processes, in order.

A worker is a plain `python -m eft.data.worker`: nothing of the main process is copied into it, neither threads nor the
user's script, and it imports the tokenizer but no torch. It gets its job and its blocks through a socket, answers one
block at a time, and ends when the socket closes, however the main process ends.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

from eft.core.errors import DataError
from eft.data.block_encoder import EncodedBlock, Job
from eft.data.readers import Block

_AHEAD = 2
"""Blocks per worker that are read or kept ahead."""
_STOP_S = 5.0
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
"""The cores are for the workers; nothing is asked of a hub by them."""


class WorkerDiedError(DataError):
    """A process ended in the middle of its work; the data are not to blame."""


class _Worker:
    """A process and the main process's end of its socket."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "eft.data.worker", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                env={**os.environ, **_ENVIRONMENT, "PYTHONPATH": os.pathsep.join(path or "." for path in sys.path)},
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # an interrupt of the terminal is the main process's to act on
            )
        self.connection = Connection(ours.detach())

    def ask(self, message: Any) -> Any:
        """The worker's answer. Raises what the worker raised, WorkerDiedError when it died."""
        try:
            self.connection.send(message)
            answer = self.connection.recv()
        except (EOFError, ConnectionError, BrokenPipeError) as error:
            raise WorkerDiedError(self._death()) from error
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _death(self) -> str:
        try:
            code = self.process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            code = 0
        how = f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
        hint = " (perhaps the machine's memory was full: fewer `dataset_processes` need less)" if code == -9 else ""
        return f"a process that prepares data {how}{hint}; what it finished is kept, so run again"

    def stop(self) -> None:
        self.connection.close()
        try:
            self.process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Workers:
    """Processes that encode; they start with the object, and are ready by the time their job is known.

    A context manager: the processes end with it.
    """

    def __init__(self, num_processes: int):
        self._stack = ExitStack()
        self._workers: list[_Worker] = []
        try:
            for _ in range(num_processes):
                worker = _Worker()
                self._stack.callback(worker.stop)
                self._workers.append(worker)
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *failure: object) -> None:
        self._stack.close()

    def encode(self, job: Job, blocks: Iterator[Block]) -> Iterator[EncodedBlock]:
        """`BlockEncoder(job)` of each block, in order. To be called once.

        At most a few blocks per worker are in memory. Raises what the encoder raises, of the first block that fails;
        WorkerDiedError when a worker dies.
        """
        count = len(self._workers)
        pool = self._stack.enter_context(ThreadPoolExecutor(count))
        idle: SimpleQueue[_Worker] = SimpleQueue()

        def start(worker: _Worker) -> None:
            worker.ask(job)
            idle.put(worker)

        def encode(block: Block) -> EncodedBlock:
            worker = idle.get()
            try:
                encoded: EncodedBlock = worker.ask(block)
            finally:
                idle.put(worker)
            return encoded

        for ready in [pool.submit(start, worker) for worker in self._workers]:
            ready.result()
        pending: deque[Future[EncodedBlock]] = deque()
        try:
            for block in blocks:
                pending.append(pool.submit(encode, block))
                if len(pending) > _AHEAD * count:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def encode_in_workers(job: Job, blocks: Iterator[Block], num_processes: int) -> Iterator[EncodedBlock]:
    """`Workers.encode` by processes of its own."""
    with Workers(num_processes) as workers:
        yield from workers.encode(job, blocks)
