"""E3 under kill -9: a seeded sample of what `make faults` does fifty times."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 1800


@pytest.mark.timeout(TIMEOUT_S)
@pytest.mark.parametrize("count", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_runs_end_like_the_run_that_nobody_touched(count: int) -> None:
    # In a process of its own: the harness forks its children, and a test process may already run threads.
    command = [sys.executable, "-m", "tests.faults.kill_and_resume", "--count", str(count), "--seed", "3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    lines = [line for line in done.stdout.splitlines() if "killed after" in line]
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert len(lines) == count
    assert all(line.endswith("bit-equal") for line in lines)
    assert any("checkpoint-" in line for line in lines), "no trial resumed from a checkpoint: the sample shows nothing"
