"""The faults, one function each: let it strike a run, continue, compare with the run that nobody touched."""

from __future__ import annotations

import os
import random
import re
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from eft.core.constants import EXIT_STOP_FILE, EXIT_USAGE, MANIFEST_NAME, METRICS_FILE
from eft.runtime import stop
from eft.runtime.checkpoint import CheckpointStore
from tests.faults.job import SAVE_EVERY, STEPS, Ended, Job, last_step, newest, outcome, status
from tests.faults.moments import at_evaluation_batch, at_file_event, send, with_clock_going_back
from tests.faults.mounts import can_mount, in_own_mounts, mount, remount

ROOMY_KIB = 1 << 18


class Broken(Exception):  # noqa: N818  # a finding, not an error of the program
    """A promise that does not hold; says which."""


@dataclass(frozen=True)
class Result:
    """How a case ended well."""

    went_on: str
    """`checkpoint`, `anew` (nothing was saved yet) or `over` (nothing was left to do)."""
    clear_error: bool = False
    """The fault was met by one message."""


@dataclass(frozen=True)
class Case:
    """One fault at one moment."""

    family: str
    name: str
    run: Callable[[Job, Path], Result]


def continued(job: Job, output: Path, *, clear_error: bool = False) -> Result:
    """Start the same command again: it goes on from the newest complete checkpoint and ends as the straight run."""
    complete, over = newest(output), status(output) == "finished"
    ended = job.run(output)
    if ended.code != 0:
        raise Broken(f"does not go on: exit code {ended.code}\n{ended.text[-2000:]}")
    found = re.findall(r"from checkpoint-(\d+)\.", ended.text)
    if not over and (int(found[-1]) if found else 0) != complete:
        raise Broken(f"checkpoint-{complete} was complete, but the run went on from {found}")
    if over and "finished" not in ended.text:
        raise Broken(f"a finished run is not said to be finished: {ended.text[-500:]}")
    _compare(job, output)
    return Result("over" if over else "checkpoint" if complete else "anew", clear_error)


def _compare(job: Job, output: Path) -> None:
    got = outcome(output)
    different = [key for key, value in job.straight.items() if got[key] != value]
    if different:
        raise Broken(f"differs from the straight run in {', '.join(different)}")


def _wait_until(at: float, job: Job, output: Path, child: int) -> None:
    """A moment of the training: step `at` · STEPS, and the part of a step that is left over by the clock.

    Whatever else the machine does; a run that ends earlier is not waited for.
    """
    step = int(at * STEPS)
    while not (output / METRICS_FILE).exists() or last_step(output) < step:
        if _is_over(child):
            return
        time.sleep(0.004)
    time.sleep((at * STEPS - step) * job.seconds / STEPS)


def _is_over(child: int) -> bool:
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _no_save_lost(output: Path) -> None:
    """At most the save that was under way is missing: one starts after the one before is on the disk."""
    done = last_step(output)
    surely = (done - 1) // SAVE_EVERY * SAVE_EVERY - SAVE_EVERY
    if newest(output) < surely:
        raise Broken(f"step {done} was done, but the newest complete checkpoint is {newest(output)}")


# ---- kill -9 -------------------------------------------------------------------------------------------------------


def kill_after(at: float, job: Job, output: Path) -> Result:
    child = job.start(output)
    _wait_until(at, job, output, child)
    os.kill(child, signal.SIGKILL)
    job.wait(output, child)
    _no_save_lost(output)
    return continued(job, output)


def kill_at_event(number: int, job: Job, output: Path) -> Result:
    job.run(output, at_file_event(number, send(signal.SIGKILL)))
    _no_save_lost(output)
    return continued(job, output)


def kill_again_and_again(seed: int, job: Job, output: Path) -> Result:
    """A supervisor that starts the same command for ever, also after it has finished."""
    draw = random.Random(seed)
    for _ in range(60):
        path = output / METRICS_FILE
        before = path.stat().st_ino if path.exists() else 0
        child = job.start(output)
        # Every start replaces the file as soon as it trains. Some are killed before.
        end = time.monotonic() + draw.choice([0.5, 10.0, 10.0]) * job.seconds
        while (not path.exists() or path.stat().st_ino == before) and time.monotonic() < end and not _is_over(child):
            time.sleep(0.004)
        time.sleep(draw.uniform(0.0, 0.5) * job.seconds)
        os.kill(child, signal.SIGKILL)
        if job.wait(output, child).code == 0:
            break
    result = continued(job, output)
    for _ in range(2):
        if job.run(output).code != 0:
            raise Broken("a finished run that is started again fails")
    _compare(job, output)
    return result


# ---- asked to stop -------------------------------------------------------------------------------------------------


def _stopped(job: Job, output: Path, ended: Ended, code: int) -> Result:
    """After a request: finished all the same, or stopped with a checkpoint of its very last step, or not yet begun."""
    if ended.code == code:
        if status(output) != "interrupted":
            raise Broken(f"exit code {code}, but run.json says {status(output)}")
        if newest(output) != last_step(output):
            raise Broken(f"step {last_step(output)} was done, newest is checkpoint-{newest(output)}: steps lost")
    elif ended.code == 0:
        if status(output) != "finished":
            raise Broken(f"exit code 0, but run.json says {status(output)}")
    elif ended.code not in (-signal.SIGTERM, -signal.SIGUSR1, 130) or last_step(output) not in (0, STEPS):
        # Outside of the training the signal does what it always does: there is nothing to save.
        raise Broken(f"exit code {ended.code} after step {last_step(output)}\n{ended.text[-2000:]}")
    return continued(job, output)


def stop_after(number: signal.Signals, at: float, job: Job, output: Path) -> Result:
    child = job.start(output)
    _wait_until(at, job, output, child)
    os.kill(child, number)
    return _stopped(job, output, job.wait(output, child), 128 + number)


def stop_inside(number: signal.Signals, prepare: Callable[[Path], None], job: Job, output: Path) -> Result:
    return _stopped(job, output, job.run(output, prepare), 128 + number)


def stop_by_file(at: float, job: Job, output: Path) -> Result:
    def looks_often(folder: Path) -> None:
        stop.FILE_EVERY_S = 0.0

    child = job.start(output, looks_often)
    _wait_until(at, job, output, child)
    (output / "STOP").touch()
    result = _stopped(job, output, job.wait(output, child), EXIT_STOP_FILE)
    if (output / "STOP").exists() and result.went_on != "over":
        raise Broken("the stop file is still there")
    return result


def stop_twice(at: float, job: Job, output: Path) -> Result:
    """The second signal stops at once: what was not saved yet is lost, nothing else."""
    child = job.start(output)
    _wait_until(at, job, output, child)
    os.kill(child, signal.SIGTERM)
    os.kill(child, signal.SIGINT)
    job.wait(output, child)
    _no_save_lost(output)
    return continued(job, output)


# ---- disks ---------------------------------------------------------------------------------------------------------


def _one_error(ended: Ended, *words: str) -> None:
    errors = [line for line in ended.text.splitlines() if line.startswith("error: ")]
    if ended.code != EXIT_USAGE or len(errors) != 1 or not any(word in errors[0] for word in words):
        raise Broken(f"no clear error: exit code {ended.code}\n{ended.text[-2000:]}")
    if "Traceback" in ended.text:
        raise Broken(f"a traceback beside the error\n{ended.text[-2000:]}")


def disk_full(kib: int, job: Job, output: Path) -> Result:
    """The disk has `kib` KiB, less than the run needs; then it gets room."""

    def work() -> Result:
        disk = output.with_name(output.name + "-disk")
        mount(disk, kib)
        ended = job.run(disk / "out")
        if ended.code == 0:
            _compare(job, disk / "out")
            return Result("over")
        _one_error(ended, "full", "No space left", "free")
        _no_save_lost(disk / "out")
        remount(disk, ROOMY_KIB)
        return continued(job, disk / "out", clear_error=True)

    result: Result = in_own_mounts(work)
    return result


def file_limit(kib: int, job: Job, output: Path) -> Result:
    """Where nobody may mount: no file may become larger than `kib` KiB."""

    def limit(folder: Path) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (kib << 10, resource.RLIM_INFINITY))

    ended = job.run(output, limit)
    if ended.code == 0:
        _compare(job, output)
        return Result("over")
    _one_error(ended, "full", "too large")
    return continued(job, output, clear_error=True)


def read_only(after_step: int, job: Job, output: Path) -> Result:
    """The disk can no longer be written after some step (0: from the start), and later it can."""

    def work() -> Result:
        disk = output.with_name(output.name + "-disk")
        mount(disk, ROOMY_KIB)
        out = disk / "out"
        out.mkdir()
        if after_step == 0:
            remount(disk, ROOMY_KIB, read_only=True)
        # The log of the child lies elsewhere, or it would keep the disk busy.
        link = output.with_name(output.name + "-link")
        link.symlink_to(out)
        child = job.start(link)
        while after_step and last_step(out) < after_step:
            time.sleep(0.002)
        if after_step:
            remount(disk, ROOMY_KIB, read_only=True)
        ended = job.wait(link, child)
        remount(disk, ROOMY_KIB)
        if ended.code == 0:
            _compare(job, out)
            return Result("over")
        _one_error(ended, "Read-only", "cannot be written", "not written")
        return continued(job, link, clear_error=True)

    result: Result = in_own_mounts(work)
    return result


# ---- damage --------------------------------------------------------------------------------------------------------


def damaged(kind: str, file: str, template: Path, job: Job, output: Path) -> Result:
    """A file of the newest checkpoint is damaged: the one before is continued from."""
    shutil.copytree(template, output)
    steps = CheckpointStore(output, save_total_limit=None).steps()
    older, path = output / f"checkpoint-{steps[-2]}" / file, output / f"checkpoint-{steps[-1]}" / file
    data = path.read_bytes()
    if kind == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif kind == "bit-flipped":
        path.write_bytes(data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 16]) + data[len(data) // 2 + 1 :])
    elif kind == "missing":
        path.unlink()
    else:
        path.write_bytes(older.read_bytes())
        older.write_bytes(data)
    unharmed = file != MANIFEST_NAME and kind == "swapped" and older.read_bytes() == path.read_bytes()
    expected = steps[-1] if unharmed else steps[-2] if kind != "swapped" else 0
    if newest(output) != expected:
        raise Broken(f"checkpoint-{newest(output)} is taken for the newest complete one")
    return continued(job, output)


# ---- others --------------------------------------------------------------------------------------------------------


def two_at_once(share: float, job: Job, output: Path) -> Result:
    """A second start while the first one trains: one of them trains, the other says so."""
    first = job.start(output)
    time.sleep(share * job.seconds)
    second = job.start(output)
    ends = [job.wait(output, first), job.wait(output, second)]
    if sorted(ended.code for ended in ends) not in ([0, 0], [0, EXIT_USAGE]):
        raise Broken(f"exit codes {[ended.code for ended in ends]}\n{ends[0].text[-3000:]}")
    refused = any(ended.code for ended in ends)
    if refused and "another process is training in it" not in ends[0].text:
        raise Broken(f"no clear error\n{ends[0].text[-2000:]}")
    _compare(job, output)
    return Result("over", refused)


def clock_back(at: float, job: Job, output: Path) -> Result:
    """The clock jumps back an hour every 50 ms, also over the kill; what is there seems to be of tomorrow."""
    child = job.start(output, with_clock_going_back(0.05, 3600.0))
    _wait_until(at, job, output, child)
    os.kill(child, signal.SIGKILL)
    job.wait(output, child)
    tomorrow = time.time() + 86400
    for path in output.rglob("*") if output.exists() else ():
        os.utime(path, (tomorrow, tomorrow))
    return continued(job, output)


# ---- which cases ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Counts:
    """How many cases of each family."""

    kill_by_time: int = 100
    kill_in_saves: int = 120
    supervised: int = 4
    sigterm: int = 60
    other_signals: int = 12
    stop_file: int = 12
    twice: int = 8
    disk_full: int = 20
    read_only: int = 6
    damage_files: int = 100
    two_at_once: int = 6
    clock: int = 6


def cases(job: Job, draw: random.Random, counts: Counts, file_events: int) -> Iterator[Case]:
    """All of them; `file_events`: file operations of the straight run."""

    def share() -> float:
        return draw.uniform(0.0, 1.0)

    def event() -> int:
        return draw.randint(1, file_events)

    for _ in range(counts.kill_by_time):
        yield Case("kill -9, by the clock", f"{(at := share()):.2f} of the steps", partial(kill_after, at))
    for _ in range(counts.kill_in_saves):
        yield Case("kill -9, in saves and retention", f"file operation {(at := event())}", partial(kill_at_event, at))
    for number in range(counts.supervised):
        yield Case("kill -9 until it is over", f"series {number}", partial(kill_again_and_again, draw.randrange(10**6)))
    yield from _requests(share, event, counts)
    yield from _disks(job, draw, counts)
    if counts.damage_files:
        yield from _damages(job, draw, counts.damage_files)
    for _ in range(counts.two_at_once):
        yield Case("two runs in one folder", f"{(at := draw.random()):.2f} of its time", partial(two_at_once, at))
    for _ in range(counts.clock):
        yield Case("clock jumping back", f"{(at := share()):.2f} of the steps", partial(clock_back, at))


def _requests(share: Callable[[], float], event: Callable[[], int], counts: Counts) -> Iterator[Case]:
    names = [(signal.SIGTERM, counts.sigterm), (signal.SIGINT, counts.other_signals)]
    for number, count in [*names, (signal.SIGUSR1, counts.other_signals)]:
        for turn in range(count):
            family = number.name
            if turn % 3 == 0:
                yield Case(family, f"{(at := share()):.2f} of the steps", partial(stop_after, number, at))
            elif turn % 3 == 1:
                inside = at_file_event(where := event(), send(number))
                yield Case(family, f"file operation {where}", partial(stop_inside, number, inside))
            else:
                inside = at_evaluation_batch(where := 1 + turn // 3 % 8, send(number))
                yield Case(family, f"evaluation batch {where}", partial(stop_inside, number, inside))
    for _ in range(counts.stop_file):
        yield Case("stop file", f"{(at := share()):.2f} of the steps", partial(stop_by_file, at))
    for _ in range(counts.twice):
        yield Case("a second signal", f"{(at := share()):.2f} of the steps", partial(stop_twice, at))


def _disks(job: Job, draw: random.Random, counts: Counts) -> Iterator[Case]:
    mounts = can_mount(job.folder / "probe")
    size = sum(path.stat().st_size for path in (job.folder / "straight").rglob("*") if path.is_file()) >> 10
    for _ in range(counts.disk_full):
        kib = draw.randint(size // 8, size)
        if mounts:
            yield Case("disk full (tmpfs)", f"{kib} KiB", partial(disk_full, kib))
        else:
            kib = draw.randint(1, max(2, size // 12))
            yield Case("disk full (limit on file sizes)", f"{kib} KiB", partial(file_limit, kib))
    for turn in range(counts.read_only if mounts else 0):
        step = (turn * 3) % STEPS
        yield Case("read-only output", f"after step {step}", partial(read_only, step))


def _damages(job: Job, draw: random.Random, count: int) -> Iterator[Case]:
    template = job.folder / "damage-template"
    # Stopped in the evaluation of step 9: that step's checkpoint and the one of step 8 are there.
    job.run(template, at_evaluation_batch(3, send(signal.SIGTERM)))
    newest_folder = template / f"checkpoint-{newest(template)}"
    files = sorted(path.name for path in newest_folder.iterdir())
    kinds = [(kind, file) for file in files for kind in ("truncated", "bit-flipped", "missing", "swapped")]
    for kind, file in kinds if count >= len(kinds) else draw.sample(kinds, count):
        yield Case("damaged newest checkpoint", f"{file} {kind}", partial(damaged, kind, file, template))
