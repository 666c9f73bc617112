"""One run of `transformers.Trainer` or TRL's SFTTrainer that is killed, or that continues: `resume_peer.py SETTINGS`.

Every step is appended to `record`: what went into the model (a hash of the ids), learning rate, loss. At the end the
hashes of weights and optimizer state follow. Imports nothing of eft.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

SHORTEST = 8
"""Tokens of the shortest row; what is shorter only fills up a last step."""


class Record(TrainerCallback):
    """Writes each step down, and kills the process after one of them."""

    def __init__(self, path: Path, kill_after: int | None) -> None:
        self.path, self.kill_after = path, kill_after
        self.fed: list[str] = []
        """Of the micro-batches since the last step."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """One line a step."""
        if logs and "loss" in logs:
            # Sorted: how a step is cut into micro-batches is not compared.
            rows, self.fed = sorted(self.fed), []
            line = {"step": state.global_step, "samples": rows, "lr": logs["learning_rate"], "loss": logs["loss"]}
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The step before this one is logged and saved by now."""
        if self.kill_after is not None and state.global_step == self.kill_after:
            os.kill(os.getpid(), signal.SIGKILL)


def hashed(tensor: torch.Tensor) -> str:
    """Of the bytes."""
    return hashlib.sha256(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def record_inputs(model: torch.nn.Module, record: Record) -> None:
    """Note what the model is called with, since loaders fetch ahead of it."""

    def note(module: torch.nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        record.fed += documents(named)

    model.register_forward_pre_hook(note, with_kwargs=True)


def documents(batch: dict[str, Any]) -> list[str]:
    """One hash per document of a batch: rows without their padding, packed rows cut where positions start anew."""
    found = []
    for number, row in enumerate(batch["input_ids"]):
        # Other kinds of masks come with packed rows, whose boundaries are in their positions.
        if (mask := batch.get("attention_mask")) is not None and mask.dim() == 2:
            row = row[mask[number].bool()]
        if (positions := batch.get("position_ids")) is None:
            found.append(hashed(row))
            continue
        starts = (positions[number] == 0).nonzero().flatten().tolist()
        spans = zip(starts, [*starts[1:], len(row)], strict=True)
        found += [hashed(row[start:end]) for start, end in spans if end - start >= SHORTEST]
    return found


def main() -> None:
    """Train."""
    settings = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    record = Record(Path(settings["record"]), settings["kill_after"])
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32)
    model.config.attention_dropout = 0.1
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    rows = json.loads(Path(settings["rows"]).read_text())
    arguments = {
        "output_dir": settings["output"],
        "per_device_train_batch_size": settings["micro_batch_size"],
        "gradient_accumulation_steps": settings["accumulation"],
        "num_train_epochs": 2,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "optim": "adamw_torch_fused",
        "use_cpu": True,
        "bf16": False,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": settings["save_steps"],
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 42,
        "dataloader_pin_memory": False,
    }
    trainer = trl_trainer(model, tokenizer, rows, arguments) if settings["peer"] == "trl" else plain_trainer(
        model, rows, arguments
    )  # fmt: skip
    record_inputs(trainer.model, record)
    trainer.add_callback(record)
    trainer.train(resume_from_checkpoint=settings["resume"] or None)
    state = trainer.optimizer.state_dict()["state"]
    end = {
        "weights": {name: hashed(value) for name, value in trainer.model.state_dict().items()},
        "optimizer": {f"{number} {key}": hashed(torch.as_tensor(value)) for number, values in state.items()
                      for key, value in values.items()},
    }  # fmt: skip
    with record.path.open("a") as file:
        file.write(json.dumps(end) + "\n")


def plain_trainer(model: Any, rows: list[dict[str, Any]], arguments: dict[str, Any]) -> Any:
    """Trainer over padded rows."""

    def padded(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        length = max(len(feature["input_ids"]) for feature in features)

        def column(name: str, fill: int) -> torch.Tensor:
            return torch.tensor([[*f[name], *[fill] * (length - len(f[name]))] for f in features])

        masks = [[1] * len(f["input_ids"]) + [0] * (length - len(f["input_ids"])) for f in features]
        return {
            "input_ids": column("input_ids", 0),
            "labels": column("labels", -100),
            "attention_mask": torch.tensor(masks),
        }

    options = TrainingArguments(**arguments, remove_unused_columns=False)
    return Trainer(model=model, args=options, train_dataset=rows, data_collator=padded)


def trl_trainer(model: Any, tokenizer: Any, rows: list[dict[str, Any]], arguments: dict[str, Any]) -> Any:
    """SFTTrainer with its packing."""
    import datasets
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    options = SFTConfig(**arguments, max_length=64, packing=True)
    data = datasets.Dataset.from_list(rows)
    return SFTTrainer(model=model, args=options, train_dataset=data, processing_class=tokenizer)


if __name__ == "__main__":
    main()
