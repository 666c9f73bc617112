"""Output head and loss: eft's against the model's own forward with labels (transformers' `ForCausalLMLoss`).

    python benchmarks/loss_head.py                      8192 tokens, vocabulary 131,072, hidden 1024, 60 % masked, bf16
    python benchmarks/loss_head.py --tokens 2048        the same with less memory (plain needs 1.7 MiB per token)
    python benchmarks/loss_head.py --weights bf16       bf16 weights instead of fp32 weights under autocast
    python benchmarks/loss_head.py --write              also into docs/benchmarks.md

One forward and backward pass from the hidden states on. Each measurement is a process of its own, plain and ours in
turn: nothing that one leaves behind, pages or caches, helps the other. Memory is the peak above what was resident right
before the call. The bf16 rate of a matrix product is measured next to each, since on some machines it moves.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil  # type: ignore[import-untyped]  # has no types
import torch
from gemm import gemm_rate
from tables import device_name, markdown_table, spread, today, write_section
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss

from eft.core.constants import IGNORE_INDEX
from eft.loss.linear import head_loss

KINDS = ("plain", "eft")
_PLAIN_BYTES_PER_LOGIT = 14
"""bf16 logits, their fp32 copy, log-softmax, two gradients of it: an upper bound of what plain needs, to ask before."""


@dataclass(frozen=True)
class Workload:
    """Random hidden states and labels; a prompt of `masked` of the tokens is not trained."""

    tokens: int
    vocabulary: int
    hidden: int
    masked: float
    weights: str
    """`fp32`: under bf16 autocast; `bf16`: without."""
    device: str
    threads: int

    def __str__(self) -> str:
        how = "fp32 weights under bf16 autocast" if self.weights == "fp32" else "bf16 weights"
        return (
            f"{self.tokens:,} tokens, {self.masked:.0%} masked, vocabulary {self.vocabulary:,}, hidden "
            f"{self.hidden:,}, {how}"
        )


@dataclass(frozen=True)
class Measurement:
    """One forward and backward pass."""

    wall_s: float
    cpu_s: float
    extra_mib: float
    loss: float
    gflops: float
    """Rate of a bf16 matrix product right before."""


def plain(hidden: Tensor, head: nn.Linear, labels: Tensor) -> Tensor:
    """What `LlamaForCausalLM.forward(labels=…)` does after its decoder."""
    loss: Tensor = ForCausalLMLoss(head(hidden), labels, head.out_features)
    return loss


def ours(hidden: Tensor, head: nn.Linear, labels: Tensor) -> Tensor:
    """What eft does at the same place: the trained positions, then head and loss in one."""
    shifted = torch.nn.functional.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:].reshape(-1)
    positions = torch.nonzero(shifted != IGNORE_INDEX).flatten()
    return head_loss(hidden.flatten(0, 1).index_select(0, positions), head, shifted[positions]) / len(positions)


def measure(kind: str, work: Workload) -> Measurement:
    """One pass in this process, after a tiny one that loads the kernels."""
    torch.set_num_threads(work.threads)
    run: Callable[[Tensor, nn.Linear, Tensor], Tensor] = {"plain": plain, "eft": ours}[kind]
    dtype = torch.float32 if work.weights == "fp32" else torch.bfloat16
    torch.manual_seed(0)
    for tokens, vocabulary in ((64, 512), (work.tokens, work.vocabulary)):
        head = nn.Linear(work.hidden, vocabulary, bias=False, device=work.device, dtype=dtype)
        hidden = torch.randn(1, tokens, work.hidden, device=work.device, dtype=dtype).requires_grad_()
        labels = torch.randint(0, vocabulary, (1, tokens), device=work.device)
        labels[:, : int(tokens * work.masked)] = IGNORE_INDEX
        gflops = gemm_rate(torch.bfloat16, work.device, work.threads) / 1e9
        before = _start_of_peak(work.device)
        wall, cpu = time.perf_counter(), time.process_time()
        with torch.autocast(work.device, torch.bfloat16, enabled=work.weights == "fp32"):
            loss = run(hidden, head, labels)
        loss.backward()
        if work.device == "cuda":
            torch.cuda.synchronize()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        peak = _peak(work.device) - before
    return Measurement(wall, cpu, peak / 2**20, float(loss), gflops)


def _start_of_peak(device: str) -> int:
    """Bytes held now; the peak is counted from here on."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else _status("VmHWM")


def _status(name: str) -> int:
    """A memory figure of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024


def measure_in_child(kind: str, work: Workload) -> Measurement:
    """The same in a fresh process."""
    command = [sys.executable, __file__, "--child", kind, "--workload", json.dumps(asdict(work))]
    environment = {**os.environ, "OMP_NUM_THREADS": str(work.threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        sys.exit(f"{kind} ended with {done.returncode} (-9: out of memory)\n{done.stderr[-2000:]}")
    return Measurement(**json.loads(done.stdout.splitlines()[-1]))


def table(work: Workload, runs: dict[str, list[Measurement]]) -> str:
    """The figures, and their ratios pair by pair."""
    columns = {"time, s": "wall_s", "CPU time, s": "cpu_s", "extra peak memory, MiB": "extra_mib"}
    rows = []
    for title, name in columns.items():
        values = {kind: [getattr(run, name) for run in runs[kind]] for kind in KINDS}
        ratios = [b / a for a, b in zip(values["plain"], values["eft"], strict=True)]
        digits = 0 if name == "extra_mib" else 2
        rows.append([title, *(spread(values[kind], digits) for kind in KINDS), spread(ratios, 3)])
    rates = [run.gflops for kind in KINDS for run in runs[kind]]
    gap = abs(runs["eft"][0].loss - runs["plain"][0].loss) / runs["plain"][0].loss
    head = ["", "transformers, forward with labels", "eft", "eft ÷ transformers"]
    return (
        f"{work}. {device_name(work.device)}; {len(runs['eft'])} runs of each in turn, median (least to most); bf16 "
        f"matrix products meanwhile at {min(rates):,.0f} to {max(rates):,.0f} GFLOP/s (median "
        f"{statistics.median(rates):,.0f}). Losses agree to {gap:.0e}.\n\n{markdown_table(head, rows)}"
    )


def _check_memory(work: Workload) -> None:
    needed = work.tokens * work.vocabulary * _PLAIN_BYTES_PER_LOGIT
    free = torch.cuda.mem_get_info()[0] if work.device == "cuda" else psutil.virtual_memory().available
    if needed > free:
        fitting = int(free / (work.vocabulary * _PLAIN_BYTES_PER_LOGIT)) // 512 * 512
        sys.exit(
            f"transformers needs about {needed / 2**30:.1f} GiB for {work.tokens} tokens and {free / 2**30:.1f} GiB "
            f"are free; try --tokens {fitting}"
        )


def main() -> None:
    """Measure both in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--vocabulary", type=int, default=131_072)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--masked", type=float, default=0.6)
    parser.add_argument("--weights", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    parser.add_argument("--child", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--workload", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(asdict(measure(options.child, Workload(**json.loads(options.workload))))))
        return
    work = Workload(
        options.tokens,
        options.vocabulary,
        options.hidden,
        options.masked,
        options.weights,
        options.device,
        options.threads,
    )
    runs: dict[str, list[Measurement]] = {kind: [] for kind in KINDS}
    for number in range(options.repeats):
        for kind in KINDS:
            _check_memory(work)
            runs[kind].append(measure_in_child(kind, work))
            found = runs[kind][-1]
            print(
                f"{number + 1}/{options.repeats} {kind:5} {found.wall_s:6.2f} s, {found.cpu_s:6.2f} CPU s, "
                f"{found.extra_mib:8,.0f} MiB, {found.gflops:,.0f} GFLOP/s",
                flush=True,
            )
    torch.set_num_threads(work.threads)
    text = table(work, runs)
    print(f"\n{text}")
    if options.write:
        command = f"python benchmarks/loss_head.py --weights {options.weights}"
        title = f"## Output head and loss, {options.weights} weights"
        write_section(f"loss head {options.weights}", f"{title}\n\n`{command}`, {today()}. {text}")


if __name__ == "__main__":
    main()
