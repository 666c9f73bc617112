"""The program of a preparation worker: `python -m eft.data.worker <socket>`; see `workers`."""

from __future__ import annotations

import gc
import sys
import traceback
from multiprocessing.connection import Connection
from typing import Any

from eft.core.errors import EftError
from eft.data.block_encoder import BlockEncoder


def main(handle: int) -> None:
    """Answer blocks until the socket closes, however that happens."""
    with Connection(handle) as connection:
        encoder: BlockEncoder | None = None
        while True:
            try:
                message = connection.recv()
            except (EOFError, ConnectionError):
                return
            try:
                if encoder is None:
                    encoder = _encoder(message)
                    answer: Any = None
                else:
                    answer = encoder(message)
            except EftError as error:
                answer = error
            except Exception:
                answer = RuntimeError(f"in a process that prepares data:\n{traceback.format_exc()}")
            try:
                connection.send(answer)
            except ConnectionError:  # the main process was killed: there is nobody to tell
                return


def _encoder(job: Any) -> BlockEncoder:
    encoder = BlockEncoder(job)
    # Rows are trees: looking for cycles among them as often as by default takes a tenth of the time and finds nothing.
    gc.freeze()
    gc.set_threshold(200_000, 20, 100)
    return encoder


if __name__ == "__main__":
    main(int(sys.argv[1]))
