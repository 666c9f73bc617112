"""Predicted against measured memory of each process, for models of 39M to 113M: `python benchmarks/footprint.py`.

Ranks are forked from a process that has imported everything; what is measured is the peak of each one's resident memory
in a training of six full steps, above what it held before the model was made; the most of all ranks and repetitions.
From the third full step on the peak stays as it is; with fewer it is up to a tenth more or less each time.
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
from eft.models.adapters import apply_adapter
from eft.runtime.memory import HostMemory
from tests.distributed.cpu_shim import CpuShimTrainer
from tests.distributed.ranks import ranks
from tests.functional.reference import token_rows
from tests.tiny import tiny_tokenizer
from tests.tiny_models import tiny_model


def _llama(hidden: int, intermediate: int, layers: int, **others: Any) -> dict[str, Any]:
    """Keys of a model's config."""
    return {
        "vocab_size": 16384,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 4096,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        **others,
    }


SHAPES = {
    "39M": _llama(640, 1792, 6, vocab_size=8192),
    "40M": _llama(512, 1536, 8),
    "52M": _llama(768, 2048, 6, tie_word_embeddings=True),
    "61M": _llama(704, 2304, 6),
    "64M": _llama(768, 2048, 6),
    "72M": _llama(768, 3072, 6, vocab_size=12288),
    "96M": _llama(1024, 4096, 4),
    "113M": _llama(896, 2560, 9),
}
"""By parameters. Of 40M malloc cuts all layers' weights out of its heap, of 96M most have mappings of their own."""
ROWS, STEPS = 300, 6
"""Enough rows for nine steps of the four micro-batches that both processes train on when they accumulate."""
ANSWER_S = 1800.0
_LORA = {"adapter": "lora", "lora_r": 16, "lora_target_linear": True}
MODES: dict[str, dict[str, Any]] = {
    "DDP 2": {},
    "FSDP2 2": {"fsdp_version": 2},
    "DDP 2, accumulating": {"global_batch_size": 4},
    "FSDP2 2, accumulating": {"fsdp_version": 2, "global_batch_size": 4},
    "DDP 2, LoRA": _LORA,
    "FSDP2 2, LoRA": {**_LORA, "fsdp_version": 2},
    "DDP 2, recomputing": {"gradient_checkpointing": True},
    "FSDP2 2, recomputing": {"gradient_checkpointing": True, "fsdp_version": 2},
    "DDP 2, bf16": {"bf16": True},
    "FSDP2 2, bf16": {"bf16": True, "fsdp_version": 2},
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
    model = apply_adapter(tiny_model("llama", **SHAPES[shape]), config, seed=config.seed)
    builder = HFCausalTrainerBuilder(config, model, tiny_tokenizer())
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
            with ranks(2, answer_s=ANSWER_S) as group:
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
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["40M", "96M"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--repeats", type=int, default=2, help="groups of processes for each line")
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    options = parser.parse_args()
    for shape, length, mode in product(options.shapes, options.lengths, options.modes):
        print(json.dumps(line(shape, mode, length, options.repeats)), flush=True)


if __name__ == "__main__":
    main()
