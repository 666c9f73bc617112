"""The yardstick of the quickstart: the training loop that anyone would write by hand, on the same rows and weights.

Rows are padded to the longest of their batch, the model computes its own loss from all its logits, and PyTorch does the
rest. Nothing of eft runs in it but the loading of model and rows.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from eft.core.constants import IGNORE_INDEX
from eft.core.records import TokenDataset


@dataclass(frozen=True)
class PlainTiming:
    """What the plain loop took."""

    steps: int
    tokens: int
    """Real tokens, without padding."""
    seconds: float

    @property
    def seconds_per_token(self) -> float:
        """Seconds of training per real token."""
        return self.seconds / self.tokens


def time_plain_loop(
    model: PreTrainedModel, data: TokenDataset, *, rows_per_step: int, steps: int, first_row: int, learning_rate: float
) -> PlainTiming:
    """Train `model` for `steps` optimizer steps on rows from `first_row` on, after one step that is not timed."""
    model.set_attn_implementation("sdpa")
    model.config.use_cache = False
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0, fused=True)
    tokens, started = 0, 0.0
    for step, (input_ids, attention_mask, labels) in enumerate(_batches(data, rows_per_step, steps + 1, first_row)):
        if step == 1:
            tokens, started = 0, time.perf_counter()
        with torch.autocast(input_ids.device.type, dtype=torch.bfloat16):
            loss = model(input_ids=input_ids, attention_mask=attention_mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        tokens += int(attention_mask.sum())
    return PlainTiming(steps, tokens, time.perf_counter() - started)


def _batches(data: TokenDataset, rows: int, count: int, first_row: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    for batch in range(count):
        samples = [data.sample((first_row + batch * rows + row) % len(data)) for row in range(rows)]
        shape = (rows, max(len(sample.input_ids) for sample in samples))
        input_ids, attention_mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
        labels = torch.full(shape, IGNORE_INDEX)
        for row, sample in enumerate(samples):
            length = len(sample.input_ids)
            input_ids[row, :length] = torch.tensor(sample.input_ids)
            labels[row, :length] = torch.tensor(sample.labels)
            attention_mask[row, :length] = 1
        yield input_ids, attention_mask, labels
