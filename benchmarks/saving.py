"""How long a checkpoint stops the training: written at once, and beside the next steps.

    python benchmarks/saving.py

The state is that of full fine-tuning with AdamW: weights and two moments in fp32. Both stores write the same files,
read them back, compare every bit, hash, flush and rename; in turn, round by round. Every asynchronous save is waited
for before the next one starts. For scale, `torch.save` of the same state without any of these checks.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path

import torch
from tables import device_name, markdown_table, spread, today, write_section
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from eft.runtime.checkpoint import CheckpointStore
from eft.runtime.draft import Draft


def model_of(layers: int) -> nn.Module:
    """SmolLM2-135M's shape at 30 layers, random weights."""
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
    )
    model: nn.Module = AutoModelForCausalLM.from_config(config)
    return model


def stepped_adamw(model: nn.Module) -> torch.optim.Optimizer:
    """An AdamW whose state is all there."""
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def main() -> None:
    """Measure, print, and write the section of docs/benchmarks.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--folder", type=Path, help="Where to write; default: a temporary folder.")
    parser.add_argument("--no-write", action="store_true", help="Leave docs/benchmarks.md alone.")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = model_of(options.layers)
    optimizer = stepped_adamw(model)
    size = 3 * sum(parameter.numel() * 4 for parameter in model.parameters()) / 2**30

    folder = Path(tempfile.mkdtemp(dir=options.folder))
    stores = {
        name: CheckpointStore(folder / name, save_total_limit=1, asynchronous=name == "asynchronous")
        for name in ("synchronous", "asynchronous")
    }

    def fill(draft: Draft) -> None:
        draft_store.add_weights(draft, model)
        draft_store.add_optimizer(draft, model, optimizer)

    plain = []
    for step in range(options.rounds + 1):
        for draft_store in stores.values():
            draft_store.save(step, None, {}, keep=False, fill=fill)
            draft_store.wait()
        started = time.perf_counter()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, folder / "plain.pt")
        plain.append(time.perf_counter() - started)
        print(f"round {step}: " + ", ".join(f"{name} {store.times[-1]}" for name, store in stores.items()), flush=True)
    shutil.rmtree(folder)

    # The first round allocates the memory of the copies.
    first, blocked = stores["asynchronous"].times[0].blocked_s, [t.blocked_s for t in stores["asynchronous"].times[1:]]
    written = [times.write_s for times in stores["asynchronous"].times[1:]]
    at_once = [times.blocked_s for times in stores["synchronous"].times[1:]]
    ratios = [whole / part for whole, part in zip(at_once, blocked, strict=True)]
    table = markdown_table(
        ["save", "training stands still, s", "on the disk after, s"],
        [
            ["at once", spread(at_once), spread(at_once)],
            ["beside the next steps", spread(blocked, 3), spread(written)],
            ["`torch.save`, nothing flushed or checked", spread(plain[1:]), "unknown"],
        ],
    )
    body = (
        f"## Saving\n\n`python benchmarks/saving.py --rounds {options.rounds} --layers {options.layers}`, {today()}, "
        f"{device_name('cpu')}, torch {torch.__version__}. {size:.2f} GiB of state; median (least to most) of "
        f"{options.rounds} rounds. The training stands still for 1/{spread(ratios, 1)} of the time of a save at once. "
        f"The first save, which allocates the memory of the copies, blocked for {first:.2f} s.\n\n{table}"
    )
    print(body)
    if not options.no_write:
        write_section("saving", body)


if __name__ == "__main__":
    main()
