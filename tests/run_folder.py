"""An output folder as a finished run leaves it, made up, for tests of what reads such folders."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

STEPS = 182
EPOCH = 91


def write_run_folder(folder: Path, steps: int = STEPS) -> Path:
    """Every file that the report reads; returns `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_lines(folder / "metrics.jsonl", metrics(steps))
    _write_lines(folder / "samples.jsonl", SAMPLES)
    for name, value in (("plan", plan(steps)), ("ledger", LEDGER), ("promises", PROMISES), ("summary", summary(steps))):
        (folder / f"{name}.json").write_text(json.dumps(value))
    (folder / "config.yaml").write_text(CONFIG)
    return folder


def metrics(steps: int) -> list[dict[str, Any]]:
    """Training rows of each step, an evaluation every 30 steps, one save."""
    noise = random.Random(1)
    rows: list[dict[str, Any]] = [{"step": 0, "time": 9.0, "eval_loss": 1.34, "eval_runtime": 9.0, "epoch": 0}]
    for step in range(1, steps + 1):
        rate = 3e-4 * (step / 6 if step < 6 else 0.5 * (1 + math.cos(math.pi * (step - 6) / max(1, steps - 6))))
        rows.append(
            {
                "step": step,
                "epoch": step / EPOCH,
                "loss": 0.1 + 1.25 * math.exp(-step / 14) * noise.uniform(0.8, 1.2) + noise.uniform(-0.03, 0.05),
                "grad_norm": 2.5 * math.exp(noise.gauss(0, 0.35) - step / 60) + 0.2,
                "learning_rate": rate,
                "tokens_per_second": noise.gauss(590, 25),
                "trained_tokens_per_second": noise.gauss(150, 12),
                "tokens": 703 * step,
                "trained_tokens": 178 * step,
                "time": 1.65 * step,
            }
        )
        if step % 30 == 0 or step == steps:
            loss = 0.13 + 1.2 * math.exp(-step / 15)
            rows.append({"step": step, "epoch": step / EPOCH, "eval_loss": loss, "time": 1.65 * step})
        if step % EPOCH == 0:
            rows.append({"event": "save", "step": step, "time": 1.65 * step})
    return rows


def plan(steps: int) -> dict[str, Any]:
    """A plan of two equal epochs."""
    epoch = {"bins": 182, "steps": EPOCH, "steps_executed": EPOCH, "tokens_executed": 64012, "free_tokens_in_bins": 832}
    return {
        "strategy": "fit",
        "capacity": 512,
        "shuffle": True,
        "seed": 42,
        "global_batch_size": 2,
        "planner_version": 1,
        "fingerprint": "0a" * 32,
        "num_epochs": 2.0,
        "total_steps": steps,
        "plan_steps": steps,
        "decided_by": "num_epochs",
        "samples_per_epoch": 526,
        "tokens_per_epoch": 64012,
        "trainable_tokens_per_epoch": 16233,
        "weight_per_epoch": 16233.0,
        "fill_percent": 98.73,
        "total_tokens": 128024,
        "tokens_per_step": {"min": 512, "median": 1011.0, "max": 1024},
        "epochs": [epoch, epoch],
    }


def summary(steps: int) -> dict[str, Any]:
    """Final numbers."""
    return {
        "steps": steps,
        "training_loss": 0.2571,
        "eval_loss_first": 1.34,
        "eval_loss": 0.1312,
        "seconds": 301.4,
        "tokens": 128024,
        "trained_tokens": 32466,
        "training_seconds": 280.0,
        "tokens_per_second": 588.2,
        "peak_memory_mib": 2311,
        "parameters_total": 134515008,
        "parameters_trainable": 35398080,
        "exit_reason": "finished",
        "measures": {"Right form": {"before": 0.0, "after": 0.96, "note": "100 held-out rows"}},
        "environment": {"python": "3.11.7", "platform": "Linux", "torch": "2.13.0", "transformers": "5.23.0"},
    }


def _portion(rows: int = 0, tokens: int = 0, first_rows: tuple[str, ...] = ()) -> dict[str, Any]:
    return {"rows": rows, "tokens": tokens, "first_rows": list(first_rows)}


def _source(name: str, split: str, counts: tuple[int, ...], held_out: Any, dropped: Any) -> dict[str, Any]:
    names = ("rows", "raw", "samples", "trainable", "context", "truncated_rows", "truncated")
    numbers = dict(zip(names, counts, strict=True))
    return {"name": name, "split": split, **numbers, "held_out": held_out, "dropped": dropped}


LEDGER = {
    "sources": [
        _source(
            "simple.jsonl",
            "train",
            (400, 48210, 356, 10950, 32008, 0, 0),
            _portion(40, 3800),
            {"too_long": _portion(4, 1452, ("simple.jsonl row 17", "simple.jsonl row 203"))},
        ),
        _source(
            "live.jsonl",
            "train",
            (258, 33000, 256, 8000, 23000, 3, 1000),
            _portion(),
            {"no_trainable_tokens": _portion(2, 1000, ("live.jsonl row 5", "live.jsonl row 9"))},
        ),
        _source("simple.jsonl", "eval", (40, 3800, 40, 900, 2900, 0, 0), _portion(), {}),
    ]
}

PROMISES = [
    {
        "promise": "E1",
        "title": "packing",
        "status": "pass",
        "detail": "no leak",
        "numbers": {"leak": 0.0, "difference": 2.1e-7},
    },
    {"promise": "E3", "title": "resume", "status": "not applicable", "detail": "not interrupted", "numbers": {}},
    {"promise": "E6", "title": "saves", "status": "fail", "detail": "a tensor differs", "numbers": {"largest": 0.0125}},
]

_CALL = '{"name": "math.triangle_area", "arguments": {"base": 10, "height": 5}}'
SAMPLES = [
    {
        "prompt": [
            {"role": "system", "content": "Answer with one JSON call of a function."},
            {"role": "user", "content": "Find the area of a triangle with a base of 10 units and a height of 5 units."},
        ],
        "reference": _CALL,
        "before": "The area of a triangle is\n\nhalf of base × height: 25 square units.",
        "after": _CALL,
    },
    {
        "prompt": [{"role": "user", "content": "What is the factorial of 6?"}],
        "reference": '{"name": "math.factorial", "arguments": {"number": 6}}',
        "before": "The factorial of 6 is 720.",
        "after": '{"name": "math.factorial", "arguments": {"n": 6}}',
    },
] * 4

CONFIG = """# Model
base_model: models/tiny  # run.yaml:3
trust_remote_code: false  # default
# Optim
learning_rate: 0.0003  # run.yaml:12
datasets:
  - path: "rows#1.jsonl"  # run.yaml:6
    type: chat_template  # run.yaml:7
sequence_len: 512  # override
"""


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
