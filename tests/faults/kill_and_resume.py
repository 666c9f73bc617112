"""kill -9 at random moments, start again, compare with the run that nobody touched (promise E3).

    python -m tests.faults.kill_and_resume --count 50 --seed 0

One parent process imports everything once and forks a child per start. Each trial kills a training run (packing, LoRA,
dropout, evaluation, a checkpoint every two steps) at a random moment of the straight run's time, starts the same
command until it finishes, and compares: weights, optimizer state, generators, and every logged row must be equal, bit
for bit. Trials that had to start from nothing (killed before the first checkpoint) are counted apart.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from eft import run
from eft.config.load import config_from_mapping
from eft.core.constants import METRICS_FILE
from eft.core.hashing import hash_file
from eft.runtime.checkpoint import CheckpointStore
from tests.tiny import tiny_tokenizer
from tests.tiny_models import tiny_model

STEPS = 12
FIRST_SHARE = 0.35
"""Kills fall into the last 65 % of the straight run's time: before that it only loads, which tells nothing."""
_TIMES = {"time", "tokens_per_second", "trained_tokens_per_second"}
_COMPARED = ("adapter_model.safetensors", "optimizer.safetensors", "optimizer.json", "rng_0.safetensors", "rng_0.json")


@dataclass(frozen=True)
class Trial:
    """One killed run."""

    after_s: float
    resumed_from: str
    """Folder name of the checkpoint, or `nothing`."""
    differences: list[str]


def lay_out(folder: Path) -> dict[str, Any]:
    """A tiny model, rows, and the config of the run (without `output_dir`)."""
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer))
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    words, draw = ["alpha", "beta", "gamma", "delta", "one", "two", "three", "red", "green", "blue"], random.Random(0)
    with (folder / "rows.jsonl").open("w") as file:
        for number in range(64):
            question = f"{number} " + " ".join(draw.choices(words, k=draw.randint(1, 16)))
            answer = " ".join(draw.choices(words, k=draw.randint(1, 12)))
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": turns}) + "\n")
    return {
        "base_model": str(folder / "model"),
        "datasets": [{"path": str(folder / "rows.jsonl"), "type": "chat_template"}],
        "dataset_prepared_path": str(folder / "cache"),
        "val_set_size": 0.1,
        "sequence_len": 192,
        "sample_packing": True,
        "micro_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "adapter": "lora",
        "lora_target_linear": True,
        "lora_dropout": 0.1,
        "bf16": False,
        "save_steps": 2,
        "eval_steps": 3,
        "verify_saves": "never",
    }


def start(settings: dict[str, Any], output: Path) -> int:
    """Fork a child that trains into `output`; returns its process id."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        with output.with_suffix(".log").open("ab") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            torch.set_num_threads(1)
            run.train(config_from_mapping({**settings, "output_dir": str(output)}))
            code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def finish(settings: dict[str, Any], output: Path) -> None:
    """Start the run and wait until it is over; raises with the child's log when it fails."""
    _, status = os.waitpid(start(settings, output), 0)
    if status:
        raise RuntimeError(f"the run failed:\n{output.with_suffix('.log').read_text()[-3000:]}")


def outcome(output: Path) -> dict[str, Any]:
    """What two equal runs must agree in."""
    last = output / f"checkpoint-{STEPS}"
    rows = [json.loads(line) for line in (output / METRICS_FILE).read_text().splitlines()]
    return {
        "export": hash_file(output / "adapter_model.safetensors"),
        **{f"checkpoint {name}": hash_file(last / name) for name in _COMPARED},
        "metrics": [
            {key: value for key, value in row.items() if key not in _TIMES and "runtime" not in key
             and "per_second" not in key}
            for row in rows
        ],
    }  # fmt: skip


def kill_once(settings: dict[str, Any], output: Path, after_s: float, straight: dict[str, Any]) -> Trial:
    """Kill a fresh run after `after_s` seconds, let it continue, compare."""
    child = start(settings, output)
    time.sleep(after_s)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    newest = CheckpointStore(output, save_total_limit=None).newest_complete().path
    done = (output / "run.json").is_file() and json.loads((output / "run.json").read_text())["status"] == "finished"
    if not done:
        finish(settings, output)
    got = outcome(output)
    return Trial(after_s, newest.name if newest else "nothing", [key for key in straight if got[key] != straight[key]])


def main() -> int:
    """Run the trials and print one line each; exit code 1 when any differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = lay_out(folder)
        finish(settings, folder / "warm-up")  # fills the data cache, so that the timing below is that of a killed run
        started = time.monotonic()
        finish(settings, folder / "straight")
        seconds = time.monotonic() - started
        straight = outcome(folder / "straight")
        assert outcome(folder / "warm-up") == straight, "two straight runs differ"
        failed = 0
        for number in range(options.count):
            output = folder / f"trial-{number}"
            trial = kill_once(settings, output, draw.uniform(FIRST_SHARE * seconds, seconds), straight)
            failed += bool(trial.differences)
            verdict = f"DIFFERS in {', '.join(trial.differences)}" if trial.differences else "bit-equal"
            print(f"{number:3} killed after {trial.after_s:5.2f} s, resumed from {trial.resumed_from}: {verdict}")
            shutil.rmtree(output)
    print(f"{options.count - failed} of {options.count} resumed runs bit-equal to the straight one ({seconds:.1f} s)")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
