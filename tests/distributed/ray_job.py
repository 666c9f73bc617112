"""One run of two workers of Ray Train, and the worker processes, for whoever wants to do something to them.

    job = start_ray_job(write_run(folder), "max_steps=60", max_failures=3)
    wait_for_checkpoint(folder / "out", 4)
    kill(random.choice(workers(job.process.pid)), signal.SIGKILL)
    code, text = job.end()

That is `eft train CONFIG --launcher ray` in a process of its own, whose cluster ends with it: `job.end()` leaves
nothing behind. A start takes about half a minute of CPU time: Ray's own processes, then the imports of each worker.
`train_in_workers` does the same with the calling process as the driver, and notes which samples were fed.

`python -m tests.distributed.kills --launcher ray` kills fifty.

Import it only where Ray is there (`needs_ray` of test_ray.py).
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch.distributed as dist

from eft import inputs
from eft.cli.ray_run import Order, work
from eft.config.load import load_config
from eft.core.errors import ConfigError
from eft.data.loader import MicroBatch, TrainSampler
from eft.parallel.ray_train import RayRequest, run_workers
from tests.distributed.commands import Job, descendants, kill, start, write_run
from tests.faults.job import metrics


def start_ray_job(config: Path, *overrides: str, max_failures: int = 0, number: int = 2) -> Job:
    """`eft train CONFIG OVERRIDES` on so many workers of a local cluster, started again up to `max_failures` times."""
    keys = [f"ray_num_workers={number}", f"ray_max_failures={max_failures}"]
    keys.append(f"ray_storage_path={config.parent / 'ray'}")
    return start("train", config, *overrides, *keys, "--launcher", "ray")


def workers(driver: int) -> list[int]:
    """Process ids of the workers of the driver with that process id; none between two attempts."""
    return [pid for pid in descendants(driver) if "RayTrainWorker" in title_of(pid)]


def title_of(pid: int) -> str:
    """What a process calls itself; Ray writes the class of an actor there."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


# ---- with this process as the driver -------------------------------------------------------------------------------


def train_in_workers(
    config: Path, *overrides: str, max_failures: int = 0, on_wait: Callable[[], None] = lambda: None
) -> tuple[int, str]:
    """The same run with this process as Ray's driver, in the cluster that it has joined (`ray_cluster`).

    Its workers note what they feed (`samples_of`). `on_wait` is called about twice a second.

    Returns:
        exit code, all that rank 0 and the driver said

    Raises:
        RunFailed: as `run_workers`.
    """
    loaded = load_config(config, [*overrides, "use_ray=true", f"ray_storage_path={config.parent / 'ray'}"])
    inputs.load_datasets(loaded.config, world_size=2)
    said: list[str] = []
    code = run_workers(
        noting_work,
        Order(loaded, allow_change=False, report=False),
        RayRequest.of(loaded.config, 2, max_failures),
        show=lambda stream, text: said.append(text),
        on_wait=on_wait,
    )
    return code, "".join(said)


def noting_work(order: Order) -> int:
    """In a worker: the run, with what its sampler hands out written down."""
    plain = TrainSampler.__iter__
    output = Path(order.loaded.config.output_dir)
    notes, hold = notes_of(output), hold_of(output)
    last = int(hold.read_text()) if hold.exists() else sys.maxsize

    def noted(sampler: TrainSampler) -> Iterator[MicroBatch]:
        for batch in plain(sampler):
            while batch.step >= last and hold.exists():
                time.sleep(0.05)
            samples = [int(number) for bin_ in batch.bins for number in bin_]
            line = {"pid": os.getpid(), "rank": int(os.environ["RANK"]), "step": batch.step, "samples": samples}
            with notes.open("ab", buffering=0) as file:
                file.write(json.dumps(line).encode() + b"\n")
            yield batch

    with mock.patch.object(TrainSampler, "__iter__", noted):
        return work(order)


def hold_of(output: Path) -> Path:
    """Where a test writes from which step on (counted from 0) the workers wait until it is removed."""
    return output.with_name(output.name + ".hold")


def notes_of(output: Path) -> Path:
    """Where workers note what they feed."""
    return output.with_name(output.name + ".samples")


def samples_of(output: Path) -> dict[int, list[int]]:
    """Samples of each step, as fed by the processes that came to it last: the run's end came from those."""
    found: dict[tuple[int, int], tuple[int, list[int]]] = {}
    for text in notes_of(output).read_text().splitlines():
        line = json.loads(text)
        place = line["step"], line["rank"]
        pid, samples = found.get(place, (0, []))
        found[place] = line["pid"], [*(samples if pid == line["pid"] else []), *line["samples"]]
    steps: dict[int, list[int]] = {}
    for (step, _), (_, samples) in sorted(found.items()):
        steps[step] = sorted([*steps.get(step, []), *samples])
    return steps


def kill_workers(output: Path, draw: random.Random, kills: int, landed: list[int]) -> Callable[[], None]:
    """For `on_wait`: ends a random worker (SIGKILL) each time that the run in `output` has come some steps further.

    `landed`: takes the process ids.
    """
    goal = draw.randint(1, 4)

    def look() -> None:
        nonlocal goal
        if len(landed) == kills or len(metrics(output)) < goal:
            return
        alive = [pid for pid in workers(os.getpid()) if pid not in landed]
        if len(alive) == 2:
            landed.append(draw.choice(alive))
            kill(landed[-1], signal.SIGKILL)
            goal = len(metrics(output)) + draw.randint(1, 4)

    return look


def fail_as_told(how: str) -> int:
    """In a worker: rank 1 fails, and rank 0 waits for it."""
    if os.environ["RANK"] == "0":
        dist.barrier()
    if how == "exit":
        print("error: planted last words", file=sys.stderr, flush=True)
        os._exit(1)
    raise {"ValueError": ValueError, "ConfigError": ConfigError}[how]("planted")


# ---- many kills ----------------------------------------------------------------------------------------------------


def check_kills(folder: Path, kills: int, seed: int, epochs: int = 2) -> str:
    """A run that nobody touches, and others in which so many workers are killed all in all; what the last one said.

    Raises:
        AssertionError: a run differs in a bit of its weights or a logged loss, or in the samples of a step.
    """
    keys = {"max_steps": None, "num_epochs": epochs, "sequence_len": 64, "save_total_limit": 2, "logging_steps": 1}
    config = write_run(folder, **keys)
    straight = folder / "straight"
    code, text = train_in_workers(config, f"output_dir={straight}")
    assert code == 0, text
    draw, landed = random.Random(seed), 0
    while landed < kills:
        killed, pids = folder / f"killed-{landed}", list[int]()
        on_wait = kill_workers(killed, draw, kills - landed, pids)
        code, text = train_in_workers(config, f"output_dir={killed}", max_failures=kills + 2, on_wait=on_wait)
        assert code == 0, text
        assert pids, "the run was over before anybody was killed"
        landed += len(pids)
        assert text.count("Ray has started all workers again") >= len(pids), text
        losses = [[row["loss"] for row in metrics(output) if "loss" in row] for output in (killed, straight)]
        assert losses[0] == losses[1]
        samples = samples_of(killed)
        assert samples == samples_of(straight)
        counts = Counter(sample for step in samples.values() for sample in step)
        assert set(counts.values()) == {epochs}, "every row once in every epoch"
        weights = [(output / "adapter_model.safetensors").read_bytes() for output in (killed, straight)]
        assert weights[0] == weights[1]
        print(f"{killed.name}: {len(pids)} kills, bit-equal, every row once in each of {epochs} epochs", flush=True)
    return text
