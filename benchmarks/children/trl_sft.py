"""TRL's SFTTrainer with its own packing, on the same samples, labels masked on the prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
from link import Link, RunOnCommand, common_arguments, load_model, lora_config, train
from plain_trainer import IGNORE_INDEX, per_step
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer


def samples(folder: Path) -> datasets.Dataset:
    """The samples before any packing, in the order in which eft's plan trains them."""
    ids, labels = np.load(folder / "sample_ids.npy"), np.load(folder / "sample_labels.npy")
    cuts = np.load(folder / "sample_ends.npy")[:-1]
    columns = {
        name: [part.tolist() for part in np.split(values, cuts)]
        for name, values in (("input_ids", ids), ("labels", labels))
    }
    return datasets.Dataset.from_dict(columns)


def main() -> None:
    """Train on command."""
    datasets.disable_progress_bars()
    link = Link()
    settings = link.settings
    arguments: dict[str, Any] = {
        **common_arguments(settings),
        "max_length": settings["capacity"],
        "packing": settings["packing"] is not None,
        "packing_strategy": settings["packing"] or "bfd",
        # Before and after packing: rows of best-fit-decreasing come sorted by their longest document.
        "shuffle_dataset": True,
        "use_liger_kernel": settings["liger"],
    }
    trainer = SFTTrainer(
        model=load_model(settings, settings["attention"]),
        args=SFTConfig(**arguments),
        train_dataset=samples(Path(settings["rows"])),
        processing_class=AutoTokenizer.from_pretrained(settings["model"]),
        peft_config=lora_config(settings) if settings["lora"] else None,
    )
    rows = trainer.train_dataset
    tokens = [len(ids) for ids in rows["input_ids"]]
    trainable = [trained_of(row) for row in rows]
    link.reply(fill=sum(tokens) / (len(tokens) * settings["capacity"]))
    trainer.add_callback(RunOnCommand(link, per_step(tokens, settings), per_step(trainable, settings)))
    train(trainer, link)


def trained_of(row: dict[str, Any]) -> int:
    """Labels of a row that its collator keeps: none at the first token of a document."""
    labels = np.array(row["labels"])
    lengths = row.get("seq_lengths") or [len(labels)]
    labels[np.cumsum([0, *lengths[:-1]])] = IGNORE_INDEX
    return int(np.sum(labels != IGNORE_INDEX))


if __name__ == "__main__":
    main()
