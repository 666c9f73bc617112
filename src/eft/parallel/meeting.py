"""The port at which the launchers of several machines meet: whose it is, and what is free."""

from __future__ import annotations

import errno
import logging
import socket
import threading
import time
from datetime import timedelta
from queue import Empty, Queue

from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]  # torch's own stubs lack them

from eft.core.errors import ConfigError

logger = logging.getLogger(__name__)

_KNOCK_S = 5
_NEAR = 100
"""Ports above the wanted one that are tried for a free one."""


def check_meeting_place(rendezvous: str, run_id: str, wait_s: float) -> None:
    """Return once the launchers of run `run_id` can meet at `rendezvous`, `HOST:PORT`.

    On the machine that it names the port is free, or another launcher of the same run has it; on all others somebody
    answers there.

    Raises:
        ConfigError: another program has the port; there is no such host; nobody answers within `wait_s` seconds.
    """
    host, _, port_text = rendezvous.rpartition(":")
    port = int(port_text)
    try:
        address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ConfigError(f"--rendezvous {rendezvous}: there is no host {host!r} ({error.strerror})") from error
    state = _try(address, port)
    if state == errno.EADDRNOTAVAIL:
        _wait_for_answer(rendezvous, host, port, wait_s)
    elif state and not _is_ours(host, port, run_id):
        free = next((near for near in range(port + 1, min(port + _NEAR, 1 << 16)) if not _try(address, near)), None)
        hint = f"the nearest free one is {free}" if free is not None else "none of the next hundred is free"
        raise ConfigError(
            f"--rendezvous {rendezvous}: port {port} of this machine is taken by another program "
            f"({errno.errorcode[state]}); {hint}. Give all machines the same."
        )


def _try(address: tuple[int, int, int, str, tuple[object, ...]], port: int) -> int:
    """0 where one may listen at `port` of the address, otherwise the error's number."""
    family, kind, protocol, _, place = address
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((place[0], port, *place[2:]))
            probe.listen()
        except OSError as error:
            return error.errno or errno.EIO
    return 0


def _is_ours(host: str, port: int, run_id: str) -> bool:
    """Whether a launcher of this run keeps the store at the port, or is about to."""
    answers: Queue[bool] = Queue()
    # torch's client waits without end for a program that takes the connection and says nothing.
    threading.Thread(target=_ask, args=(host, port, run_id, answers), daemon=True).start()
    try:
        return answers.get(timeout=2 * _KNOCK_S)
    except Empty:
        return False


def _ask(host: str, port: int, run_id: str, answers: Queue[bool]) -> None:
    end = time.monotonic() + _KNOCK_S
    try:
        store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=_KNOCK_S))
        # As torch's rendezvous names it.
        while not (found := store.check([f"torch.rendezvous.{run_id}"])) and time.monotonic() < end:
            time.sleep(0.2)
    except (DistError, ValueError, RuntimeError):
        found = False
    answers.put(found)


def _wait_for_answer(rendezvous: str, host: str, port: int, wait_s: float) -> None:
    """torch itself would give up after a minute."""
    end, told = time.monotonic() + wait_s, False
    while True:
        try:
            socket.create_connection((host, port), _KNOCK_S).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise ConfigError(
                    f"--rendezvous {rendezvous}: nobody answers there ({error.strerror or error}). It is the machine "
                    "that the others meet at: start the same command on it, too, and let no firewall stand between."
                ) from error
        if not told:
            logger.info("waiting for %s, where the machines meet", rendezvous)
            told = True
        time.sleep(1)
