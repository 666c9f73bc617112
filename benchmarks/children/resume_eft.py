"""The same run by eft: `resume_eft.py SETTINGS`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from resume_peer import Record, hashed, record_inputs
from transformers import AutoModelForCausalLM, AutoTokenizer

from eft.builder import HFCausalTrainerBuilder, as_config


def main() -> None:
    """Train."""
    settings = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    record = Record(Path(settings["record"]), settings["kill_after"])
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    config = as_config(
        {
            "base_model": settings["model"],
            "datasets": [{"path": settings["rows"]}],  # not read: the rows are handed over
            "output_dir": settings["output"],
            "sequence_len": 64,
            "sample_packing": True,
            "micro_batch_size": settings["micro_batch_size"],
            "gradient_accumulation_steps": settings["accumulation"],
            "num_epochs": 2,
            "learning_rate": 1e-3,
            "optimizer": "adamw_torch_fused",
            "bf16": False,
            "save_steps": settings["save_steps"],
            "preflight": False,
        }
    )
    builder = HFCausalTrainerBuilder(config, model, AutoTokenizer.from_pretrained(settings["model"]))
    builder.train_dataset = json.loads(Path(settings["rows"]).read_text())
    trainer = builder.build()
    record_inputs(trainer.model, record)
    trainer.add_callback(record)
    trainer.train(resume_from_checkpoint=settings["resume"] or None)
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    state = trainer.plain_optimizer().state
    end = {
        "weights": {name: hashed(value) for name, value in trainer.model.state_dict().items()},
        "optimizer": {f"{names[id(parameter)]} {key}": hashed(torch.as_tensor(value))
                      for parameter, values in state.items() for key, value in values.items()},
    }  # fmt: skip
    with record.path.open("a") as file:
        file.write(json.dumps(end) + "\n")


if __name__ == "__main__":
    main()
