"""One process and two, one core each, at a fixed global batch: eft (DDP over gloo) and plain torchrun + Trainer.

    python benchmarks/scaling.py             # about five minutes, on two cores

Efficiency is the time of a step on one process over twice the time on two, round by round; A1 A2 B1 B2 in turn. All
contenders get the same weights and the same packed rows; two processes take half of each step's rows.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import socket
import statistics
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from contest import Contender, Entry, Reply, contest_folder
from environments import CACHE, environment_of, versions_of
from step import contest_settings, parser_of, total_steps
from tables import command_line, device_name, markdown_table, spread, today, write_section
from workload import SHAPES, RowOptions, prepare_model, prepare_rows

SIZES = (1, 2)


class Team:
    """The processes of one contender, which train together."""

    def __init__(self, entry: Entry, size: int, settings: dict[str, Any], folder: Path) -> None:
        rows = settings["accumulation"]
        shared = {**settings, "accumulation": rows // size, "rows_per_step": rows}
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
        self._members = []
        for rank in range(size):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)}
            own = {**shared, "environment": {**meeting, **place} if size > 1 else {}}
            named = replace(entry, name=f"{entry.name}-{rank}-of-{size}")
            self._members.append(Contender(named, own, folder, wait=False))
        for member in self._members:
            member.wait_until_ready()

    def run(self, steps: int) -> Reply:
        """Train `steps` optimizer steps; the time of the slowest, tokens and losses of the whole steps."""
        for member in self._members:
            member.begin(steps)
        replies = [member.finish() for member in self._members]
        slowest = max(reply.wall_s for reply in replies)
        return replace(replies[0], wall_s=slowest, cpu_s=sum(reply.cpu_s for reply in replies))

    def stop(self) -> None:
        """End all of them."""
        for member in self._members:
            with contextlib.suppress(BrokenPipeError):
                member.begin(0)
        for member in self._members:
            member.stop()


@dataclass
class Score:
    """What a contender did on one and on two processes in each timed round."""

    replies: dict[int, list[Reply]] = field(default_factory=lambda: {size: [] for size in SIZES})
    losses: dict[int, list[float]] = field(default_factory=lambda: {size: [] for size in SIZES})

    def rates(self, size: int) -> list[float]:
        """Real tokens per second of each round."""
        return [reply.tokens / reply.wall_s for reply in self.replies[size]]

    def efficiencies(self) -> list[float]:
        """Of two processes, each round."""
        return [two / (2 * one) for one, two in zip(self.rates(1), self.rates(2), strict=True)]

    def loss_gap(self) -> float:
        """The largest difference of a step's loss on one and on two processes."""
        return max(abs(one - two) for one, two in zip(self.losses[1], self.losses[2], strict=True))


def hold(options: argparse.Namespace, found: list[Entry], settings: dict[str, Any], folder: Path) -> dict[str, Score]:
    """Run the rounds."""
    scores = {entry.name: Score() for entry in found}
    teams: dict[tuple[str, int], Team] = {}
    try:
        for entry in found:
            for size in SIZES:
                teams[entry.name, size] = Team(entry, size, settings, folder)
        for (name, size), team in teams.items():
            scores[name].losses[size] += team.run(options.warmup).losses
        for number in range(options.rounds):
            for (name, size), team in teams.items():
                reply = team.run(options.steps)
                scores[name].replies[size].append(reply)
                scores[name].losses[size] += reply.losses
            now = ", ".join(f"{name} {score.efficiencies()[-1]:.2f}" for name, score in scores.items())
            print(f"round {number + 1}/{options.rounds}: efficiency {now}", flush=True)
    finally:
        for team in teams.values():
            team.stop()
    return scores


def report(options: argparse.Namespace, found: list[Entry], scores: dict[str, Score]) -> str:
    """The section of docs/benchmarks.md."""
    rows = []
    for entry in found:
        score = scores[entry.name]
        rows.append(
            [
                entry.note,
                *(spread(score.rates(size), 0) for size in SIZES),
                spread(score.efficiencies()),
                f"≤ {score.loss_gap():.1e}",
            ]
        )
    ours, theirs = (scores[entry.name] for entry in found)
    faster = [a / b for a, b in zip(ours.rates(2), theirs.rates(2), strict=True)]
    versions = ", ".join(f"{name} {version}" for name, version in versions_of(found[1].python, _PACKAGES).items())
    head = ["contender", "tokens/s, 1 process", "tokens/s, 2 processes", "efficiency", "loss, 1 against 2"]
    return "\n".join(
        [
            "## Two processes",
            "",
            f"`{command_line()}`, {today()}, {device_name(options.device)} a process; {versions}. Model shape "
            f"{options.model}, {options.accumulation} rows of {options.capacity} per step, whatever the number of "
            f"processes; {options.rounds} rounds of {options.steps} steps in turn; median (least to most over the "
            "rounds).",
            "",
            markdown_table(head, rows),
            "",
            f"On two processes eft trains {spread(faster)} × as many tokens per second. Median step on two: "
            f"{statistics.median(reply.wall_s / reply.steps for reply in ours.replies[2]):.2f} s, the peer's "
            f"{statistics.median(reply.wall_s / reply.steps for reply in theirs.replies[2]):.2f} s.",
        ]
    )


_PACKAGES = ("torch", "transformers", "accelerate")


def main() -> int:
    """Hold the contest, print the table, write it to the docs."""
    parser = parser_of(__doc__ or "")
    parser.set_defaults(
        model="24m",
        threads=1,
        capacity=1024,
        accumulation=4,
        steps=1,
        rounds=7,
        warmup=1,
        section="scaling",
        peer_attention="sdpa",
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shape = SHAPES[options.model]
    CACHE.mkdir(parents=True, exist_ok=True)
    model = prepare_model(options.model, CACHE)
    rows = prepare_rows(RowOptions(shape.vocab, options.capacity, total_steps(options), options.accumulation), CACHE)
    peer = environment_of("transformers", options.device)
    found = [
        Entry("eft", Path(sys.executable), "eft_run.py", note="eft, `--nproc 2`: DDP over gloo"),
        Entry("trainer", peer, "plain_trainer.py", note="transformers.Trainer, torchrun: DDP over gloo"),
    ]
    folder = contest_folder()
    print(f"settings and logs: {folder}", flush=True)
    scores = hold(options, found, contest_settings(options, shape, model, rows), folder)
    text = report(options, found, scores)
    print(f"\n{text}")
    if options.section:
        write_section(options.section, text)
    shutil.rmtree(folder)  # kept where something failed: the logs are in it
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
