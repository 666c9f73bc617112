"""kill -9 at random moments of a run over a stream, start again, compare with the run that nobody touched.

python -m tests.faults.streaming --count 20
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from pathlib import Path

from tests.faults.cases import kill_after
from tests.faults.job import Job


def lay_out(folder: Path) -> Job:
    """The job of the other faults, over two sources that are tokenised while it trains."""
    rows = []
    draw = random.Random(1)
    for number in range(9):
        answer = " ".join(draw.choices(["red", "green", "blue", "one", "two"], k=draw.randint(1, 9)))
        turns = [{"role": "user", "content": f"held {number}"}, {"role": "assistant", "content": answer}]
        rows.append(json.dumps({"messages": turns}) + "\n")
    (folder / "more.jsonl").write_text("".join(rows[3:]))
    (folder / "held-out.jsonl").write_text("".join(rows[:3]))
    entries = {
        name: {"path": str(folder / f"{name}.jsonl"), "type": "chat_template"} for name in ("rows", "more", "held-out")
    }
    return Job.lay_out(
        folder,
        datasets=[entries["rows"], entries["more"]],
        test_datasets=[entries["held-out"]],
        val_set_size=0,
        streaming=True,
        streaming_multipack_buffer_size=11,
        data_gates="error",
    )


def main() -> None:
    """Exit code 1, through the error, where a run does not end as the straight one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    draw = random.Random(chosen.seed)
    with tempfile.TemporaryDirectory() as folder:
        job = lay_out(Path(folder))
        for number in range(chosen.count):
            share = draw.random()
            result = kill_after(share, job, Path(folder) / f"case-{number}")
            print(f"killed after {share:.0%} of the steps: {result.went_on}: bit-equal", flush=True)


if __name__ == "__main__":
    main()
