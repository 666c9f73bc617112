"""kill -9 of runs over a stream; see `streaming`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TIMEOUT_S = 1200


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_S)
def test_killed_streams_end_like_the_run_that_nobody_touched() -> None:
    command = [sys.executable, "-m", "tests.faults.streaming", "--count", "20", "--seed", "3"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count("bit-equal") == 20
    assert "checkpoint: bit-equal" in done.stdout
