"""The program of the preparation workers: `python -m eft.data.worker <socket> …`; see `workers`.

It imports what they need and gets their job, once for all, and then becomes as many of them as it was given sockets. No
thread runs in it before that.
"""

from __future__ import annotations

import gc
import os
import sys
import traceback
from multiprocessing.connection import Connection
from typing import Any

from eft.core.errors import EftError
from eft.data.block_encoder import BlockEncoder
from eft.data.fast_tokenizer import FastTokenizer


def main(handles: list[int]) -> int:
    """Take a job on the first socket, then answer blocks on each, by a process of its own, until all are closed.

    Returns the exit code; where one of the processes was ended by a signal, this one ends itself in the same way, at
    once, so that whoever waits for it knows.
    """
    connections = [Connection(handle) for handle in handles]
    encoder = _encoder(connections[0])
    if encoder is None:
        return 0
    for mine in connections:
        if os.fork() == 0:
            for other in connections:
                if other is not mine:
                    other.close()
            _serve(encoder, mine)
            return 0
    for connection in connections:
        connection.close()
    for _ in handles:
        _, status = os.wait()
        if os.WIFSIGNALED(status):
            os.kill(os.getpid(), os.WTERMSIG(status))
        if status:
            return os.waitstatus_to_exitcode(status)
    return 0


def _encoder(connection: Connection) -> BlockEncoder | None:
    """What encodes the blocks of the job that comes through; None where none comes, or it is wrong."""
    encoder: BlockEncoder | None = None
    try:
        job = connection.recv()
    except (EOFError, ConnectionError):
        return None
    try:
        encoder = BlockEncoder(job)
        if isinstance(job.tokenizer, FastTokenizer):
            job.tokenizer.encoder.load()
        answer: Any = None
    except EftError as error:
        answer = error
    except Exception:
        answer = _unexpected()
    # Rows are trees: looking for cycles among them as often as by default takes a tenth of the time and finds nothing.
    gc.freeze()
    gc.set_threshold(200_000, 20, 100)
    return encoder if _sent(connection, answer) else None


def _serve(encoder: BlockEncoder, connection: Connection) -> None:
    """Answer blocks until the socket closes, however that happens."""
    with connection:
        while True:
            try:
                block = connection.recv()
            except (EOFError, ConnectionError):
                return
            try:
                answer: Any = encoder(block)
            except EftError as error:
                answer = error
            except Exception:
                answer = _unexpected()
            if not _sent(connection, answer):
                return


def _unexpected() -> RuntimeError:
    return RuntimeError(f"in a process that prepares data:\n{traceback.format_exc()}")


def _sent(connection: Connection, answer: Any) -> bool:
    try:
        connection.send(answer)
    except ConnectionError:  # the main process was killed: there is nobody to tell
        return False
    return True


if __name__ == "__main__":
    sys.exit(main([int(handle) for handle in sys.argv[1:]]))
