"""Kill and resume: how long it takes to train again, early and late in a run; and what is equal, beside the peers.

    python benchmarks/resume.py               # both parts
    python benchmarks/resume.py --peers no    # without the environments of the peers

Start: one run of 10,010 steps with checkpoints at step 10 and at step 10,000; from each a new model and a new trainer
continue, in turn, round by round, timed until the first new step is over. Imports and the copy of the data are not in
it: they do not depend on the position.

Equality: one process each, killed (`kill -9`) in the second epoch and started again, for eft, transformers' Trainer and
TRL's SFTTrainer, from PyPI in environments of their own. Compared with the same run without a kill: what went into the
model at each step, learning rates, losses, and at the end weights and optimizer state, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from contest import CHILDREN, _environment
from environments import environment_of, versions_of
from tables import command_line, device_name, markdown_table, spread, today, write_section
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, TrainerCallback
from workload import SHAPES, prepare_model

from eft.builder import HFCausalTrainerBuilder, as_config

POSITIONS = (10, 10_000)
STEPS = 10_010
SAVE_STEPS, KILL_AFTER = 3, 20
"""Of the contest: killed two steps after a checkpoint, in the second of two epochs."""
EQUALITIES = ("samples", "learning rates", "losses", "weights", "optimizer state")


def rows_of(count: int, vocabulary: int) -> list[dict[str, Any]]:
    """Random rows of uneven length."""
    generator = np.random.default_rng(3)
    rows = []
    for _ in range(count):
        ids = generator.integers(3, vocabulary, int(generator.integers(8, 33))).tolist()
        rows.append({"input_ids": ids, "labels": ids})
    return rows


# Start ----------------------------------------------------------------------------------------------------------------


class Trained(Exception):  # noqa: N818 - not an error
    """The first new step is over."""


class StopAfterOne(TrainerCallback):
    """Ends the training after its first step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raise."""
        raise Trained


def trainer_over(rows: list[dict[str, Any]], folder: Path, tokenizer: PreTrainedTokenizerBase) -> Any:
    """A trainer of a tiny model, a millisecond or two per step."""
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, vocab_size=128, **shape))
    config = as_config(
        {
            "base_model": "in memory",
            "datasets": [{"path": "in memory"}],
            "output_dir": str(folder),
            "sequence_len": 64,
            "micro_batch_size": 1,
            "learning_rate": 1e-4,
            "max_steps": STEPS,
            "logging_steps": 100,
            "save_steps": 10,
            "save_keep_every": POSITIONS[1],
            "save_total_limit": 0,
            "bf16": False,
            "preflight": False,
        }
    )
    builder = HFCausalTrainerBuilder(config, model, tokenizer)
    builder.train_dataset = rows
    return builder.build()


class SaveAt(TrainerCallback):
    """Saves at the two positions alone."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Overrule the interval."""
        control.should_save = state.global_step in POSITIONS
        return control


def measure_start(folder: Path, rounds: int, tokenizer: PreTrainedTokenizerBase) -> dict[int, list[float]]:
    """CPU seconds from a new model to the end of the first new step, per position."""
    rows = rows_of(400, 128)
    trainer = trainer_over(rows, folder, tokenizer)
    trainer.add_callback(SaveAt())
    trainer.train()
    seconds: dict[int, list[float]] = {position: [] for position in POSITIONS}
    for _ in range(rounds + 1):
        for position in POSITIONS:
            started = time.process_time()
            trainer = trainer_over(rows, folder, tokenizer)
            trainer.add_callback(StopAfterOne())
            try:
                trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{position}"))
            except Trained:
                seconds[position].append(time.process_time() - started)
            assert trainer.state.global_step == position + 1
    return {position: values[1:] for position, values in seconds.items()}


def start_section(seconds: dict[int, list[float]], rounds: int) -> str:
    """The table of the start."""
    early, late = (seconds[position] for position in POSITIONS)
    ratios = [b / a for a, b in zip(early, late, strict=True)]
    table = markdown_table(
        ["resumed at step", "CPU seconds until the first new step is over"],
        [[f"{position:,}", spread(seconds[position], 3)] for position in POSITIONS],
    )
    return (
        f"Medians (least to most) of {rounds} rounds in turn, one thread. Late over early: {spread(ratios)}; of the "
        f"medians {statistics.median(late) / statistics.median(early):.3f}.\n\n{table}"
    )


# Equality -------------------------------------------------------------------------------------------------------------


def run_child(python: Path, settings: dict[str, Any], folder: Path) -> int:
    """One process; its exit code."""
    path = folder / "settings.json"
    path.write_text(json.dumps(settings))
    script = CHILDREN / ("resume_eft.py" if settings["peer"] == "eft" else "resume_peer.py")
    own = settings["peer"] == "eft"
    with (folder / "log.txt").open("a") as log:
        done = subprocess.run(
            [python, script, path],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=_environment({"threads": 1, "device": "cpu"}, own=own),
            check=False,
        )
    return done.returncode


def records(path: Path) -> tuple[dict[int, dict[str, Any]], dict[str, Any]]:
    """Steps by number (the last line of a step counts), and the hashes at the end."""
    steps: dict[int, dict[str, Any]] = {}
    end: dict[str, Any] = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        if "step" in row:
            steps[row["step"]] = row
        else:
            end = row
    return steps, end


def half_written(folder: Path) -> str:
    """What a killed save leaves where files are written in place: the newest folder with half of its weights' file."""
    newest = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    weights = newest / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    return newest.name


SCENARIOS = {
    "killed, started again": {},
    "… with micro-batches of half the size": {"micro_batch_size": 1, "accumulation": 4},
    "… newest checkpoint cut in half": {"half": True},
}


def contest(peer: str, python: Path, model: Path, folder: Path) -> dict[str, list[str]]:
    """Scenario to one cell per equality."""
    folder.mkdir(parents=True)
    rows = folder / "rows.json"
    # As many steps whether rows are packed or not.
    rows.write_text(json.dumps(rows_of(64 if peer == "trainer" else 192, 500)))
    base = {
        "peer": peer,
        "model": str(model),
        "rows": str(rows),
        "micro_batch_size": 2,
        "accumulation": 2,
        "save_steps": SAVE_STEPS,
        "kill_after": None,
        "resume": False,
    }

    def child(name: str, **changes: Any) -> int:
        settings = {**base, "output": str(folder / name), "record": str(folder / f"{name}.jsonl"), **changes}
        return run_child(python, settings, folder)

    def cells(name: str, straight: str) -> list[str]:
        steps, end = records(folder / f"{name}.jsonl")
        wanted, wanted_end = records(folder / f"{straight}.jsonl")
        return [
            *(verdict(steps, wanted, key) for key in ("samples", "lr", "loss")),
            *("=" if end.get(key) == wanted_end[key] else "differ" for key in ("weights", "optimizer")),
        ]

    if child("straight"):
        raise RuntimeError(f"{peer}: the straight run failed; see {folder / 'log.txt'}")
    found = {}
    for number, (scenario, changes) in enumerate(SCENARIOS.items()):
        name = f"killed-{number}"
        half = bool(changes.get("half"))
        again = {key: value for key, value in changes.items() if key != "half"}
        assert child(name, kill_after=KILL_AFTER) == -9, f"{peer}: see {folder / 'log.txt'}"
        if half:
            half_written(folder / name)
        code = child(name, resume=True, **again)
        found[scenario] = ["does not start"] * len(EQUALITIES) if code else cells(name, "straight")
    return found


def verdict(steps: dict[int, Any], wanted: dict[int, Any], key: str) -> str:
    """`=`, or how much is not."""
    if steps.keys() != wanted.keys():
        return f"{len(steps)} steps, not {len(wanted)}"
    wrong = [step for step in wanted if steps[step][key] != wanted[step][key]]
    if not wrong:
        return "="
    if key == "samples":
        return f"differ in {len(wrong)} steps"
    gap = max(abs(steps[step][key] - wanted[step][key]) / abs(wanted[step][key]) for step in wrong)
    return f"≤ {gap:.0e} apart"


def main() -> None:
    """Measure, print, and write the section of docs/benchmarks.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peers", choices=("yes", "no"), default="yes")
    parser.add_argument("--no-write", action="store_true", help="Leave docs/benchmarks.md alone.")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="eft-resume-"))
    model = prepare_model("tiny", folder)
    from transformers import AutoTokenizer

    start = start_section(
        measure_start(folder / "start", options.rounds, AutoTokenizer.from_pretrained(model)), options.rounds
    )
    print(start, flush=True)
    pythons = {"eft": Path(sys.executable)}
    if options.peers == "yes":
        pythons |= {"transformers' Trainer": environment_of("transformers", "cpu"), "TRL": environment_of("trl", "cpu")}
    table = []
    for name, python in pythons.items():
        peer = {"eft": "eft", "TRL": "trl"}.get(name, "trainer")
        for scenario, cells in contest(peer, python, model, folder / peer).items():
            table.append([f"{name}: {scenario}", *cells])
            print(table[-1], flush=True)
    versions = versions_of(pythons.get("TRL", Path(sys.executable)), ("torch", "transformers", "trl"))
    body = (
        f"## Resume\n\n`{command_line()}`, {today()}, {device_name('cpu')}, "
        f"{', '.join(f'{name} {version}' for name, version in versions.items())}.\n\n{start}\n\n"
        f"Killed after step {KILL_AFTER} of a small model ({SHAPES['tiny'].layers} layers, attention dropout 0.1, two "
        f"epochs, a checkpoint every {SAVE_STEPS} steps; eft and TRL pack), started again, beside the run without a "
        f"kill:\n\n{markdown_table(['', *EQUALITIES], table)}"
    )
    print(body)
    if not options.no_write:
        write_section("resume", body)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
