"""Contenders as processes: each loads, waits, and trains as many steps as it is told, while the others idle."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CHILDREN = Path(__file__).parent / "children"


@dataclass(frozen=True)
class Entry:
    """One contender: what it runs in, which script, and how its settings differ from the contest's."""

    name: str
    python: Path
    script: str
    settings: dict[str, Any] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Reply:
    """What a contender reports after some steps."""

    steps: int
    wall_s: float
    cpu_s: float
    tokens: int
    trainable: int
    losses: list[float]
    peak_bytes: int
    """Above what was resident after the imports."""


class ContenderFailed(Exception):  # noqa: N818 - what is said reads better
    """A contender ended by itself; the message holds the end of its log."""


class Contender:
    """A running process of an entry."""

    def __init__(self, entry: Entry, settings: dict[str, Any], folder: Path, *, wait: bool = True) -> None:
        """`wait` False: of several that only get ready together; call `wait_until_ready` on each."""
        self.entry = entry
        self.fill: float | None = None
        """Real tokens over the capacity of its rows, where its own packing decides it."""
        self.log = folder / f"{entry.name}.log"
        settings = {**settings, **entry.settings, "output": str(folder / entry.name)}
        path = folder / f"{entry.name}.json"
        path.write_text(json.dumps(settings))
        command_read, command_write = os.pipe()
        reply_read, reply_write = os.pipe()
        self._started = time.monotonic()
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                [entry.python, CHILDREN / entry.script, str(command_read), str(reply_write), path],
                pass_fds=(command_read, reply_write),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=_environment(settings, own=str(entry.python) == sys.executable),
            )
        os.close(command_read)
        os.close(reply_write)
        self._commands, self._replies = os.fdopen(command_write, "w"), os.fdopen(reply_read)
        if wait:
            self.wait_until_ready()

    def wait_until_ready(self) -> None:
        """Return once it waits for its first command."""
        self._receive("ready")
        self.seconds_to_ready = time.monotonic() - self._started

    def run(self, steps: int) -> Reply:
        """Train `steps` optimizer steps now."""
        self.begin(steps)
        return self.finish()

    def begin(self, steps: int) -> None:
        """Start `steps` optimizer steps."""
        self._send(steps)

    def finish(self) -> Reply:
        """Wait until they are over."""
        return Reply(**self._receive("steps"))

    def stop(self) -> None:
        """End the process."""
        if self._process.poll() is None:
            with contextlib.suppress(BrokenPipeError):
                self._send(0)
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        with contextlib.suppress(BrokenPipeError):
            self._commands.close()
        self._replies.close()

    def _send(self, number: int) -> None:
        self._commands.write(f"{number}\n")
        self._commands.flush()

    def _receive(self, wanted: str) -> dict[str, Any]:
        while line := self._replies.readline():
            reply: dict[str, Any] = json.loads(line)
            if "out_of_memory" in reply:
                raise MemoryError(f"{self.entry.name}: {reply['out_of_memory']}")
            self.fill = reply.get("fill", self.fill)
            if wanted in reply:
                return reply
        end = "\n".join(self.log.read_text().splitlines()[-25:])
        raise ContenderFailed(f"{self.entry.name} ended early; the end of {self.log}:\n{end}")


def contest_folder() -> Path:
    """A new folder for settings, logs and outputs."""
    return Path(tempfile.mkdtemp(prefix="eft-bench-"))


def _environment(settings: dict[str, Any], *, own: bool) -> dict[str, str]:
    threads = str(settings["threads"])
    # PYTHONPATH and the like are meant for this environment, not for a peer's.
    kept = {name: value for name, value in os.environ.items() if own or not name.startswith("PYTHON")}
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
    # Trainer would take every GPU it sees for one model.
    device = (
        {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0")} if settings["device"] == "cuda" else {}
    )
    own_variables = settings.get("environment", {})
    return {**kept, **offline, **device, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, **own_variables}
