"""Blocks encoded by several processes, in order.

Workers are forks of one plain `python -m eft.data.worker`, which does the imports and takes the job for all of them:
nothing of the main process is copied into them, neither threads nor the user's script, and they import the tokenizer
but no torch. Each gets its blocks through a socket, answers one at a time, and ends when the socket closes, however the
main process ends.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from queue import SimpleQueue
from threading import Lock
from typing import Any

from eft.core.errors import DataError
from eft.data.block_encoder import EncodedBlock, Job
from eft.data.channel import Channel
from eft.data.readers import Block
from eft.data.worker import FAST

_IN_FLIGHT, _AHEAD = 2, 8
"""Blocks per worker that it has, and that are read or kept ahead: enough for the time in which a shard is ended."""
_STOP_S = 5.0
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",  # pyarrow's allocator would start a thread before the forks
    "HF_HUB_OFFLINE": "1",
}
"""The cores are for the workers; nothing is asked of a hub by them."""


class WorkerDiedError(DataError):
    """A process ended in the middle of its work; the data are not to blame."""


class _Worker:
    """The main process's end of a worker's socket, for several threads: the worker has its next block before it has
    answered the one before."""

    def __init__(self, channel: Channel, process: subprocess.Popen[bytes]):
        """`process`: what the workers are forks of. It ends with the last of them, or like the first that dies."""
        self.channel = channel
        self._process = process
        self._sending, self._receiving = Lock(), Lock()
        self._asked: deque[Future[Any]] = deque()
        """What was sent and has no answer; answers come in the same order."""

    def ask(self, message: Any) -> Any:
        """The worker's answer. Raises what the worker raised, WorkerDiedError when it died."""
        mine: Future[Any] = Future()
        try:
            with self._sending:
                self._asked.append(mine)
                self.channel.send(message)
            with self._receiving:
                while not mine.done():
                    answer = self.channel.receive()
                    self._asked.popleft().set_result(answer)
        except (EOFError, OSError) as error:
            raise WorkerDiedError(self._death()) from error
        answer = mine.result()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _death(self) -> str:
        try:
            code = self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            code = 0
        how = f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
        hint = " (perhaps the machine's memory was full: fewer `dataset_processes` need less)" if code == -9 else ""
        return f"a process that prepares data {how}{hint}; what it finished is kept, so run again"


class Workers:
    """Processes that encode; they start with the object, and are ready by the time their job is known.

    A context manager: the processes end with it. `fast`: the job will likely come with the fast encoder.
    """

    def __init__(self, num_processes: int, *, fast: bool = False):
        self._stack = ExitStack()
        pairs = [socket.socketpair() for _ in range(num_processes)]
        theirs = [str(inner.fileno()) for _, inner in pairs]
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "eft.data.worker", *([FAST] if fast else []), *theirs],
            pass_fds=[inner.fileno() for _, inner in pairs],
            env={**os.environ, **_ENVIRONMENT, "PYTHONPATH": os.pathsep.join(path or "." for path in sys.path)},
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # an interrupt of the terminal is the main process's to act on
        )
        self._stack.callback(self._stop)
        for _, inner in pairs:
            inner.close()
        self._workers = [_Worker(Channel(outer), self.process) for outer, _ in pairs]
        for worker in self._workers:
            self._stack.callback(worker.channel.close)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *failure: object) -> None:
        self._stack.close()

    def _stop(self) -> None:
        """The sockets are closed, so the workers end."""
        try:
            self.process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)  # its session's, so its forks' too
            self.process.wait()

    def encode(self, job: Job, blocks: Iterator[Block]) -> Iterator[EncodedBlock]:
        """`BlockEncoder(job)` of each block, in order. To be called once.

        At most a few blocks per worker are in memory. Raises what the encoder raises, of the first block that fails;
        WorkerDiedError when a worker dies.
        """
        count = len(self._workers)
        pool = self._stack.enter_context(ThreadPoolExecutor(count * _IN_FLIGHT))
        idle: SimpleQueue[_Worker] = SimpleQueue()

        def encode(block: Block) -> EncodedBlock:
            worker = idle.get()
            try:
                encoded: EncodedBlock = worker.ask(block)
            finally:
                idle.put(worker)
            return encoded

        self._workers[0].ask(job)  # for all of them
        for worker in self._workers * _IN_FLIGHT:
            idle.put(worker)
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
