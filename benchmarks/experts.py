"""Experts under bf16 autocast: a mixture of experts forward and backward, eft's experts against transformers'.

    python benchmarks/experts.py              Qwen3-MoE: 4 layers, 16 experts of 768, hidden 512, on one thread
    python benchmarks/experts.py --device cuda --tokens 8192 --layers 8 --width 1024
    python benchmarks/experts.py --write      also into docs/benchmarks.md

One model and one row, the two implementations in turn within one process; a ratio is taken of each turn.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from tables import command_line, device_name, markdown_table, spread, today, write_section
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3MoeConfig

from eft.models.experts import GROUPED_EXPERTS, install_experts

PLAIN = "grouped_mm"
VOCABULARY = 1024


def model_of(options: argparse.Namespace) -> PreTrainedModel:
    """Random fp32 weights; the vocabulary is small, so that the head takes little of the time."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
        num_key_value_heads=options.hidden // 128,
        head_dim=64,
        num_experts=options.experts,
        num_experts_per_tok=4,
        moe_intermediate_size=options.width,
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).to(options.device)
    install_experts(model)
    return model


def measure(model: PreTrainedModel, ids: Tensor, implementation: str) -> tuple[float, float, float]:
    """Seconds by the clock, seconds of the CPU and the loss of one pass in each direction."""
    model.set_experts_implementation(implementation)
    model.zero_grad()
    _wait(ids.device)
    clock, cpu = time.perf_counter(), time.process_time()
    with torch.autocast(ids.device.type, torch.bfloat16):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    _wait(ids.device)
    return time.perf_counter() - clock, time.process_time() - cpu, float(loss.detach())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048, help="of the row")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=512, help="a multiple of 128")
    parser.add_argument("--experts", type=int, default=16, help="of each layer; each token goes to 4")
    parser.add_argument("--width", type=int, default=768, help="of an expert")
    parser.add_argument("--rounds", type=int, default=7, help="turns, after one that does not count")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--write", action="store_true", help="write the section `experts` of docs/benchmarks.md")
    return parser.parse_args()


def main() -> int:
    """Measure, print, write where asked."""
    options = parsed()
    torch.set_num_threads(options.threads)
    model = model_of(options)
    ids = torch.randint(VOCABULARY, (1, options.tokens), device=options.device)
    found: dict[str, list[tuple[float, float, float]]] = {PLAIN: [], GROUPED_EXPERTS: []}
    for turn in range(options.rounds + 1):
        for name, values in found.items():
            value = measure(model, ids, name)
            if turn:
                values.append(value)
    plain, ours = found[PLAIN], found[GROUPED_EXPERTS]
    rows = []
    for index, label in enumerate(["time, s", "CPU time, s"]):
        before, after = [value[index] for value in plain], [value[index] for value in ours]
        ratios = [mine / theirs for mine, theirs in zip(after, before, strict=True)]
        rows.append([label, spread(before), spread(after), spread(ratios, 3)])
    gap = abs(statistics.median(value[2] for value in ours) / statistics.median(value[2] for value in plain) - 1)
    text = (
        "## Experts under bf16 autocast\n\n"
        f"`{command_line()}`, {today()}, {device_name(options.device)}, torch {torch.__version__}. Qwen3-MoE of "
        f"{options.layers} layers, hidden {options.hidden:,}, {options.experts} experts of {options.width:,}, 4 for "
        f"each token; a row of {options.tokens:,} tokens, forward and backward; {options.rounds} turns, median (least "
        f"to most). Losses differ by {gap:.1e}.\n\n"
        f"{markdown_table(['', 'transformers', 'eft', 'eft ÷ transformers'], rows)}"
    )
    print(text)
    if options.write:
        write_section("experts", text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
