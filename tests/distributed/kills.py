"""Kill ranks of runs of two processes, again and again, and compare each end with that of the run nobody touched.

    python -m tests.distributed.kills                    50 kills and more; writes the table of docs/parallel.md
    python -m tests.distributed.kills --kills 4          so many at least; writes nothing
    python -m tests.distributed.kills --launcher ray     on workers of Ray Train, which starts them again

torchrun, as `eft train --nproc 2 --max-restarts` uses it, starts all ranks again after each kill. Most runs have their
ranks forked from this process, which has imported everything: a new interpreter would import for ten seconds per
restart. `--commands N` runs are the command itself. Exit code 1 when any run does not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.distributed.launcher.api import elastic_launch

from eft.cli.app import main as eft
from eft.cli.console import quiet_libraries
from eft.core.constants import MANIFEST_NAME
from eft.core.hashing import hash_file
from eft.data.loader import MicroBatch, TrainSampler
from eft.parallel.launch import Fleet, launch_config
from eft.trainer.checkpoint import PROGRESS_FILE, STATE_FILE
from tests.distributed.commands import kill, start, write_run
from tests.faults.job import metrics
from tests.faults.moments import at_file_event, send
from tests.forked import work_and_leave

PAGE = Path(__file__).parents[2] / "docs" / "parallel.md"
NPROC = 2
EPOCHS = 3
TIMEOUT_S = 600.0
MOMENTS = ("starting", "training", "saving")
_REPORTED = re.compile(r"failed \(exitcode: (-?\d+)\) local_rank: (\d+)")
"""What torchrun logs of a failed attempt."""
_TIMES = ("time", "runtime", "per_second", "seconds")
_NOT_COMPARED = (STATE_FILE, PROGRESS_FILE, "adapter_config.json")
"""Files of a checkpoint with times in them, of which the first repeats the logged numbers; with names in any order."""


Steps = dict[int, list[int]]
"""Sorted samples of each step."""


class Broken(Exception):  # noqa: N818  # a finding, not an error of the program
    """A run that does not hold; says why."""


@dataclass
class Notes:
    """What the ranks of a run write down, in a folder: who they are, and which samples they train on."""

    folder: Path

    def add(self, kind: str, **facts: Any) -> None:
        """A line by this rank, in one write: it may be the last thing that the process does."""
        facts |= {"attempt": int(os.environ["TORCHELASTIC_RESTART_COUNT"]), "rank": int(os.environ["RANK"])}
        descriptor = os.open(self.folder / kind, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.write(descriptor, json.dumps(facts).encode() + b"\n")
        os.close(descriptor)

    def of(self, kind: str) -> list[dict[str, Any]]:
        """All lines."""
        path = self.folder / kind
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def steps(self) -> Steps:
        """Samples of each step, by the attempt that the run's end came from: the last one that came to the step."""
        found: dict[int, tuple[int, list[int]]] = {}
        for line in self.of("samples"):
            attempt, samples = found.get(line["step"], (-1, []))
            if line["attempt"] > attempt:
                attempt, samples = line["attempt"], []
            if line["attempt"] == attempt:
                found[line["step"]] = (attempt, samples + line["samples"])
        return {step: sorted(samples) for step, (_, samples) in sorted(found.items())}


@dataclass(frozen=True)
class Blow:
    """When one attempt of a run is killed."""

    moment: str
    """One of MOMENTS."""
    victim: int
    """Rank."""
    steps: int
    """In a step: how many this attempt has begun before."""
    delay_s: float
    """After its start, or after that step's."""
    event: int
    """In a save: which file operation in a checkpoint of this attempt; it may be one that reads."""

    @classmethod
    def draw(cls, draw: random.Random) -> Blow:
        """A random one."""
        moment = draw.choice(MOMENTS)
        delay_s = draw.uniform(0.0, 1.5 if moment == "starting" else 0.1)
        return cls(moment, draw.randrange(NPROC), draw.randint(1, 6), delay_s, draw.randint(1, 40))


@dataclass
class Plan:
    """One for each attempt of a run but the last."""

    blows: list[Blow]
    landed: list[Blow] = field(default_factory=list)
    """Those that met a living process."""

    @classmethod
    def draw(cls, draw: random.Random, kills: int) -> Plan:
        """A random one."""
        return cls([Blow.draw(draw) for _ in range(kills)])


# ---- one run -------------------------------------------------------------------------------------------------------


def rank_main(notes: Notes, blows: list[Blow], output: Path, arguments: list[str]) -> None:
    """What a forked rank does: the command, with its samples written down; a kill at a file operation is its own."""
    torch.set_num_threads(1)
    # A new interpreter would not have the launcher's.
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    notes.add("ranks", pid=os.getpid())
    attempt, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])
    for blow in blows[attempt : attempt + 1]:
        if blow.moment == "saving" and blow.victim == rank:
            at_file_event(blow.event, send(signal.SIGKILL))(output)
    plain = TrainSampler.__iter__

    def written_down(sampler: TrainSampler) -> Iterator[MicroBatch]:
        for batch in plain(sampler):
            notes.add("samples", step=batch.step, samples=[int(number) for bin_ in batch.bins for number in bin_])
            yield batch

    with mock.patch.object(TrainSampler, "__iter__", written_down):
        try:
            eft(arguments)
        except SystemExit as end:
            if end.code:
                raise


def launch_forked(config: Path, output: Path, plan: Plan) -> Steps:
    """`eft train CONFIG output_dir=OUTPUT` in forked ranks under torchrun, killed as `plan` says.

    Raises:
        Broken: it did not end well, or not every failure was a kill.
    """
    notes = Notes(output.with_name(output.name + ".notes"))
    notes.folder.mkdir()
    log = output.with_name(output.name + ".log")
    sys.stdout.flush()
    launcher = os.fork()
    if launcher == 0:
        arguments = ["train", str(config), f"output_dir={output}"]
        work_and_leave(log, lambda: _be_launcher(notes, plan.blows, output, arguments))
    try:
        for attempt, blow in enumerate(plan.blows):
            if not _strike(blow, notes, launcher, attempt):
                break
            plan.landed.append(blow)
        _until(lambda: _is_over(launcher), launcher)
        code = os.waitstatus_to_exitcode(os.waitpid(launcher, 0)[1])
    finally:
        # Its ranks hear of it.
        if not _is_over(launcher):
            os.kill(launcher, signal.SIGKILL)
    text = log.read_text(errors="replace")
    _check_end(code, text)
    check_causes(plan.landed, text, notes.folder)
    return notes.steps()


def _check_end(code: int, text: str) -> None:
    if code:
        raise Broken(f"exit code {code}\n{text[-3000:]}")


def check_causes(landed: list[Blow], text: str, logs: Path) -> None:
    """Each failed attempt was killed, and nothing failed that did not follow from it.

    torchrun reports one rank per attempt. Whoever loses its connection to a killed one may end before torchrun looks.
    """
    reported = [(int(code), int(rank)) for code, rank in _REPORTED.findall(text)]
    left = {
        (int(path.parts[-3].rpartition("_")[2]), int(path.parts[-2])): json.loads(path.read_text())["message"]
        for path in logs.glob("*/attempt_*/*/error.json")
    }
    killed = {(attempt, blow.victim) for attempt, blow in enumerate(landed)}
    strange = [f"rank {rank}: exit code {code}" for code, rank in reported if code not in (-signal.SIGKILL, 1)]
    for (attempt, rank), message in left.items():
        if (attempt, rank) in killed or not message.get("eft", {}).get("followed"):
            strange.append(f"attempt {attempt}, rank {rank}: {message}")
    if strange or len(reported) != len(landed):
        raise Broken("\n".join([f"{len(landed)} kills, {len(reported)} failed attempts", *strange, text[-3000:]]))


def _be_launcher(notes: Notes, blows: list[Blow], output: Path, arguments: list[str]) -> int:
    """In a forked process: torchrun with the config of `eft train`, but ranks that are forked."""
    config = launch_config(Fleet(NPROC, max_restarts=len(blows)), arguments, notes.folder)
    config = replace(config, start_method="fork", monitor_interval=0.05)
    elastic_launch(config, rank_main)(notes, blows, output, arguments)
    return 0


def _strike(blow: Blow, notes: Notes, launcher: int, attempt: int) -> bool:
    """Kill in this attempt; whether it met a living process: another attempt follows."""

    def lines(kind: str) -> list[dict[str, Any]]:
        return [line for line in notes.of(kind) if line["attempt"] == attempt]

    if not _until(lambda: any(line["rank"] == blow.victim for line in lines("ranks")), launcher):
        return False
    if blow.moment != "saving":
        steps = blow.steps if blow.moment == "training" else 0
        if not _until(lambda: len({line["step"] for line in lines("samples")}) >= steps, launcher):
            return False
        time.sleep(blow.delay_s)
        kill(next(line["pid"] for line in lines("ranks") if line["rank"] == blow.victim), signal.SIGKILL)
    return _until(lambda: any(line["attempt"] > attempt for line in notes.of("ranks")), launcher)


def _until(condition: Callable[[], bool], launcher: int) -> bool:
    """Wait for it; False: the launcher has ended before."""
    end = time.monotonic() + TIMEOUT_S
    while not condition():
        if _is_over(launcher):
            return False
        if time.monotonic() > end:
            raise Broken(f"the run does not come on within {TIMEOUT_S:g} s")
        time.sleep(0.005)
    return True


def _is_over(process: int) -> bool:
    try:
        return os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True


def launch_command(config: Path, output: Path, plan: Plan) -> Steps:
    """`eft train --nproc 2 --max-restarts` as a user starts it, killed in random steps; its samples are not seen."""
    job = start("train", config, f"output_dir={output}", "--nproc", NPROC, "--max-restarts", len(plan.blows))
    seen: set[int] = set()
    try:
        for blow in plan.blows:
            ranks = {rank: job.rank(rank, among=seen) for rank in range(NPROC)}
            seen |= set(ranks.values())
            rows = len(metrics(output))
            if not _until(lambda: len(metrics(output)) > rows, job.process.pid):  # noqa: B023  # called at once
                break
            time.sleep(blow.delay_s)
            kill(ranks[blow.victim], signal.SIGKILL)
            plan.landed.append(replace(blow, moment="training"))
        _check_end(*job.end(TIMEOUT_S))
        return {}
    finally:
        # Its ranks hear of it.
        job.process.kill()


def launch_on_ray(config: Path, output: Path, plan: Plan) -> Steps:
    """`eft train --launcher ray` with this process as the driver, whose workers are killed in random steps."""
    from tests.distributed import ray_job

    landed: list[int] = []
    strike = ray_job.kill_workers(output, random.Random(plan.blows[0].delay_s), len(plan.blows), landed)
    try:
        _check_end(
            *ray_job.train_in_workers(config, f"output_dir={output}", max_failures=len(plan.blows), on_wait=strike)
        )
    finally:
        plan.landed += [replace(blow, moment="training") for blow in plan.blows[: len(landed)]]
    return ray_job.samples_of(output)


# ---- what must hold ------------------------------------------------------------------------------------------------


def outcome(output: Path) -> dict[str, Any]:
    """What two equal runs must agree in: every file of the last checkpoint, the export, every logged number."""
    last = max(output.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    files = [output / "adapter_model.safetensors", *(path for path in last.iterdir() if path.name != MANIFEST_NAME)]
    progress = json.loads((last / PROGRESS_FILE).read_text())
    return {
        "last checkpoint": last.name,
        **{str(path.relative_to(output)): hash_file(path) for path in files if path.name not in _NOT_COMPARED},
        "progress": {name: value for name, value in progress.items() if name != "meter"},
        "metrics": [
            {name: value for name, value in row.items() if not any(part in name for part in _TIMES)}
            for row in metrics(output)
        ],
    }


def check_samples(got: Steps, expected: Steps) -> None:
    """Every row once per epoch, and in the steps in which the run that nobody touched trained it."""
    if got != expected:
        steps = [step for step in expected if got.get(step) != expected[step]]
        raise Broken(f"other samples in steps {steps}")
    counts = Counter(sample for samples in got.values() for sample in samples)
    uneven = {sample: count for sample, count in counts.items() if count != EPOCHS}
    if uneven:
        raise Broken(f"samples that were not trained once in each of {EPOCHS} epochs: {uneven}")


@dataclass
class Kind:
    """One row of the table."""

    name: str
    launch: Callable[[Path, Path, Plan], Steps]
    kills_per_run: int
    runs: int = 0
    kills: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)

    @property
    def landed(self) -> int:
        """All kills."""
        return self.kills.total()

    @property
    def row(self) -> str:
        """Of the table in the docs."""
        moments = [self.kills[moment] for moment in MOMENTS]
        cells = [self.name, self.runs, self.landed, *moments, self.runs - len(self.broken)]
        return "| " + " | ".join(str(cell) for cell in cells) + " |"

    def run(self, plan: Plan, config: Path, straight: tuple[dict[str, Any], Steps]) -> None:
        """One run with its kills; a line about it."""
        output = config.parent / f"{self.launch.__name__}-{self.runs}"
        began = time.monotonic()
        try:
            steps = self.launch(config, output, plan)
            got, expected = outcome(output), straight[0]
            different = [key for key in expected if got.get(key) != expected[key]]
            if different:
                raise Broken(f"differs from the run that nobody touched in {', '.join(different)}")
            if steps:
                check_samples(steps, straight[1])
            verdict = f"{'every row once per epoch, ' if steps else ''}bit-equal"
        except Broken as broken:
            verdict = f"BROKEN: {broken}"
            self.broken.append(str(broken))
        self.runs += 1
        self.kills.update(blow.moment for blow in plan.landed)
        kills = ", ".join(f"rank {blow.victim} {blow.moment}" for blow in plan.landed)
        seconds = time.monotonic() - began
        print(f"{output.name} ({seconds:.0f} s; {len(plan.landed)} kills: {kills}): {verdict}", flush=True)


def write_page(mark: str, body: str) -> None:
    """Replace the part of the page between two marks."""
    begin, end = f"<!-- {mark} -->", f"<!-- /{mark} -->"
    head, rest = PAGE.read_text().split(begin)
    PAGE.write_text(f"{head}{begin}\n{body}\n{end}{rest.split(end)[1]}")


def run_all(options: argparse.Namespace, folder: Path) -> list[Kind]:
    """The run that nobody touches, then the others, in `folder`."""
    wanted = 50 if options.kills is None else options.kills
    commands = options.commands if options.commands is not None else int(options.kills is None)
    draw = random.Random(options.seed)
    began = time.monotonic()
    config = write_run(folder, max_steps=None, num_epochs=EPOCHS, sequence_len=64, save_total_limit=2, logging_steps=1)
    steps = launch_forked(config, folder / "straight", Plan([]))
    straight = outcome(folder / "straight"), steps
    print(f"the straight run: {len(steps)} steps, {time.monotonic() - began:.1f} s", flush=True)
    if options.launcher == "ray":
        many = Kind("Ray's workers", launch_on_ray, 5)
    else:
        many = Kind("ranks forked", launch_forked, 10)
    while many.landed < wanted and many.runs < wanted:
        many.run(Plan.draw(draw, min(many.kills_per_run, wanted - many.landed)), config, straight)
    command = Kind("`eft train --nproc 2`", launch_command, 3)
    for _ in range(commands if options.launcher == "torchrun" else 0):
        command.run(Plan.draw(draw, command.kills_per_run), config, straight)
    return [kind for kind in (many, command) if kind.runs]


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, help="At least so many, and write nothing.")
    parser.add_argument("--commands", type=int, help="Runs of the command itself; default: 1, with --kills none.")
    parser.add_argument("--launcher", choices=["torchrun", "ray"], default="torchrun")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    quiet_libraries()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="eft-kills-") as name, _cluster(options.launcher):
        kinds = run_all(options, Path(name))
    runs, landed = sum(kind.runs for kind in kinds), sum(kind.landed for kind in kinds)
    broken, minutes = sum(len(kind.broken) for kind in kinds), (time.monotonic() - started) / 60
    print(f"{landed} kills in {runs} runs, {broken} of which did not hold; {minutes:.1f} min")
    if options.kills is None:
        head = "| how the ranks are started | runs | kills | while starting | in a step | in a save | runs that held |"
        rows = "\n".join(kind.row for kind in kinds)
        when = datetime.now(UTC).date().isoformat()
        mark = "kills" if options.launcher == "torchrun" else "kills on Ray"
        write_page(
            mark,
            f"`python -m tests.distributed.kills --launcher {options.launcher}`, {when}, seed {options.seed}: {landed} "
            f"kills in {runs} runs, {minutes:.0f} minutes on {os.cpu_count()} cores; {broken} did not hold.\n\n{head}\n"
            f"| --- |{' ---: |' * 6}\n{rows}",
        )
    return 1 if broken or landed < (options.kills or 50) else 0


def _cluster(launcher: str) -> AbstractContextManager[None]:
    """Ray's, which all its runs share."""
    if launcher == "torchrun":
        return nullcontext()
    from eft.parallel.ray_train import ray_cluster

    return ray_cluster(None)


if __name__ == "__main__":
    sys.exit(main())
