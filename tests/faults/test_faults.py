"""A seeded sample of what `make faults` does in full: at least one case of every fault."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 600


def faults(*options: str) -> list[str]:
    """Lines of the cases. In a process of its own: it forks its children, and a test process may run threads."""
    command = [sys.executable, "-m", "tests.faults", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    return [line for line in done.stdout.splitlines() if line.endswith("bit-equal")]


@pytest.mark.timeout(TIMEOUT_S)
def test_a_sample_of_the_faults_holds() -> None:
    lines = faults("--sample", "14", "--seed", "5")
    assert len(lines) >= 13
    assert any("checkpoint: bit-equal" in line for line in lines), "none went on from a checkpoint: it shows nothing"
    assert any("clear error" in line for line in lines)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_kills_in_saves_lose_nothing() -> None:
    assert len(faults("--family", "kill -9, in saves")) == 120
