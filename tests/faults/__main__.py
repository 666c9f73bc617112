"""Let every fault strike a real training run, and write what came of it.

    python -m tests.faults                 all of them; writes the table of docs/faults.md
    python -m tests.faults --sample 14     a seeded choice, at least one of each family; writes nothing

One process imports everything once and forks a child per start. Exit code 1 when any case does not hold.
"""

from __future__ import annotations

import argparse
import os
import pickle
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import torch

from tests.faults.cases import Broken, Case, Counts, Result, cases
from tests.faults.job import STEPS, Job
from tests.faults.moments import count_file_events
from tests.faults.test_power_loss import losses, record

PAGE = Path(__file__).parents[2] / "docs" / "faults.md"
BEGIN, END = "<!-- faults -->", "<!-- /faults -->"
COLUMNS = ("fault", "cases", "went on from a checkpoint", "anew", "over already", "one clear error", "held")
Outcomes = dict[str, list[tuple[Case, Result | Broken]]]


def sample(chosen: list[Case], size: int, draw: random.Random) -> list[Case]:
    """One case of each family, then any others."""
    shuffled = draw.sample(chosen, len(chosen))
    first = {case.family: case for case in reversed(shuffled)}
    rest = [case for case in shuffled if first[case.family] is not case]
    return [*first.values(), *rest][: max(size, len(first))]


def run_all(job: Job, chosen: list[Case], jobs: int) -> Outcomes:
    """Every case in a folder of its own, with a line each; `jobs` at a time, each in a forked process."""
    parts = range(max(1, min(jobs, len(chosen))))
    pipes = [os.pipe() for _ in parts]
    workers = []
    for part in parts:
        sys.stdout.flush()
        workers.append(os.fork())
        if workers[-1] == 0:
            try:
                with os.fdopen(pipes[part][1], "wb") as pipe:
                    pickle.dump(
                        [run_one(job, n, case) for n, case in enumerate(chosen) if n % len(parts) == part], pipe
                    )
            finally:
                os._exit(0)
    results: dict[int, Result | Broken] = {}
    for reader, writer in pipes:
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            results.update(pickle.loads(pipe.read()))
    for worker in workers:
        os.waitpid(worker, 0)
    found: Outcomes = {}
    for number, case in enumerate(chosen):
        found.setdefault(case.family, []).append((case, results[number]))
    return found


def run_one(job: Job, number: int, case: Case) -> tuple[int, Result | Broken]:
    """One case, and nothing of it left."""
    output = job.folder / f"case-{number}"
    started, cpu = time.monotonic(), sum(os.times()[2:4])
    try:
        result: Result | Broken = case.run(job, output)
        verdict = f"{'clear error, ' if result.clear_error else ''}{result.went_on}: bit-equal"
    except Broken as broken:
        result, verdict = broken, f"BROKEN: {broken}"
    except Exception:
        result = Broken(traceback.format_exc())
        verdict = f"BROKEN: {result}"
    spent = f"{time.monotonic() - started:.1f} s, {sum(os.times()[2:4]) - cpu:.1f} s of CPU"
    print(f"{number:4} {case.family}, {case.name} ({spent}): {verdict}", flush=True)
    for path in job.folder.glob(f"case-{number}*"):
        if path.name.removeprefix(output.name)[:1].isdigit():
            continue
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    return number, result


def power_losses(folder: Path) -> tuple[int, list[str]]:
    """The disks that a power failure may leave, at every operation of saves and retention; those that lost one."""
    tried, lost = 0, []
    for limit in (1, 2):
        for asynchronous in (False, True):
            name = folder / f"power-{limit}-{asynchronous}"
            found, count = losses(record(name, limit=limit, asynchronous=asynchronous), folder / "after")
            tried, lost = tried + count, lost + found
    return tried, lost


def table(found: Outcomes, disks: int | None) -> str:
    """The rows of docs/faults.md."""
    rows = ["| " + " | ".join(COLUMNS) + " |", "| --- |" + " ---: |" * (len(COLUMNS) - 1)]
    for family, entries in found.items():
        good = [result for _, result in entries if isinstance(result, Result)]
        ways = Counter(result.went_on for result in good)
        errors = sum(result.clear_error for result in good)
        cells = [family, len(entries), ways["checkpoint"], ways["anew"], ways["over"], errors, len(good)]
        rows.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    if disks is not None:
        rows.append(f"| power failure, simulated states of the disk | {disks:,} | | | | | {disks:,} |")
    return "\n".join(rows)


def write_page(body: str) -> None:
    """Replace the part of the page between its marks."""
    text = PAGE.read_text()
    head, rest = text.split(BEGIN)
    PAGE.write_text(f"{head}{BEGIN}\n{body}\n{END}{rest.split(END)[1]}")


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, help="Only so many cases, at least one of each family.")
    parser.add_argument("--family", help="Only families whose name holds this text.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="So many cases at a time.")
    options = parser.parse_args()
    draw = random.Random(options.seed)
    torch.set_num_threads(1)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        job = Job.lay_out(folder)
        job.run(folder / "counted", count_file_events(folder / "events"))
        events = len((folder / "events").read_text().splitlines())
        print(f"the straight run: {STEPS} steps, {job.seconds:.2f} s, {events} file operations", flush=True)
        chosen = list(cases(job, draw, Counts(), events))
        if options.family is not None:
            chosen = [case for case in chosen if options.family in case.family]
        if options.sample is not None:
            chosen = sample(chosen, options.sample, draw)
        found = run_all(job, chosen, options.jobs)
        disks, lost = power_losses(folder) if options.sample is None and options.family is None else (None, [])
    ended = [entry for entries in found.values() for entry in entries]
    broken = [f"{case.family}, {case.name}: {result}" for case, result in ended if isinstance(result, Broken)]
    total = len(ended)
    print(f"{total - len(broken)} of {total} cases held; {time.monotonic() - started:.0f} s")
    for text in [*broken, *lost]:
        print(f"BROKEN {text}")
    if disks is not None:
        when = datetime.now(UTC).date().isoformat()
        write_page(
            f"`make faults`, {when}, seed {options.seed}: {total} cases, "
            f"{(time.monotonic() - started) / 60:.0f} minutes on {os.cpu_count()} cores; {len(broken) + len(lost)} did "
            f"not hold.\n\n{table(found, disks)}"
        )
    return 1 if broken or lost else 0


if __name__ == "__main__":
    sys.exit(main())
