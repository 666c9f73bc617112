"""`eft train --nproc` as a user starts it, and what can happen to its processes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.tiny_run import lay_out


def write_run(folder: Path, **keys: Any) -> Path:
    """A tiny model, rows and run.yaml in `folder`: LoRA with dropout, packed, 12 steps, a checkpoint every two."""
    values = {
        **lay_out(folder),
        "global_batch_size": 2,
        "max_steps": 12,
        "save_steps": 2,
        "eval_steps": 3,
        "output_dir": str(folder / "out"),
        **keys,
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@dataclass
class Job:
    """A running command."""

    process: subprocess.Popen[str]

    def rank(self, number: int, *, among: set[int] | None = None) -> int:
        """Process id of a rank of this job, once it is there."""
        end = time.monotonic() + 180
        while time.monotonic() < end:
            for child in descendants(self.process.pid):
                if environment_of(child).get("RANK") == str(number) and child not in (among or set()):
                    return child
            time.sleep(0.2)
        raise AssertionError(f"rank {number} never came up")

    def end(self, timeout: float = 240) -> tuple[int, str]:
        """Exit code and all output."""
        out, _ = self.process.communicate(timeout=timeout)
        return self.process.returncode, out


def start(*arguments: object, planted: Path | None = None) -> Job:
    """`eft ARGUMENTS`, output to a pipe; `planted`: a folder whose sitecustomize.py every process of it runs first."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    if planted is not None:
        environment["PYTHONPATH"] = os.pathsep.join([str(planted), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-m", "eft.cli", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )
    return Job(process)


def wait_for_checkpoint(output: Path, step: int) -> None:
    """Until a checkpoint of at least `step` is there."""
    end = time.monotonic() + 180
    while time.monotonic() < end:
        matches = (re.fullmatch(r"checkpoint-(\d+)", path.name) for path in output.glob("checkpoint-*"))
        if any(match and int(match[1]) >= step for match in matches):
            return
        time.sleep(0.05)
    raise AssertionError(f"no checkpoint-{step} in {output}")


def descendants(pid: int) -> list[int]:
    """Process ids below `pid`."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children") if Path(f"/proc/{pid}").exists() else []:
        try:
            for child in map(int, task.read_text().split()):
                found += [child, *descendants(child)]
        except OSError:
            continue
    return found


def environment_of(pid: int) -> dict[str, str]:
    """The variables a process was started with."""
    try:
        content = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    except OSError:
        return {}
    return dict(entry.split("=", 1) for entry in content.split("\0") if "=" in entry)


def kill(pid: int, number: signal.Signals) -> None:
    """Send a signal; gone already is fine."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return
