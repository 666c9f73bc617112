"""One training step of eft and of its peers, in turn, on the same weights, samples, seed and precision.

    python benchmarks/step.py                        # SmolLM2-135M's shape on this machine's CPU
    python benchmarks/step.py --checkpointing        # also with activation checkpointing
    python benchmarks/step.py --model 1b --device cuda --capacity 4096

The peers are installed from PyPI into environments of their own (~/.cache/eft/bench). Each contender is a process of
its own that trains on command while the others wait, A B C A B C, so that a clock that drifts drifts for all. Tokens
are real ones, never padding. MFU: the operations that these tokens need, over the time and the rate of a bf16 matrix
product in the same round.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from contest import Contender, Entry, Reply, contest_folder
from environments import CACHE, environment_of, versions_of
from gemm import gemm_rate
from tables import command_line, device_name, markdown_table, spread, today, write_section
from workload import SHAPES, RowOptions, Shape, mean_squares, prepare_model, prepare_rows

PACKAGES = ("torch", "transformers", "accelerate", "trl", "liger-kernel", "flash-attn")
LOSS_STEPS = 20
LIGER = {"liger_rms_norm": True, "liger_rope": True, "liger_glu_activation": True}
"""On a GPU every contender gets the same kernels."""


@dataclass
class Score:
    """What a contender did in each timed round."""

    replies: list[Reply] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    mfu: list[float] = field(default_factory=list)
    fill: float | None = None

    def rates(self) -> list[float]:
        """Real tokens per second of each round."""
        return [reply.tokens / reply.wall_s for reply in self.replies]

    def trained_rates(self) -> list[float]:
        """Trained tokens per second of each round."""
        return [reply.trainable / reply.wall_s for reply in self.replies]

    def cpu_rates(self) -> list[float]:
        """Real tokens per CPU second of each round."""
        return [reply.tokens / reply.cpu_s for reply in self.replies]

    def step_seconds(self) -> list[float]:
        """Seconds per step of each round."""
        return [reply.wall_s / reply.steps for reply in self.replies]

    def peak_gib(self) -> float:
        """Peak memory above what the imports took."""
        return max(reply.peak_bytes for reply in self.replies) / 2**30


def entries(options: argparse.Namespace) -> list[Entry]:
    """The contenders that were asked for."""
    cuda = options.device == "cuda"
    attention = options.peer_attention
    trl_note = "" if "flash" in attention else "; sdpa with a mask made of `position_ids`"
    known = [
        Entry("trainer", Path(), "plain_trainer.py", note=f"transformers.Trainer, packed by position_ids, {attention}"),
        Entry("trl", Path(), "trl_sft.py", {"packing": "bfd"}, f"TRL SFTTrainer, packing bfd{trl_note}"),
        Entry(
            "trl-wrapped",
            Path(),
            "trl_sft.py",
            {"packing": "wrapped"},
            "TRL SFTTrainer, packing wrapped (documents are cut and see each other)",
        ),
        Entry("eft", Path(sys.executable), "eft_run.py", note="eft, sample_packing"),
    ]
    for wanted, name, key in (
        (options.checkpointing, "checkpointing", "gradient_checkpointing"),
        (options.compile, "compile", "torch_compile"),
    ):
        if wanted:
            more = {name: True}
            known.append(Entry(f"eft-{name}", Path(sys.executable), "eft_run.py", more, f"eft, {key}"))
            note = f"transformers.Trainer, {key}"
            known.append(Entry(f"trainer-{name}", Path(), "plain_trainer.py", more, note))
    # Wrapped rows mix documents, which is no packing: only where it is asked for by name.
    chosen = options.contenders or [entry.name for entry in known if entry.name != "trl-wrapped"]
    known = [entry for entry in known if entry.name in chosen]
    pythons = {"plain_trainer.py": "transformers", "trl_sft.py": "trl"}
    return [
        Entry(
            entry.name,
            environment_of(pythons[entry.script], options.device) if entry.script in pythons else entry.python,
            entry.script,
            {"liger": cuda, **entry.settings},
            entry.note,
        )
        for entry in known
    ]


def contest_settings(options: argparse.Namespace, shape: Shape, model: Path, rows: Path) -> dict[str, Any]:
    """What all contenders are told."""
    return {
        "model": str(model),
        "rows": str(rows),
        "capacity": options.capacity,
        "accumulation": options.accumulation,
        "max_steps": total_steps(options),
        "learning_rate": options.learning_rate,
        "seed": 42,
        "threads": options.threads,
        "device": options.device,
        "attention": options.peer_attention,
        "packing": None,
        "liger": False,
        "checkpointing": False,
        "compile": False,
        "lora": shape.lora,
        "eft": {**(LIGER if options.device == "cuda" else {}), **json.loads(options.eft)},
    }


def total_steps(options: argparse.Namespace) -> int:
    """Steps that the rows must be enough for: one round to warm up, and one more that is never run."""
    return int(options.warmup + options.steps * options.rounds + 2)


def hold(options: argparse.Namespace, contenders: list[Contender], shape: Shape, squares: float) -> dict[str, Score]:
    """Run the rounds, in an order that turns by one each time."""
    scores = {contender.entry.name: Score(fill=contender.fill) for contender in contenders}
    for contender in contenders:
        scores[contender.entry.name].losses += contender.run(options.warmup).losses
    for number in range(options.rounds):
        rates = {dtype: gemm_rate(dtype, options.device, options.threads) for dtype in (torch.bfloat16, torch.float32)}
        first = number % len(contenders)
        for contender in [*contenders[first:], *contenders[:first]]:
            score, reply = scores[contender.entry.name], contender.run(options.steps)
            score.replies.append(reply)
            score.losses += reply.losses
            rows = reply.steps * options.accumulation
            flops = shape.useful_flops(reply.tokens, reply.trainable, rows * squares)
            score.mfu.append(flops / reply.wall_s / rates[torch.bfloat16])
        now = ", ".join(
            f"{name} {score.rates()[-1]:,.0f} ({score.cpu_rates()[-1]:,.0f})" for name, score in scores.items()
        )
        print(
            f"round {number + 1}/{options.rounds}: tokens/s (per CPU second) {now}; "
            f"GEMM bf16 {rates[torch.bfloat16] / 1e9:,.0f}, fp32 {rates[torch.float32] / 1e9:,.0f} GFLOP/s",
            flush=True,
        )
    return scores


def report(options: argparse.Namespace, found: list[Entry], scores: dict[str, Score], versions: str) -> str:
    """The section of docs/benchmarks.md."""
    rows = []
    for entry in found:
        score = scores[entry.name]
        fill = "–" if score.fill is None else f"{100 * score.fill:.2f} %"
        rows.append(
            [
                entry.note,
                spread(score.rates(), 0),
                spread(score.trained_rates(), 0),
                f"{statistics.median(score.step_seconds()):.2f}",
                f"{score.peak_gib():.2f}",
                fill,
                f"{100 * statistics.median(score.mfu):.1f} %",
            ]
        )
    head = ["contender", "real tokens/s", "trained tokens/s", "s per step", "peak GiB above imports", "fill", "MFU"]
    lines = [
        f"`{command_line()}`, {today()}, {device_name(options.device)}; {versions}. Model shape {options.model}, rows "
        f"of {options.capacity}, {options.accumulation} per step, {options.rounds} rounds of {options.steps} steps in "
        "turn; median (least to most over the rounds).",
        "",
        markdown_table(head, rows),
        "",
        *ratio_lines(found, scores),
    ]
    return "\n".join(lines)


def ratio_lines(found: list[Entry], scores: dict[str, Score]) -> list[str]:
    """eft over each peer, round by round; and how far the losses of the same rows are apart."""
    ours = [entry.name for entry in found if entry.name.startswith("eft")]
    peers = [entry.name for entry in found if not entry.name.startswith("eft")]
    rows = []
    for name in ours:
        for peer in peers:
            a, b = scores[name], scores[peer]
            wall = [x / y for x, y in zip(a.rates(), b.rates(), strict=True)]
            cpu = [x / y for x, y in zip(a.cpu_rates(), b.cpu_rates(), strict=True)]
            memory = f"{a.peak_gib() / b.peak_gib():.2f}"
            rows.append([f"{name} / {peer}", spread(wall), spread(cpu), memory, loss_difference(a, b, peer)])
    head = ["ratio", "real tokens/s", "real tokens per CPU second", "peak memory", f"loss, first {LOSS_STEPS} steps"]
    return [markdown_table(head, rows)] if rows else []


def loss_difference(ours: Score, theirs: Score, peer: str) -> str:
    """The largest difference of two loss curves over the same rows; TRL makes rows of its own."""
    if peer.startswith("trl"):
        return "other rows"
    pairs = list(zip(ours.losses, theirs.losses, strict=True))[:LOSS_STEPS]
    return f"≤ {max(abs(a - b) for a, b in pairs):.1e} apart ({len(pairs)} steps)"


def versions_text(found: list[Entry]) -> str:
    """Versions of all environments, each package once."""
    merged: dict[str, set[str]] = {}
    for python in {entry.python for entry in found}:
        for package, version in versions_of(python, PACKAGES).items():
            merged.setdefault(package, set()).add(version)
    return ", ".join(f"{package} {' and '.join(sorted(merged[package]))}" for package in PACKAGES if package in merged)


def parser_of(description: str) -> argparse.ArgumentParser:
    """The options of a contest."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(SHAPES), default="135m")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--capacity", type=int, default=2048, help="tokens of a row")
    parser.add_argument("--accumulation", type=int, default=1, help="rows per optimizer step")
    parser.add_argument("--steps", type=int, default=3, help="steps of a contender in one round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=2, help="steps before the first round")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--checkpointing", action="store_true", help="also with activation checkpointing")
    parser.add_argument("--compile", action="store_true", help="also with torch.compile")
    parser.add_argument("--contenders", nargs="+", help="only these: trainer trl trl-wrapped eft eft-… trainer-…")
    parser.add_argument("--peer-attention", help="default: sdpa on a CPU, flash_attention_2 on a GPU")
    parser.add_argument("--eft", default="{}", help="further config keys of eft, as JSON")
    parser.add_argument("--section", default="step", help="section of docs/benchmarks.md to write; empty: none")
    return parser


def settle(options: argparse.Namespace) -> argparse.Namespace:
    """Fill in what depends on the device."""
    if options.peer_attention is None:
        options.peer_attention = "sdpa" if options.device == "cpu" else "flash_attention_2"
    return options


def main() -> int:
    """Hold the contest, print the table, write it to the docs."""
    options = settle(parser_of(__doc__ or "").parse_args())
    torch.set_num_threads(options.threads)
    shape = SHAPES[options.model]
    CACHE.mkdir(parents=True, exist_ok=True)
    model = prepare_model(options.model, CACHE)
    rows = prepare_rows(RowOptions(shape.vocab, options.capacity, total_steps(options), options.accumulation), CACHE)
    found = entries(options)
    settings = contest_settings(options, shape, model, rows)
    folder = contest_folder()
    print(f"settings and logs: {folder}", flush=True)
    contenders: list[Contender] = []
    try:
        for entry in found:
            contenders.append(Contender(entry, settings, folder))
            print(f"{entry.name} is ready after {contenders[-1].seconds_to_ready:.0f} s", flush=True)
        scores = hold(options, contenders, shape, mean_squares(rows))
    finally:
        for contender in contenders:
            contender.stop()
    fill = next((score.fill for name, score in scores.items() if name.startswith("eft")), None)
    for name, score in scores.items():
        if name.startswith("trainer"):
            score.fill = fill  # eft's rows
    text = report(options, found, scores, versions_text(found))
    print(f"\n{text}")
    if options.section:
        write_section(options.section, text)
    shutil.rmtree(folder)  # kept where something failed: the logs are in it
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
