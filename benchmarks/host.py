"""What a training loop itself costs: CPU time per optimizer step of a model of 16 parameters.

    python benchmarks/host.py

eft's trainer and the plain `transformers.Trainer` train the same model in one process, in turn. The plain Trainer gets
ready tensors; eft fetches its micro-batches from a token store, packs them and counts their tokens. Both log rarely,
neither evaluates nor saves. Beside each runs a bare loop: the same forward pass, loss, backward pass, clipping, AdamW
and schedule on a ready batch, without a trainer. What a trainer takes beyond that is its overhead.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tables import command_line, markdown_table, spread, today, write_section
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.modeling_outputs import CausalLMOutput

from eft.builder import HFCausalTrainerBuilder, as_config
from eft.core.records import TokenSample
from eft.data.store import TokenStore, write_store
from eft.loss.linear import head_loss
from eft.models.attention import BoundarySupport
from eft.models.loss_head import find_loss_head

VOCAB, HIDDEN, ROW = 4, 2, 32


class NegligibleConfig(PreTrainedConfig):  # type: ignore[misc]
    """Shape of the model."""

    model_type = "negligible"
    vocab_size = VOCAB
    hidden_size = HIDDEN
    num_hidden_layers = 1
    num_attention_heads = 1


class Embedding(nn.Module):
    """The decoder: an embedding and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCAB, HIDDEN)

    def forward(self, input_ids: Tensor) -> Tensor:
        """[B, L] → [B, L, hidden]."""
        embedded: Tensor = self.embed_tokens(input_ids)
        return embedded


class NegligibleForCausalLM(PreTrainedModel):  # type: ignore[misc]
    """A causal LM that looks at nothing but the token itself."""

    config_class = NegligibleConfig
    base_model_prefix = "model"

    def __init__(self, config: NegligibleConfig) -> None:
        super().__init__(config)
        self.model = Embedding()
        self.lm_head = nn.Linear(HIDDEN, VOCAB, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """As transformers' models have it."""
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        """As transformers' models have it."""
        return self.lm_head

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutput:
        """As transformers' causal LMs compute logits and loss."""
        hidden = self.model(input_ids)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, kept])
        loss = None
        if labels is not None:
            total = nn.functional.cross_entropy(logits[0, :-1].float(), labels[0, 1:], reduction="sum")
            loss = total / num_items_in_batch if num_items_in_batch is not None else total
        return CausalLMOutput(loss=loss, logits=logits)


class StepClock(TrainerCallback):  # type: ignore[misc]
    """CPU seconds per step between two steps of a run."""

    def __init__(self, first: int, last: int, profile: cProfile.Profile | None = None) -> None:
        self.first, self.last, self.profile = first, last, profile
        self.seconds = 0.0
        self._started = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start and stop the clock at the same point of a step."""
        if state.global_step == self.first:
            self._started = time.process_time()
            if self.profile is not None:
                self.profile.enable()
        elif state.global_step == self.last:
            if self.profile is not None:
                self.profile.disable()
            self.seconds = (time.process_time() - self._started) / (self.last - self.first)


def plain_trainer(folder: Path, steps: int, accumulation: int) -> Trainer:
    """transformers.Trainer on ready batches."""
    torch.manual_seed(0)
    ids = torch.randint(1, VOCAB, (1, ROW))
    arguments = TrainingArguments(
        output_dir=str(folder / "plain"),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=accumulation,
        max_steps=steps,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_steps=10**6,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
    )
    return Trainer(
        model=NegligibleForCausalLM(NegligibleConfig()),
        args=arguments,
        train_dataset=[{"input_ids": ids, "labels": ids}] * (steps * accumulation),
        data_collator=lambda items: items[0],
    )


def make_store(folder: Path) -> TokenStore:
    """Samples of half a row each."""
    generator = np.random.default_rng(0)
    rows = generator.integers(1, VOCAB, (4096, ROW // 2)).astype(np.int32)
    return write_store(folder / "store", (("rows", index, TokenSample(row, row)) for index, row in enumerate(rows)))


def eft_trainer(folder: Path, store: TokenStore, steps: int, accumulation: int) -> Any:
    """eft's trainer on its own batches."""
    torch.manual_seed(0)
    words = Tokenizer(WordLevel({f"w{index}": index for index in range(VOCAB)}, unk_token="w0"))
    config = as_config(
        {
            "base_model": "none",
            "datasets": [{"path": "none", "type": "completion"}],
            "output_dir": str(folder / "eft"),
            "sequence_len": ROW,
            "sample_packing": True,
            "gradient_accumulation_steps": accumulation,
            "max_steps": steps,
            "learning_rate": 5e-5,
            "bf16": False,
            "save_strategy": "no",
            "logging_steps": 10**6,
        }
    )
    (folder / "eft").mkdir(exist_ok=True)
    builder = HFCausalTrainerBuilder(
        config,
        NegligibleForCausalLM(NegligibleConfig()),
        PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w0"),
    )
    builder.train_dataset = store
    trainer = builder.build()
    # Without attention nothing needs the boundaries, and a mask would be the most expensive part of this model.
    native = BoundarySupport("native", "no attention", 0.0, 0.0)
    loss = trainer.parts.loss
    trainer.parts.loss = replace(loss, forward=replace(loss.forward, support=native))
    return trainer


def bare_loop(loss_of: Callable[[nn.Module], Tensor], steps: int, accumulation: int) -> float:
    """CPU seconds per step of forward, loss, backward, clipping, AdamW, the schedule and nothing else."""
    torch.manual_seed(0)
    model = NegligibleForCausalLM(NegligibleConfig())
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / (steps + 1))
    total = torch.zeros(())
    started = time.process_time()
    for _ in range(steps):
        for _ in range(accumulation):
            loss = loss_of(model)
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return (time.process_time() - started) / steps


def plain_loss(accumulation: int) -> Callable[[nn.Module], Tensor]:
    """The loss that the plain Trainer asks the model for, on a ready batch."""
    ids = torch.randint(1, VOCAB, (1, ROW))
    weight = torch.tensor(ROW * accumulation)

    def loss_of(model: nn.Module) -> Tensor:
        loss: Tensor = model(input_ids=ids, labels=ids, num_items_in_batch=weight).loss
        return loss

    return loss_of


def eft_loss(trainer: Any, accumulation: int) -> Callable[[nn.Module], Tensor]:
    """The loss as eft's trainer computes it, on a ready batch."""
    trainer.make_plan()
    batch = next(iter(trainer.get_train_dataloader()))
    hooked: list[nn.Module] = []

    def loss_of(model: nn.Module) -> Tensor:
        if model not in hooked:
            find_loss_head(model, head_loss)
            hooked.append(model)
        loss: Tensor = trainer.parts.loss(model, batch) * (1.0 / (ROW * accumulation))
        return loss

    return loss_of


def timed(trainer: Any, first: int, last: int, profile: cProfile.Profile | None = None) -> float:
    """CPU seconds per step of one run."""
    clock = StepClock(first, last, profile)
    trainer.add_callback(clock)
    trainer.train()
    return clock.seconds


def summary(times: dict[str, list[float]], options: argparse.Namespace) -> str:
    """The section of docs/benchmarks.md."""
    trainer, trainer_bare, eft, eft_bare = (statistics.median(values) for values in times.values())
    rows = [[name, spread(values, 0)] for name, values in times.items()]
    return (
        f"`{command_line()}`, {today()}, one thread, {options.rounds} rounds of "
        f"{options.steps} steps in turn, accumulation {options.accumulation}; median (least to most).\n\n"
        f"{markdown_table(['loop', 'CPU µs per optimizer step'], rows)}\n\n"
        f"Overhead, medians: transformers.Trainer {trainer - trainer_bare:,.0f} µs, eft {eft - eft_bare:,.0f} µs, "
        f"ratio {(eft - eft_bare) / (trainer - trainer_bare):.2f}; whole steps, ratio {eft / trainer:.2f}."
    )


def main() -> int:
    """Measure, print, write the section `host` of docs/benchmarks.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--profile", choices=["plain", "eft"], help="print the functions that take the time instead")
    parser.add_argument("--section", default="host", help="section of docs/benchmarks.md to write; empty: none")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    folder = Path(tempfile.mkdtemp(prefix="eft-bench-"))
    store = make_store(folder)
    first, last, accumulation = 20, options.steps + 20, options.accumulation

    def plain(profile: cProfile.Profile | None = None) -> float:
        return timed(plain_trainer(folder, last, accumulation), first, last, profile)

    def ours(profile: cProfile.Profile | None = None) -> float:
        return timed(eft_trainer(folder, store, last, accumulation), first, last, profile)

    if options.profile:
        profile = cProfile.Profile()
        (ours if options.profile == "eft" else plain)(profile)
        pstats.Stats(profile).sort_stats("tottime").print_stats(45)
        pstats.Stats(profile).sort_stats("cumulative").print_stats(60)
        return 0
    names = ("transformers.Trainer", "its bare loop", "eft", "eft's bare loop")
    times: dict[str, list[float]] = {name: [] for name in names}
    losses = plain_loss(accumulation), eft_loss(eft_trainer(folder, store, last, accumulation), accumulation)
    for number in range(options.rounds + 1):
        values = (
            plain(),
            bare_loop(losses[0], options.steps, accumulation),
            ours(),
            bare_loop(losses[1], options.steps, accumulation),
        )
        if number:  # the first round warms up
            for name, value in zip(names, values, strict=True):
                times[name].append(1e6 * value)
    text = summary(times, options)
    print(text)
    if options.section:
        write_section(options.section, text)
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
