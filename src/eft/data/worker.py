"""The program of the preparation workers: `python -m eft.data.worker [--fast] <socket> …`; see `workers`.

It imports what they need and gets their job, once for all, and then becomes as many of them as it was given sockets. No
thread runs in it before that.
"""

from __future__ import annotations

import gc
import os
import socket
import sys
import traceback
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from eft.core.errors import EftError
from eft.data.block_encoder import BlockEncoder
from eft.data.channel import Channel
from eft.data.fast_tokenizer import FastTokenizer

FAST = "--fast"
"""Get ready for a job with the fast encoder, which takes a third of a second, before there is one."""


def main(handles: list[int]) -> int:
    """Take a job on the first socket, then answer blocks on each, by a process of its own, until all are closed.

    Returns the exit code; where one of the processes was ended by a signal, this one ends itself in the same way, at
    once, so that whoever waits for it knows.
    """
    channels = [Channel(socket.socket(fileno=handle)) for handle in handles]
    encoder = _encoder(channels[0])
    if encoder is None:
        return 0
    for mine in channels:
        if os.fork() == 0:
            for other in channels:
                if other is not mine:
                    other.close()
            _serve(encoder, mine)
            os._exit(0)  # nothing is left to be done, and taking an interpreter apart takes a tenth of a second
    for channel in channels:
        channel.close()
    for _ in handles:
        _, status = os.wait()
        if os.WIFSIGNALED(status):
            os.kill(os.getpid(), os.WTERMSIG(status))
        if status:
            return os.waitstatus_to_exitcode(status)
    return 0


def _encoder(channel: Channel) -> BlockEncoder | None:
    """What encodes the blocks of the job that comes through; None where none comes, or it is wrong."""
    encoder: BlockEncoder | None = None
    try:
        job = channel.receive()
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
    return encoder if _sent(channel, answer) else None


def _serve(encoder: BlockEncoder, channel: Channel) -> None:
    """Answer blocks until the socket closes, however that happens."""
    with channel, ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as sender:
        coming = reader.submit(channel.receive)
        going: Future[bool] | None = None
        while True:
            try:
                block = coming.result()
            except (EOFError, ConnectionError):
                return
            # While this one is encoded, the next one comes and the answer to the last one goes.
            coming = reader.submit(channel.receive)
            try:
                answer: Any = encoder(block)
            except EftError as error:
                answer = error
            except Exception:
                answer = _unexpected()
            if going is not None and not going.result():
                return
            going = sender.submit(_sent, channel, answer)


def _unexpected() -> RuntimeError:
    return RuntimeError(f"in a process that prepares data:\n{traceback.format_exc()}")


def _sent(channel: Channel, answer: Any) -> bool:
    try:
        channel.send(answer)
    except ConnectionError:  # the main process was killed: there is nobody to tell
        return False
    return True


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if arguments[0] == FAST:
        from eft.data.bpe import load_loops  # numba is slow to import

        load_loops()
    code = main([int(handle) for handle in arguments if handle != FAST])
    os._exit(code)  # as above
