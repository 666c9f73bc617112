"""A seeded sample of what `make kills` does in full, and what it takes for a failure of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from tests.distributed.kills import Blow, Broken, check_causes

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 600


@pytest.mark.timeout(TIMEOUT_S)
def test_killed_ranks_are_started_again_and_lose_nothing() -> None:
    # In a process of its own: it forks its children, and a test process may run threads.
    command = [sys.executable, "-m", "tests.distributed.kills", "--kills", "3", "--seed", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "every row once per epoch, bit-equal" in done.stdout


CASES = {
    "the one that was killed": ([(-9, 1)], {}, True),
    "the one that lost its connection": ([(1, 0)], {(0, 0): True}, True),
    "both": ([(-9, 1)], {(0, 0): True}, True),
    "its neighbour for a reason of its own": ([(-9, 1)], {(0, 0): False}, False),
    "it failed before it was killed": ([(1, 1)], {(0, 1): True}, False),
    "a signal that nobody sent": ([(-11, 1)], {}, False),
    "a second attempt that nobody touched": ([(-9, 1), (1, 0)], {(1, 0): True}, False),
    "nothing, though it was killed": ([], {}, False),
}


@pytest.mark.parametrize("case", CASES)
def test_only_failures_that_follow_from_a_kill_are_let_pass(case: str, tmp_path: Path) -> None:
    """Rank 1 of the first attempt was killed. What torchrun reported, what ranks left and whether it followed."""
    reported, left, holds = CASES[case]
    for (attempt, rank), followed in left.items():
        path = tmp_path / "run_x" / f"attempt_{attempt}" / str(rank) / "error.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"message": {"eft": {"followed": followed}}}))
    text = "\n".join(f"failed (exitcode: {code}) local_rank: {rank} (pid: 7)" for code, rank in reported)
    with nullcontext() if holds else pytest.raises(Broken, match="1 kills"):
        check_causes([Blow("training", 1, 1, 0.0, 1)], text, tmp_path)
