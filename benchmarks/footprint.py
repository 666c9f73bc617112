"""Predicted against measured memory of each process: `python benchmarks/footprint.py` (a model of 40M parameters).

Ranks are forked from a process that has imported everything; what is measured is the peak of each one's resident memory
in a training of three steps, above what it held before the model was made; the most of all ranks and repetitions, since
the same run takes up to a tenth more or less memory each time.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from eft import inputs
from eft.builder import HFCausalTrainerBuilder
from eft.config.load import config_from_mapping
from eft.footprint import footprint
from eft.runtime.memory import HostMemory
from tests.distributed.cpu_shim import CpuShimTrainer
from tests.distributed.ranks import ranks
from tests.functional.reference import token_rows
from tests.tiny import tiny_tokenizer
from tests.tiny_models import tiny_model

SHAPE = {
    "vocab_size": 16384,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
}
MODES: dict[str, dict[str, Any]] = {
    "DDP 2": {},
    "FSDP2 2": {"fsdp_version": 2},
    "DDP 2, accumulating": {"global_batch_size": 4},
    "FSDP2 2, accumulating": {"fsdp_version": 2, "global_batch_size": 4},
}


def settings(folder: str, length: int, keys: dict[str, Any]) -> dict[str, Any]:
    """Keys of a run of three steps."""
    return {
        "base_model": folder,
        "datasets": [{"path": "given"}],
        "output_dir": folder + "/out",
        "sequence_len": length,
        "sample_packing": True,
        "global_batch_size": 2,
        "max_steps": 3,
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


def measure(rank: int, values: dict[str, Any], length: int) -> int:
    """Peak of this process's memory above what it held before, in bytes."""
    config = config_from_mapping(values)
    HostMemory().clean()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    builder = HFCausalTrainerBuilder(config, tiny_model("llama", **SHAPE), tiny_tokenizer())
    builder.trainer_class = CpuShimTrainer
    builder.train_dataset = token_rows(60, longest=length // 4)
    builder.build().train()
    return resident("VmHWM") - before


def main() -> None:
    """Print one line per mode and length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--repeats", type=int, default=5, help="groups of processes for each line")
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tiny_model("llama", **SHAPE).save_pretrained(folder)
        for length in options.lengths:
            for mode in options.modes:
                values = settings(folder, length, MODES[mode])
                config = config_from_mapping(values)
                rows = token_rows(60, longest=length // 4)
                plan = inputs.plan_of(config, _dataset(rows), 2)
                predicted = footprint(config, plan, 2)
                peaks = []
                for _ in range(options.repeats):
                    # A group of its own for each measurement: memory that malloc keeps would not be counted again.
                    with ranks(2) as group:
                        peaks.append(max(group.run(measure, values, length)))
                measured = max(peaks)
                print(
                    json.dumps(
                        {
                            "mode": mode,
                            "sequence_len": length,
                            "predicted_mib": round(predicted.peak / 2**20),
                            "measured_mib": round(measured / 2**20),
                            "least_mib": round(min(peaks) / 2**20),
                            "ratio": round(predicted.peak / measured, 3),
                        }
                    ),
                    flush=True,
                )


def _dataset(rows: list[dict[str, Any]]) -> Any:
    from eft.data.store import as_token_dataset

    return as_token_dataset(rows)


if __name__ == "__main__":
    main()
