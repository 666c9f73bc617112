"""Python objects through a socket: arrays cross as they lie in memory, copied by nobody but the kernel."""

from __future__ import annotations

import pickle
import socket
import struct
from typing import Any

_LENGTH = struct.Struct("<Q")


class Channel:
    """One end of a stream socket, which this object owns. A context manager: the socket is closed with it."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected

    def __enter__(self) -> Channel:
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the socket: the other end sees the end of the stream."""
        self._socket.close()

    def send(self, message: Any) -> None:
        """Send anything that can be pickled. Raises OSError where nobody is there to take it."""
        parts: list[pickle.PickleBuffer] = []
        body = pickle.dumps(message, 5, buffer_callback=parts.append)
        views = [memoryview(body), *(part.raw() for part in parts)]
        lengths = [view.nbytes for view in views]
        self._socket.sendall(b"".join(map(_LENGTH.pack, [len(lengths), *lengths])))
        for view in views:
            self._socket.sendall(view)

    def receive(self) -> Any:
        """What the other end sent next. Its arrays can be written to. Raises EOFError at the end of the stream."""
        (count,) = _LENGTH.unpack(self._exactly(_LENGTH.size))
        lengths = struct.unpack(f"<{count}Q", self._exactly(count * _LENGTH.size))
        body, *parts = [self._exactly(length) for length in lengths]
        return pickle.loads(body, buffers=parts)

    def _exactly(self, length: int) -> bytearray:
        content = bytearray(length)
        view = memoryview(content)
        while view:
            received = self._socket.recv_into(view)
            if not received:
                raise EOFError
            view = view[received:]
        return content
