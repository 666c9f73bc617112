"""transformers.Trainer as it comes, at its best: eft's own packed rows as ready tensors, documents apart by
`position_ids` (and by the boundaries that variable-length kernels take), bf16 autocast, fused AdamW."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from link import Link, RunOnCommand, common_arguments, load_model, lora_config, train
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

IGNORE_INDEX = -100


class Rows(Dataset[dict[str, torch.Tensor]]):
    """The packed rows that the benchmark exported: one item per row."""

    def __init__(self, folder: Path, with_boundaries: bool) -> None:
        self.ids, self.labels = np.load(folder / "row_ids.npy"), np.load(folder / "row_labels.npy")
        self.positions = np.load(folder / "row_positions.npy")
        self.ends = np.load(folder / "row_ends.npy")
        self.with_boundaries = with_boundaries

    def __len__(self) -> int:
        return len(self.ends)

    def span(self, row: int) -> slice:
        """Where the row's tokens are."""
        return slice(int(self.ends[row - 1]) if row else 0, int(self.ends[row]))

    def __getitem__(self, row: int) -> dict[str, Any]:
        span = self.span(row)
        positions = torch.from_numpy(self.positions[span])
        item: dict[str, Any] = {
            "input_ids": torch.from_numpy(self.ids[span]).unsqueeze(0),
            "labels": torch.from_numpy(self.labels[span]).unsqueeze(0),
            "position_ids": positions.unsqueeze(0),
        }
        if self.with_boundaries:
            starts = (positions == 0).nonzero().flatten()
            bounds = torch.cat([starts, torch.tensor([len(positions)])]).to(torch.int32)
            item["cu_seq_lens_q"] = item["cu_seq_lens_k"] = bounds
            item["max_length_q"] = item["max_length_k"] = int(bounds.diff().max())
        return item


def main() -> None:
    """Train on command."""
    link = Link()
    settings = link.settings
    model = load_model(settings, settings["attention"])
    if settings["lora"]:
        from peft import get_peft_model

        model = get_peft_model(model, lora_config(settings))
    rows = Rows(Path(settings["rows"]), with_boundaries="flash" in settings["attention"])
    tokens = [int(rows.labels[rows.span(row)].size) for row in range(len(rows))]
    trainable = [int(np.sum(rows.labels[rows.span(row)] != IGNORE_INDEX)) for row in range(len(rows))]
    arguments = {**common_arguments(settings), "use_liger_kernel": settings["liger"], "remove_unused_columns": False}
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**arguments),
        train_dataset=rows,
        data_collator=lambda items: items[0],
        callbacks=[RunOnCommand(link, per_step(tokens, settings), per_step(trainable, settings))],
    )
    train(trainer, link)


def per_step(values: list[int], settings: dict[str, Any]) -> list[int]:
    """Sums over the rows of each optimizer step, of all processes."""
    size = settings.get("rows_per_step", settings["accumulation"])
    return [sum(values[first : first + size]) for first in range(0, len(values), size)]


if __name__ == "__main__":
    main()
