"""What kills cost: seconds from a kill to the first new step, and the share of the time that trains.

    python benchmarks/goodput.py

`eft train` is killed with SIGKILL at random moments and started again by the same command, each time as a cold process,
until the run is over. The goodput is the time that the run's steps need when nobody touches it, over the time that it
took. What the checkpoint interval allows is that time over itself plus, for every kill, half an interval of steps (the
mean that a kill loses) and the start of a process that trains from nothing: no checkpoint can do anything about either.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from startup import prepare
from tables import command_line, device_name, markdown_table, spread, today, write_section

POLL_S = 0.01


@dataclass
class Kills:
    """What a run that is killed again and again went through."""

    waits: list[float] = field(default_factory=list)
    """Seconds from each kill to the first new step of the next process."""
    lost: list[int] = field(default_factory=list)
    """Steps that each kill lost."""
    total: float = 0.0
    """Seconds from the first start to the end of the last step."""


@dataclass(frozen=True)
class Run:
    """One run of `eft train`, started as often as it takes."""

    folder: Path
    steps: int
    interval: int

    def start(self, output: str, steps: int | None = None) -> subprocess.Popen[bytes]:
        """A cold process."""
        keys = {"output_dir": self.folder / output, "max_steps": steps or self.steps}
        keys |= {"save_strategy": "steps", "save_steps": self.interval}
        eft = [sys.executable, "-c", "from eft.cli.app import main; main()"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        with (self.folder / "log").open("ab") as log:
            overrides = [f"{name}={value}" for name, value in keys.items()]
            command = [*eft, "train", str(self.folder / "eft.yaml"), "--no-report", *overrides]
            return subprocess.Popen(command, stdout=log, stderr=log, env=environment)

    def step(self, output: str) -> int:
        """The last logged step."""
        path = self.folder / output / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        for line in reversed(lines):
            if line.endswith("}") and "loss" in (row := json.loads(line)):
                return int(row["step"])
        return 0

    def wait_for(self, output: str, above: int, process: subprocess.Popen[bytes]) -> float:
        """Until a step above `above` is logged; the clock's time at that moment."""
        while self.step(output) <= above:
            if process.poll() not in (None, 0):
                raise RuntimeError((self.folder / "log").read_text()[-3000:])
            time.sleep(POLL_S)
        return time.monotonic()

    def straight(self) -> tuple[float, float]:
        """(seconds from the start to the first step, seconds of all steps after the first) when nobody touches it."""
        began = time.monotonic()
        process = self.start("straight")
        first = self.wait_for("straight", 0, process)
        last = self.wait_for("straight", self.steps - 1, process)
        process.wait()
        return first - began, last - first

    def killed(self, kills: int, shortest: float, longest: float, draw: random.Random) -> Kills:
        """Killed `kills` times, each so many seconds after the process's first new step."""
        found = Kills()
        began = time.monotonic()
        process = self.start("killed")
        self.wait_for("killed", 0, process)
        for _ in range(kills):
            time.sleep(draw.uniform(shortest, longest))
            process.send_signal(signal.SIGKILL)
            process.wait()
            at, reached = time.monotonic(), self.step("killed")
            if reached >= self.steps:
                break
            saved = [
                int(path.parent.name.split("-")[1]) for path in self.folder.glob("killed/checkpoint-*/manifest.json")
            ]
            metrics = self.folder / "killed" / "metrics.jsonl"
            before = _file(metrics)
            process = self.start("killed")
            # The next process replaces the file, without the rows after its checkpoint, before it logs a new one.
            while _file(metrics) in (before, None) and process.poll() is None:
                time.sleep(POLL_S)
            resumed = max(saved, default=0)
            found.lost.append(reached - resumed)
            found.waits.append(self.wait_for("killed", resumed, process) - at)
        found.total = self.wait_for("killed", self.steps - 1, process) - began
        process.wait()
        return found


def _file(path: Path) -> int | None:
    """Which file lies there: another number when it was replaced."""
    return path.stat().st_ino if path.exists() else None


def main() -> None:
    """Measure, print, and write the section of docs/benchmarks.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=16_000)
    parser.add_argument("--interval", type=int, default=200, help="`save_steps`.")
    parser.add_argument("--shortest", type=float, default=2.0, help="Seconds of training before a kill, at least.")
    parser.add_argument("--longest", type=float, default=8.0, help="The same, at most.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-write", action="store_true", help="Leave docs/benchmarks.md alone.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, 400)
        run = Run(folder, options.steps, options.interval)
        run.start("prepared", 1).wait()  # fills the data cache
        start_s, steps_s = run.straight()
        kills = run.killed(options.kills, options.shortest, options.longest, random.Random(options.seed))
    step_s = steps_s / (options.steps - 1)
    useful = start_s + steps_s
    count = len(kills.waits)
    allowed = useful / (useful + count * (options.interval / 2 * step_s + start_s))
    goodput = useful / kills.total
    table = markdown_table(
        ["", "value"],
        [
            ["kill → first new step, s", spread(kills.waits)],
            ["start of a process → first step, nothing to resume, s", f"{start_s:.2f}"],
            [
                "steps lost by a kill",
                f"{spread([float(n) for n in kills.lost], 0)} of an interval of {options.interval}",
            ],
            ["goodput", f"{goodput:.1%}"],
            ["what interval and start allow", f"{allowed:.1%}"],
            ["share of that", f"{goodput / allowed:.1%}"],
        ],
    )
    body = (
        f"## Kills\n\n`{command_line()}`, {today()}, {device_name('cpu')}, torch {torch.__version__}. A tiny model, "
        f"{options.steps:,} steps of {1000 * step_s:.1f} ms (median kill after "
        f"{statistics.mean((options.shortest, options.longest)):.0f} s of training), {count} kills; median (least to "
        f"most).\n\n{table}"
    )
    print(body)
    if not options.no_write:
        write_section("goodput", body)


if __name__ == "__main__":
    main()
