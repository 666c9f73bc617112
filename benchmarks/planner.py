"""What planning costs and what it reaches: eft's strategies, TRL's packing and a first-fit planner on the same lengths.

    python benchmarks/planner.py

CPU seconds of one thread; everyone in turn, round by round. TRL is `trl.pack_dataset` of PyPI in an environment of its
own, where it also copies the tokens (a byte each here). The first-fit planner is written here after the published
description of Axolotl's multipack: samples in random order, in groups of 100,000, each into the first bin with room
that holds fewer than 200. Both are given fewer samples than eft, and their time is scaled in proportion: first-fit goes
group by group, TRL's best-fit-decreasing is linear.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from environments import environment_of, versions_of
from lengths import DISTRIBUTIONS, log_normal
from numba import njit
from tables import device_name, markdown_table, today, write_section

from eft.core.records import Int32Array
from eft.data.balance import bin_costs, expected_balance, share_step
from eft.data.packing import Packing, PackingRule, choose, fewest_bins, likeness_in_bins, pack, rule_of
from eft.data.plan import Plan, build_plan

CAPACITIES = (2048, 8192, 32768)
PEER_SAMPLES = 100_000
PEER_TOKENS = 3e8
"""Most that TRL is given: a byte a token."""
COST_RATIOS = {"8B": 3.5e-5, "1B": 5.3e-5}
"""k of Llama's shapes: 32 layers of width 4,096 over 8B parameters, 16 of 2,048 over 1.2B."""


@dataclass
class Score:
    """One planner on one set of lengths."""

    seconds: list[float] = field(default_factory=list)
    """CPU, of all samples: scaled where there were fewer."""
    fill: float = 0.0
    share: float = 0.0
    """Fewest possible bins ÷ bins."""
    likeness: float = 0.0
    note: str = ""

    def set_packing(self, lengths: Int32Array, packing: Packing, capacity: int) -> None:
        """Fill in what the bins are like."""
        self.fill = float(lengths.sum(dtype=np.int64)) / (packing.num_bins * capacity)
        self.share = fewest_bins(lengths, capacity) / packing.num_bins
        self.likeness = likeness_in_bins(lengths, packing, capacity)


def timed(score: Score, scale: float, call: Callable[[], Any]) -> Any:
    """What `call` returns; its CPU seconds × `scale` go to `score`."""
    start = time.process_time()
    result = call()
    score.seconds.append(scale * (time.process_time() - start))
    return result


@njit
def first_fit(lengths: Int32Array, capacity: int, group: int, most: int) -> tuple[Int32Array, int]:
    """The bin of each sample, int32 [samples], and the number of bins: groups in order, first fit in each."""
    bins = np.empty(len(lengths), np.int32)
    first = count = 0
    room = np.empty(group, np.int64)
    held = np.empty(group, np.int64)
    for start in range(0, len(lengths), group):
        first += count
        count = 0
        for i in range(start, min(start + group, len(lengths))):
            at = 0
            while at < count and (room[at] < lengths[i] or held[at] == most):
                at += 1
            if at == count:
                room[at], held[at] = capacity, 0
                count += 1
            room[at] -= lengths[i]
            held[at] += 1
            bins[i] = first + at
    return bins, first + count


def packing_of(bins: Int32Array) -> Packing:
    """From the bin of each sample."""
    offsets = np.concatenate([[0], np.cumsum(np.bincount(bins))])
    return Packing(np.argsort(bins, kind="stable").astype(np.int32), offsets)


class Trl:
    """TRL's packing in a process of its own."""

    def __init__(self, python: Path, folder: Path) -> None:
        script = Path(__file__).parent / "children" / "trl_pack.py"
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [python, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._folder = folder
        assert self._answer()["ready"]
        self.pack(np.full(10, 5, np.int32), 16, None)  # its first call imports and compiles

    def pack(self, lengths: Int32Array, capacity: int, batch: int | None) -> tuple[float, Int32Array, Packing]:
        """CPU seconds, the lengths in the order of the bins, and these."""
        files = {"lengths": str(self._folder / "lengths.npy"), "out": str(self._folder / "packed.npy")}
        np.save(files["lengths"], lengths)
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({**files, "capacity": capacity, "batch": batch}) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        packed = np.load(files["out"])
        assert np.array_equal(np.sort(packed), np.sort(lengths))
        offsets = np.concatenate([[0], np.cumsum(answer["bins"])])
        return answer["seconds"], packed, Packing(np.arange(len(packed), dtype=np.int32), offsets)

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "TRL's process has ended"
        answer: dict[str, Any] = json.loads(line)
        return answer


def round_of_ours(scores: dict[str, Score], lengths: Int32Array, capacity: int, seed: int) -> None:
    """eft's strategies, once each."""
    choice = timed(scores["eft auto"], 1.0, lambda: choose(lengths, capacity, seed, bin_samples=None))
    scores["eft auto"].set_packing(lengths, choice.packing, capacity)
    scores["eft auto"].note = choice.rule.name
    for name, strategy in (("eft dense", "dense"), ("eft sequential", "sequential")):
        rule = rule_of(strategy, len(lengths))  # type: ignore[arg-type]  # of a Literal
        packing = timed(scores[name], 1.0, lambda rule=rule: pack(lengths, capacity, seed, 0, rule=rule))
        scores[name].set_packing(lengths, packing, capacity)


def round_of_peers(scores: dict[str, Score], lengths: Int32Array, capacity: int, seed: int, trl: Trl) -> None:
    """The others, once each, on the first samples."""
    num = int(min(PEER_SAMPLES, len(lengths), PEER_TOKENS / lengths.mean()))
    fewer, scale = lengths[:num], len(lengths) / num
    name = "first-fit (Axolotl's rule)"
    shuffled = np.random.default_rng(seed).permutation(fewer)
    bins, _ = timed(scores[name], scale, lambda: first_fit(shuffled, capacity, 100_000, 200))
    scores[name].set_packing(shuffled, packing_of(bins), capacity)
    scores[name].note = f"{num:,} samples"
    for name, batch in (("TRL, all rows at once", None), ("TRL, as shipped (batches of 1,000)", 1000)):
        seconds, packed, packing = trl.pack(fewer, capacity, batch)
        scores[name].seconds.append(scale * seconds)
        scores[name].set_packing(packed, packing, capacity)
        scores[name].note = f"{num:,} samples"


OURS = ("eft auto", "eft dense", "eft sequential")
PEERS = ("first-fit (Axolotl's rule)", "TRL, all rows at once", "TRL, as shipped (batches of 1,000)")


def planner_table(options: argparse.Namespace, trl: Trl | None) -> str:
    """Every planner on every set of lengths."""
    rows = []
    for name, draw in DISTRIBUTIONS.items():
        for capacity in CAPACITIES:
            lengths = draw(np.random.default_rng(0), options.samples, capacity)
            scores = {planner: Score() for planner in (*OURS, *(PEERS if trl else ()))}
            for number in range(options.rounds):
                round_of_ours(scores, lengths, capacity, number)
                if trl is not None:
                    round_of_peers(scores, lengths, capacity, number, trl)
            in_order = scores["eft sequential"].likeness
            for planner, score in scores.items():
                rows.append(
                    [
                        f"{name} {capacity:,} · {planner}",
                        f"{statistics.median(score.seconds):.2f}",
                        f"{100 * score.fill:.3f}",
                        f"{100 * score.share:.3f}",
                        f"{score.likeness:+.3f} ({score.likeness - in_order:+.3f})",
                        score.note,
                    ]
                )
            print(markdown_table(["", *[""] * 5], rows[-len(scores) :]), flush=True)
    head = ["lengths · planner", "CPU s", "fill %", "of possible %", "likeness (beyond random)", ""]
    return markdown_table(head, rows)


def bytes_per_sample(name: str, capacity: int, samples: int, strategy: str) -> float:
    """Peak memory of one plan beyond the lengths, as the kernel counts resident pages, in a process of its own."""
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import numpy as np
from planner import DISTRIBUTIONS, plan_once
lengths = DISTRIBUTIONS[{name!r}](np.random.default_rng(0), {samples}, {capacity}).copy()
plan_once(lengths[:{min(samples, 600_000)}].copy(), {capacity}, {strategy!r})
def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
plan_once(lengths, {capacity}, {strategy!r})
print((status("VmHWM") - before) / {samples})
"""
    # Freed arrays must go back at once, or the second call would find them still resident.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment)
    return float(done.stdout)


def plan_once(lengths: Int32Array, capacity: int, strategy: str) -> Packing:
    """One epoch's bins."""
    if strategy == "auto":
        return choose(lengths, capacity, 1, bin_samples=None).packing
    return pack(lengths, capacity, 1, 0, rule=PackingRule("dense"))


def memory_table(samples: int) -> str:
    """Bytes per sample of every set of lengths."""
    rows = []
    for name in DISTRIBUTIONS:
        for capacity in CAPACITIES:
            cells = [f"{bytes_per_sample(name, capacity, samples, strategy):.1f}" for strategy in ("auto", "dense")]
            rows.append([f"{name} {capacity:,}", *cells])
            print(rows[-1], flush=True)
    return markdown_table(["peak bytes per sample, beside the lengths", "auto", "dense"], rows)


class OnlyLengths:
    """A data set as far as a plan looks at it."""

    def __init__(self, lengths: Int32Array) -> None:
        self.lengths = self.trainable_counts = lengths
        self.weight_sums = lengths.astype(np.float64)
        self.fingerprint = ""

    def __len__(self) -> int:
        return len(self.lengths)

    def sample(self, index: int) -> Any:
        """Never asked for."""
        raise NotImplementedError(index)


def balance_plan(lengths: Int32Array, capacity: int, step_bins: int, buffer: int | None, ratio: float) -> Plan:
    """One epoch."""
    return build_plan(
        OnlyLengths(lengths),
        capacity=capacity,
        packed=True,
        sequential=False,
        shuffle=True,
        global_batch_size=step_bins,
        num_epochs=1,
        max_steps=None,
        seed=0,
        balance_buffer=buffer,
        cost_ratio=ratio,
    )


def cost_spread(plan: Plan, ratio: float) -> float:
    """Coefficient of variation of the cost of whole steps."""
    steps = range(0, plan.total_steps - 1, max(1, plan.total_steps // 512))
    costs = [bin_costs(plan.dataset.lengths, plan.step(step).bins, ratio).sum() for step in steps]
    return float(np.std(costs) / np.mean(costs))


def balance_table(samples: int) -> str:
    """Idle shares, with and without a buffer."""
    rows = []
    for name, capacity, size in (
        ("log-normal", 8192, "8B"),
        ("log-normal", 32768, "8B"),
        ("log-normal", 32768, "1B"),
        ("uniform", 32768, "8B"),
        ("bimodal", 8192, "8B"),
    ):
        lengths = DISTRIBUTIONS[name](np.random.default_rng(0), samples, capacity)
        for world_size in (8, 64):
            for accumulation, buffer in ((4, None), (1, None), (1, 8), (1, 64), (1, 128)):
                ratio = COST_RATIOS[size]
                plan = balance_plan(lengths, capacity, world_size * accumulation, buffer, ratio)
                found = expected_balance(plan, ratio, world_size, accumulation)
                above = (1 - found.least_idle) / (1 - found.idle) - 1
                rows.append(
                    [
                        f"{name} {capacity:,}, {size} · {world_size} ranks, accumulation {accumulation}"
                        + (f", buffer {buffer}" if buffer else ""),
                        f"{100 * found.idle:.2f}",
                        f"{100 * found.least_idle:.2f}",
                        f"{100 * above:.2f}",
                        f"{100 * cost_spread(plan, ratio):.1f}",
                    ]
                )
                print(rows[-1], flush=True)
    head = ["lengths, model · ranks", "idle %", "least possible %", "over the bound %", "cost spread of steps %"]
    return markdown_table(head, rows)


def sharing_time(world_size: int, accumulation: int) -> float:
    """CPU milliseconds per step that the loader spends on costs and shares."""
    lengths = log_normal(np.random.default_rng(0), 400_000, 8192)
    plan = balance_plan(lengths, 8192, world_size * accumulation, None, 0.0)
    steps = [plan.step(step) for step in range(min(64, plan.total_steps - 1))]
    spent = []
    for _ in range(5):
        start = time.process_time()
        for step in steps:
            costs = bin_costs(lengths, step.bins, COST_RATIOS["8B"])
            share_step(step, costs, world_size, accumulation, 1)
        spent.append((time.process_time() - start) / len(steps))
    return 1000 * statistics.median(spent)


def section(options: argparse.Namespace, trl: Trl | None, packages: str) -> str:
    """All tables, with what they mean."""
    planners = planner_table(options, trl)
    memory = memory_table(options.samples)
    balance = balance_table(options.samples // 2)
    shares = ", ".join(f"{sharing_time(*shape):.2f} ms on {shape[0]} ranks" for shape in ((8, 4), (64, 4)))
    command = " ".join(["python", "benchmarks/planner.py", *sys.argv[1:]])
    return f"""## Planner

`{command}` · {today()} · {device_name("cpu")} · {packages}

{options.samples:,} samples, CPU seconds of one thread (median of {options.rounds} rounds, everyone in turn). *Of
possible*: Martello and Toth's lower bound on the bins ÷ bins. *Likeness*: intra-class correlation of log length in a
bin, in brackets less that of bins filled in random order (0: bins are random draws). The last column says what `auto`
chose, and on how many samples a peer was timed; its seconds are scaled to all, and TRL's include copying the tokens (a
byte each). First-fit is Axolotl's rule after its description, written for this benchmark, in groups of 100,000 samples.

{planners}

{memory}

Rank balance by the cost model tokens + k·Σ len², of {options.samples // 2:,} samples. *Idle*: time that ranks wait for
the slowest one. *Over the bound*: slowest rank ÷ a lower bound for any sharing of the same steps, less 1. *Buffer*:
`balance_buffer_steps`; its price is the last column, the spread (coefficient of variation) of the cost of a step. A
step's costs and shares take the loader {shares}, accumulation 4.

{balance}
"""


def main() -> int:
    """Measure, print, write the page's section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=2_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-peers", action="store_true", help="eft alone")
    parser.add_argument("--no-write", action="store_true", help="leave docs/benchmarks.md alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    packages = f"eft {version('eft-trainer')}, numba {version('numba')}, numpy {version('numpy')}"
    warm_up()
    if options.no_peers:
        text = section(options, None, packages)
    else:
        python = environment_of("trl", "cpu")
        found = versions_of(python, ("trl", "datasets", "pyarrow"))
        packages += "".join(f", {name} {number}" for name, number in found.items())
        with tempfile.TemporaryDirectory() as folder:
            trl = Trl(python, Path(folder))
            try:
                text = section(options, trl, packages)
            finally:
                trl.close()
    print(f"\n{text}")
    if not options.no_write:
        write_section("planner", text)
    return 0


def warm_up() -> None:
    """Compile everything before it is timed."""
    for draw in DISTRIBUTIONS.values():
        lengths = draw(np.random.default_rng(0), 3000, 2048)
        choose(lengths, 2048, 0, bin_samples=None)
        pack(lengths, 2048, 0, 0, rule=PackingRule("dense"))
        pack(lengths, 2048, 0, 0, rule=PackingRule("sequential"))
        first_fit(lengths, 2048, 100_000, 200)


if __name__ == "__main__":
    sys.exit(main())
