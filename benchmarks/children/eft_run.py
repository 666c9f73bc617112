"""eft, from its Python interface: the same config as a YAML file would hold, on a token store with the same samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from link import Link, RunOnCommand, train
from transformers import AutoTokenizer

from eft.builder import HFCausalTrainerBuilder, as_config
from eft.data.store import open_store
from eft.inputs import load_trainable_model
from eft.parallel.group import process_group
from eft.parallel.watch import stall_watch

TIMEOUT_S = 600.0


def config_of(settings: dict[str, Any]) -> dict[str, Any]:
    """The config of the contest."""
    config: dict[str, Any] = {
        "base_model": settings["model"],
        "datasets": [{"path": settings["rows"], "type": "completion"}],  # not read: the store is handed over
        "output_dir": settings["output"],
        "sequence_len": settings["capacity"],
        "sample_packing": True,
        "micro_batch_size": 1,
        "gradient_accumulation_steps": settings["accumulation"],
        "max_steps": settings["max_steps"],
        "learning_rate": settings["learning_rate"],
        "lr_scheduler": "constant",
        "optimizer": "adamw_torch_fused",
        "max_grad_norm": 1.0,
        "bf16": True,
        "gradient_checkpointing": settings["checkpointing"],
        "logging_steps": 1,
        "save_strategy": "no",
        "seed": settings["seed"],
        **settings["eft"],
    }
    if settings["compile"]:
        config["torch_compile"] = True
    if settings["lora"]:
        lora = settings["lora"]
        config |= {
            "adapter": "lora",
            "lora_r": lora["r"],
            "lora_alpha": lora["lora_alpha"],
            "lora_dropout": lora["lora_dropout"],
            "lora_target_linear": True,
        }
    return config


def main() -> None:
    """Train on command."""
    link = Link()
    settings = link.settings
    config = as_config(config_of(settings))
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    builder = HFCausalTrainerBuilder(config, load_trainable_model(config, tokenizer), tokenizer)
    builder.train_dataset = open_store(Path(settings["rows"]) / "store")
    here = builder.environment
    with process_group(here.world_size, here.device, TIMEOUT_S), stall_watch(here.rank, here.world_size, TIMEOUT_S):
        run(builder, link)


def run(builder: HFCausalTrainerBuilder, link: Link) -> None:
    """In the group of all processes."""
    store = builder.train_dataset
    trainer = builder.build()
    plan = trainer.make_plan()
    steps = [plan.step(number) for number in range(plan.total_steps)]
    trainable = [int(sum(np.sum(store.trainable_counts[ids]) for ids in step.bins)) for step in steps]
    trainer.add_callback(RunOnCommand(link, [step.tokens for step in steps], trainable))
    link.reply(fill=plan.summary()["fill_percent"] / 100)
    train(trainer, link)


if __name__ == "__main__":
    main()
