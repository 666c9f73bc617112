"""What a training must equal: rows, models, and a loss written down in a dozen lines of plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from eft.core.constants import IGNORE_INDEX
from eft.core.records import TokenSample
from eft.data.batches import BatchSource
from eft.data.collators import Batch, Collator
from eft.trainer.trainer import EftTrainer
from tests.tiny_models import VOCAB_SIZE, tiny_model

Row = dict[str, Any]

MODELS = ("llama", "qwen3", "gemma3_text", "mistral", "foreign peft")
"""Families, and a model that someone else loaded with eager attention and wrapped in peft."""


def token_rows(count: int, *, longest: int = 30, seed: int = 0, weighted: bool = False) -> list[Row]:
    """Random tokenised rows of uneven length, no two alike; in every other one a prompt, a third, is not trained."""
    generator = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        length = int(generator.integers(6, longest + 1))
        ids = generator.integers(3, VOCAB_SIZE, length)
        labels = ids.copy()
        # Where a row trains its first token too, a label that crosses into the next document would show.
        labels[: length // 3 * (number % 2)] = IGNORE_INDEX
        row = {"input_ids": ids.tolist(), "labels": labels.tolist()}
        if weighted:
            row["weights"] = generator.choice([0.0, 0.25, 1.0, 2.0], length).tolist()
        rows.append(row)
    return rows


def masked(row: Row) -> Row:
    """The row without anything to train."""
    return {**row, "labels": [IGNORE_INDEX] * len(row["labels"])}


def model_of(name: str) -> Any:
    """One of MODELS; the same weights every time. Adapters are away from zero, so that both factors have gradients."""
    if name != "foreign peft":
        return tiny_model(name)
    torch.manual_seed(0)
    base = tiny_model("llama", attn_implementation="eager")
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def plain_step(model: PreTrainedModel, rows: Sequence[Row]) -> tuple[float, dict[str, Tensor]]:
    """Σ weight·NLL ÷ Σ weight over all rows and its gradients, one row at a time, by transformers and torch alone."""
    weights = [torch.tensor(row.get("weights", [1.0] * len(row["labels"])))[1:] for row in rows]
    targets = [torch.tensor(row["labels"])[1:] for row in rows]
    total = sum((weight * (target != IGNORE_INDEX)).sum() for weight, target in zip(weights, targets, strict=True))
    loss = 0.0
    for row, weight, target in zip(rows, weights, targets, strict=True):
        logits = model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0, :-1]
        nll = F.cross_entropy(logits, target, ignore_index=IGNORE_INDEX, reduction="none")
        part = (weight * nll).sum() / total
        part.backward()
        loss += part.item()
    return loss, gradients_of(model)


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the gradients by name."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_gradients_equal(measured: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """E2: ‖Δ‖ ≤ 1e-5 · max(‖g_t‖, 1e-3 · ‖g‖) for every tensor t."""
    assert measured.keys() == expected.keys()
    norm = float(torch.stack([gradient.norm() for gradient in expected.values()]).norm())
    assert norm > 0.01
    for name, gradient in expected.items():
        gap = float((measured[name] - gradient).norm())
        assert gap <= 1e-5 * max(float(gradient.norm()), 1e-3 * norm), f"{name}: {gap:.2e} of {gradient.norm():.2e}"


class SampleRecorder:
    """A collator that writes down which rows went into each micro-batch, by their content."""

    def __init__(self, collator: Collator, rows: Sequence[Row]) -> None:
        self.collator = collator
        self.index = {tuple(row["input_ids"]): number for number, row in enumerate(rows)}
        assert len(self.index) == len(rows), "rows must differ"
        self.micro_batches: list[list[int]] = []
        """Row numbers of every micro-batch, in the order of training."""

    def __call__(self, bins: Sequence[Sequence[TokenSample]]) -> Batch:
        self.micro_batches.append([self.index[tuple(sample.input_ids.tolist())] for part in bins for sample in part])
        return self.collator(bins)

    def steps(self, accumulation: int) -> list[list[int]]:
        """Sorted row numbers of every optimizer step."""
        starts = range(0, len(self.micro_batches), accumulation)
        return [sorted(sum(self.micro_batches[start : start + accumulation], [])) for start in starts]


def record_samples(trainer: EftTrainer, rows: Sequence[Row]) -> SampleRecorder:
    """Let the trainer collate through a recorder."""
    assert isinstance(trainer.parts.packing, BatchSource)
    recorder = SampleRecorder(trainer.parts.packing.collator, rows)
    trainer.parts.packing = replace(trainer.parts.packing, collator=recorder)
    return recorder
