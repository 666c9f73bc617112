"""A tiny model and rows on disk, and the keys of a run over them: LoRA with dropout, packed, some rows held out."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tests.tiny import tiny_tokenizer
from tests.tiny_models import tiny_model

WORDS = "alpha beta gamma delta one two three red green blue".split()


def lay_out(folder: Path) -> dict[str, Any]:
    """Write model and rows into `folder`; returns the keys but those of steps, saves and evaluations."""
    tokenizer = tiny_tokenizer()
    tiny_model("llama", vocab_size=len(tokenizer)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    draw = random.Random(0)
    with (folder / "rows.jsonl").open("w") as file:
        for number in range(64):
            question = f"{number} " + " ".join(draw.choices(WORDS, k=draw.randint(1, 16)))
            answer = " ".join(draw.choices(WORDS, k=draw.randint(1, 12)))
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": turns}) + "\n")
    return {
        "base_model": str(folder / "model"),
        "datasets": [{"path": str(folder / "rows.jsonl"), "type": "chat_template"}],
        "dataset_prepared_path": str(folder / "cache"),
        "val_set_size": 0.1,
        "sequence_len": 192,
        "sample_packing": True,
        "micro_batch_size": 1,
        "learning_rate": 1e-2,
        "adapter": "lora",
        "lora_target_linear": True,
        "lora_dropout": 0.1,
        "bf16": False,
        "verify_saves": "never",
    }
