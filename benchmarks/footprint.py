"""Predicted against measured memory of each process, for models of 40M and 96M: `python benchmarks/footprint.py`.

Ranks are forked from a process that has imported everything; what is measured is the peak of each one's resident memory
in a training of six steps, above what it held before the model was made; the most of all ranks and repetitions. Three
steps over a fifth of the rows, not all of them full, take up to a tenth more or less each time; from the third
full step on memory stays as it is.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from eft import inputs
from eft.builder import HFCausalTrainerBuilder
from eft.config.load import config_from_mapping
from eft.data.store import as_token_dataset
from eft.footprint import footprint
from eft.runtime.memory import HostMemory
from tests.distributed.cpu_shim import CpuShimTrainer
from tests.distributed.ranks import ranks
from tests.functional.reference import token_rows
from tests.tiny import tiny_tokenizer
from tests.tiny_models import tiny_model

_COMMON: dict[str, Any] = {
    "vocab_size": 16384,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
}
SHAPES: dict[str, dict[str, Any]] = {
    "40M": {**_COMMON, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8},
    "96M": {**_COMMON, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4},
}
"""By parameters: weights that malloc cuts out of its heap, and weights most of which have mappings of their own."""
ROWS, STEPS = 300, 6
"""All steps are full: the accumulating modes train on four micro-batches of both processes in each."""
MODES: dict[str, dict[str, Any]] = {
    "DDP 2": {},
    "FSDP2 2": {"fsdp_version": 2},
    "DDP 2, accumulating": {"global_batch_size": 4},
    "FSDP2 2, accumulating": {"fsdp_version": 2, "global_batch_size": 4},
}


def settings(folder: str, length: int, keys: dict[str, Any]) -> dict[str, Any]:
    """Keys of a run."""
    return {
        "base_model": folder,
        "datasets": [{"path": "given"}],
        "output_dir": folder + "/out",
        "sequence_len": length,
        "sample_packing": True,
        "global_batch_size": 2,
        "max_steps": STEPS,
        "learning_rate": 1e-4,
        "bf16": False,
        "save_strategy": "no",
        "preflight": False,
        **keys,
    }


def resident(field: str) -> int:
    """A line of /proc/self/status, in bytes."""
    match = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert match is not None
    return int(match[1]) * 1024


def measure(rank: int, shape: str, values: dict[str, Any], length: int) -> int:
    """Peak of this process's memory above what it held before, in bytes."""
    config = config_from_mapping(values)
    HostMemory().clean()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    builder = HFCausalTrainerBuilder(config, tiny_model("llama", **SHAPES[shape]), tiny_tokenizer())
    builder.trainer_class = CpuShimTrainer
    builder.train_dataset = token_rows(ROWS, longest=length // 4)
    builder.build().train()
    return resident("VmHWM") - before


def line(shape: str, mode: str, length: int, repeats: int) -> dict[str, Any]:
    """Predicted and measured peak of the fullest process, in MiB."""
    peaks = []
    with tempfile.TemporaryDirectory() as folder:
        tiny_model("llama", **SHAPES[shape]).save_pretrained(folder)
        values = settings(folder, length, MODES[mode])
        config = config_from_mapping(values)
        plan = inputs.plan_of(config, as_token_dataset(token_rows(ROWS, longest=length // 4)), 2)
        predicted = footprint(config, plan, 2).peak
        for _ in range(repeats):
            # A group of its own for each measurement: memory that malloc keeps would not be counted again.
            with ranks(2) as group:
                peaks.append(max(group.run(measure, shape, values, length)))
    return {
        "shape": shape,
        "mode": mode,
        "sequence_len": length,
        "predicted_mib": round(predicted / 2**20),
        "measured_mib": round(max(peaks) / 2**20),
        "least_mib": round(min(peaks) / 2**20),
        "ratio": round(predicted / max(peaks), 3),
    }


def main() -> None:
    """Print one line per shape, length and mode."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--repeats", type=int, default=2, help="groups of processes for each line")
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    options = parser.parse_args()
    for shape, length, mode in product(options.shapes, options.lengths, options.modes):
        print(json.dumps(line(shape, mode, length, options.repeats)), flush=True)


if __name__ == "__main__":
    main()
