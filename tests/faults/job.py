"""A real, tiny training job, started as often as wanted from one warm process: forking costs no imports.

The job packs, trains LoRA with dropout, evaluates every three steps, saves every two beside the training and keeps two
checkpoints, so that a fault can meet any of that. What two equal runs must agree in is `outcome`.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from eft import inputs, run
from eft.cli.console import quiet_libraries
from eft.config.load import config_from_mapping
from eft.core.constants import EXIT_USAGE, METRICS_FILE
from eft.core.errors import EftError, RunFinished
from eft.core.hashing import hash_file
from eft.data.dataset_meta import DatasetMeta
from eft.runtime import run_folder
from eft.runtime.checkpoint import CheckpointStore
from tests.forked import work_and_leave
from tests.tiny_run import lay_out

STEPS = 12
SAVE_EVERY = 2
EVALUATE_EVERY = 3
_TIMES = {"time", "tokens_per_second", "trained_tokens_per_second"}
_COMPARED = ("adapter_model.safetensors", "optimizer.safetensors", "optimizer.json", "rng_0.safetensors", "rng_0.json")
TIMEOUT_S = 120.0

Prepare = Callable[[Path], None]
"""Run in the child before it trains: arms the fault."""


@dataclass
class Ended:
    """How one start of the job ended."""

    code: int
    """Exit code; minus the signal's number where one ended it."""
    text: str
    """What it printed."""
    seconds: float


@dataclass
class Job:
    """The job in a folder of its own; `settings` lack only `output_dir`."""

    folder: Path
    settings: dict[str, Any]
    meta: DatasetMeta | None = None
    straight: dict[str, Any] = field(default_factory=dict)
    """The outcome of the run that nobody touched."""
    seconds: float = TIMEOUT_S
    """What that took."""

    @classmethod
    def lay_out(cls, folder: Path, **changes: Any) -> Job:
        """Model, rows and config, prepared data, and the run that nobody touches."""
        # As `eft train` does; and a bar's lock, which all forks share, would stay taken by one that is killed.
        quiet_libraries()
        settings = {
            **lay_out(folder),
            "gradient_accumulation_steps": 2,
            "max_steps": STEPS,
            "save_steps": SAVE_EVERY,
            "save_total_limit": 2,
            "eval_steps": EVALUATE_EVERY,
        }
        job = cls(folder, {**settings, **changes})
        job.meta = inputs.load_datasets(config_from_mapping({**job.settings, "output_dir": str(folder / "none")}))
        # Every training collects garbage; without what the imports left there is little to walk through.
        gc.collect()
        gc.freeze()
        # Three times: the first one touches the memory that all children share.
        outcomes = []
        for name in ("warm", "again", "straight"):
            ended = job.run(folder / name)
            assert ended.code == 0, ended.text
            outcomes.append(outcome(folder / name))
            # The shortest: what a kill by the clock comes after.
            job.seconds = min(job.seconds, ended.seconds)
        assert outcomes[0] == outcomes[1] == outcomes[2], "straight runs differ"
        job.straight = outcomes[-1]
        return job

    def start(self, output: Path, prepare: Prepare | None = None) -> int:
        """Fork a child that trains into `output`; returns its process id."""
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            work_and_leave(output.with_name(output.name + ".log"), lambda: self._train(output, prepare))
        return child

    def _train(self, output: Path, prepare: Prepare | None) -> int:
        """What `eft train` does, without its command line."""
        torch.set_num_threads(1)
        run_folder.WAIT_S = 0.3
        if prepare is not None:
            prepare(output)
        try:
            config = config_from_mapping({**self.settings, "output_dir": str(output)})
            _, _, trainer = run.train(config, self.meta, console=Console(file=sys.stdout, width=200))
        except RunFinished as finished:
            print(finished)
            return 0
        except EftError as error:
            print(f"error: {error}")
            return EXIT_USAGE
        code: int = trainer.outcome.exit_code
        return code or int(trainer.outcome.failed)

    def wait(self, output: Path, child: int, since: int = 0) -> Ended:
        """Wait for a child of `start`; `since`: where its text begins in the log."""
        started = time.monotonic()
        while True:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                break
            if time.monotonic() - started > TIMEOUT_S:
                os.kill(child, signal.SIGKILL)
            time.sleep(0.005)
        log = output.with_name(output.name + ".log")
        text = log.read_bytes()[since:].decode(errors="replace") if log.exists() else ""
        return Ended(os.waitstatus_to_exitcode(status), text, time.monotonic() - started)

    def run(self, output: Path, prepare: Prepare | None = None) -> Ended:
        """Start and wait."""
        log = output.with_name(output.name + ".log")
        since = log.stat().st_size if log.exists() else 0
        return self.wait(output, self.start(output, prepare), since)


def outcome(output: Path) -> dict[str, Any]:
    """What two equal runs must agree in."""
    last = output / f"checkpoint-{STEPS}"
    return {
        "export": hash_file(output / "adapter_model.safetensors"),
        **{f"checkpoint {name}": hash_file(last / name) for name in _COMPARED},
        "metrics": [
            {name: value for name, value in row.items() if name not in _TIMES and "runtime" not in name
             and "per_second" not in name}
            for row in metrics(output)
        ],
    }  # fmt: skip


def metrics(output: Path) -> list[dict[str, Any]]:
    """The logged rows; a last line that a kill cut off is left out."""
    rows = []
    path = output / METRICS_FILE
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def last_step(output: Path) -> int:
    """The last step that was logged; 0 before the first."""
    return max((row["step"] for row in metrics(output) if "loss" in row), default=0)


def newest(output: Path) -> int:
    """The step of the newest complete checkpoint; 0 where there is none."""
    found = CheckpointStore(output, save_total_limit=None).newest_complete().path
    return int(found.name.rpartition("-")[2]) if found is not None else 0


def status(output: Path) -> str:
    """What run.json says; `none` before it is there."""
    path = output / "run.json"
    return str(json.loads(path.read_text())["status"]) if path.exists() else "none"
