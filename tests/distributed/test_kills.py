"""A seeded sample of what `make kills` does in full."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 600


@pytest.mark.timeout(TIMEOUT_S)
def test_killed_ranks_are_started_again_and_lose_nothing() -> None:
    # In a process of its own: it forks its children, and a test process may run threads.
    command = [sys.executable, "-m", "tests.distributed.kills", "--kills", "3", "--seed", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "every row once per epoch, bit-equal" in done.stdout
