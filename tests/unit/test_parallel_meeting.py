"""Where the launchers of several machines meet: free, taken by another program, kept by another launcher of the run."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from torch.distributed import TCPStore
from torch.distributed.elastic.rendezvous import RendezvousParameters, dynamic_rendezvous
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler
from torch.distributed.launcher.api import LaunchConfig

from eft.core.errors import ConfigError
from eft.parallel import meeting
from eft.parallel.launch import Fleet, launch_config
from eft.parallel.meeting import check_meeting_place


@pytest.fixture
def taken() -> Iterator[int]:
    """A port at which another program listens and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield int(server.getsockname()[1])


def test_a_free_port_is_left_free(taken: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    check_meeting_place(f"127.0.0.1:{port}", "run", 1)
    with socket.create_server(("127.0.0.1", port)):
        pass


def test_a_port_of_another_program_is_named_with_the_nearest_free_one(
    taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meeting, "_KNOCK_S", 1)
    began = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        check_meeting_place(f"127.0.0.1:{taken}", "run", 1)
    assert time.monotonic() - began < 30
    message = str(caught.value)
    assert f"port {taken} of this machine is taken by another program (EADDRINUSE)" in message
    free = int(message.partition("the nearest free one is ")[2].partition(".")[0])
    assert 0 < free - taken < 100
    with socket.create_server(("127.0.0.1", free)):
        pass


def test_a_launcher_of_the_same_run_may_have_the_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "_KNOCK_S", 1)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store.set("torch.rendezvous.mine", "")
    check_meeting_place(f"127.0.0.1:{store.port}", "mine", 1)
    with pytest.raises(ConfigError, match="is taken by another program"):
        check_meeting_place(f"127.0.0.1:{store.port}", "of another run", 1)


def test_a_launcher_that_has_only_just_begun_is_waited_for() -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    threading.Timer(0.5, store.set, ("torch.rendezvous.mine", "")).start()
    check_meeting_place(f"127.0.0.1:{store.port}", "mine", 1)


def test_a_place_that_is_nowhere_is_said() -> None:
    with pytest.raises(ConfigError, match=r"--rendezvous nowhere.invalid:29500: there is no host 'nowhere.invalid'"):
        check_meeting_place("nowhere.invalid:29500", "run", 1)
    # TEST-NET-1 of RFC 5737: no machine has it.
    with pytest.raises(ConfigError, match="nobody answers there"):
        check_meeting_place("192.0.2.1:29500", "run", 0)


def test_a_rendezvous_is_a_host_and_a_port() -> None:
    with pytest.raises(ConfigError, match="expected HOST:PORT, got 'host'"):
        Fleet(1, 2, "host")


def test_runs_at_one_port_are_told_apart() -> None:
    ids = {Fleet(1, 2, "h:1").run_id(arguments) for arguments in (["train", "a"], ["train", "b"], ["train", "a"])}
    assert len(ids) == 2


class OfTheThread(datetime):
    """Clocks as only different machines have them: an hour slow in the thread of that name."""

    @classmethod
    def now(cls, tz: Any = None) -> Any:
        return datetime.now(tz) - timedelta(hours=threading.current_thread().name == "slow")


def meet(config: LaunchConfig, seen: list[int]) -> None:
    """What a launcher does first; notes how many machines it then sees."""
    handler = get_rendezvous_handler(
        RendezvousParameters("c10d", config.rdzv_endpoint, config.run_id, 2, 2, **config.rdzv_configs)
    )
    handler.next_rendezvous()
    # Everybody reads the others' heartbeats.
    for _ in range(4):
        handler.num_nodes_waiting()
        time.sleep(0.3)
    seen.append(len(handler._state_holder.state.participants))


def test_machines_whose_clocks_differ_meet_all_the_same(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    config = launch_config(Fleet(1, 2, f"127.0.0.1:{port}"), ["train", "run.yaml"], tmp_path)
    seen: list[int] = []
    with mock.patch.object(dynamic_rendezvous, "datetime", OfTheThread):
        threads = [
            threading.Thread(target=meet, args=(config, seen), name=name, daemon=True) for name in ("right", "slow")
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert seen == [2, 2], "one is taken for dead"
