"""Memory of a merge: a synthetic bf16 model of a given size in one shard, an adapter over it, `eft merge`'s peak.

    python benchmarks/merging.py --gib 2

Prints the size of the shard, the peak of a fresh process that merges (resident, its imports included), and what lies
between the two.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from accelerate import init_empty_weights
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

_MERGE = """
import json, resource, sys, time
from pathlib import Path
from eft.models.merge import merge_adapter
started = time.process_time()
done = merge_adapter(Path(sys.argv[1]), Path(sys.argv[2]))
print(json.dumps({
    "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    "cpu_s": time.process_time() - started,
    "promises": [[p.status, p.detail] for p in done.promises],
}))
"""


def make_base(folder: Path, gib: float) -> int:
    """A Llama of about `gib` GiB in bf16, in one file; returns its bytes. A tensor at a time, without the model."""
    hidden, layer = 2048, 4 * 2048 * 2048 + 3 * 2048 * 5632
    layers = max(1, round((gib * 2**30 / 2 - 2 * 32000 * hidden) / layer))
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        vocab_size=32000,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    torch.manual_seed(0)
    state = {
        name: torch.ones(tensor.shape, dtype=torch.bfloat16)
        if tensor.ndim == 1
        else torch.empty(tensor.shape, dtype=torch.bfloat16).normal_(std=0.02)
        for name, tensor in model.state_dict().items()
    }
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    return (folder / "model.safetensors").stat().st_size


def make_adapter(base: Path, folder: Path) -> None:
    """A LoRA adapter of rank 16 on every linear layer, its factors random."""
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(LlamaConfig.from_pretrained(base))
        config = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=16, target_modules="all-linear")
        adapted = get_peft_model(model, config)
    torch.manual_seed(1)
    state = {
        name.replace(".default.", "."): torch.empty(tensor.shape).normal_(std=0.01)
        for name, tensor in adapted.state_dict().items()
        if ".lora_" in name
    }
    folder.mkdir()
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.base_model_name_or_path = str(base)
    config.save_pretrained(folder)


def main() -> None:
    """Make, merge in a fresh process, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=2.0, help="size of the base in GiB")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as place:
        base = Path(place, "base")
        base.mkdir()
        shard = make_base(base, arguments.gib)
        make_adapter(base, Path(place, "adapter"))
        started = time.monotonic()
        command = [sys.executable, "-c", _MERGE, str(Path(place, "adapter")), str(Path(place, "merged"))]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode:
            sys.exit(run.stderr)
        facts = json.loads(run.stdout.strip().splitlines()[-1])
        above = facts["peak_bytes"] - shard
        print(
            f"shard {shard / 2**30:.2f} GiB, peak {facts['peak_bytes'] / 2**30:.2f} GiB: {above / 2**30:+.2f} GiB; "
            f"{facts['cpu_s']:.0f} CPU s, {time.monotonic() - started:.0f} s"
        )
        for status, detail in facts["promises"]:
            print(f"{status}: {detail}")


if __name__ == "__main__":
    main()
