"""The script that a user of a peer writes for a first run: `startup_script.py trainer|trl FOLDER`."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from datasets import disable_progress_bars, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments
from transformers.data.data_collator import DataCollatorWithFlattening


class FirstStep(TrainerCallback):
    """Says when the first step is over."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Once."""
        if state.global_step == 1:
            print(f"first step at {time.time()}", flush=True)


def main() -> None:
    """Three steps."""
    kind, folder = sys.argv[1], Path(sys.argv[2])
    disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    rows = load_dataset("json", data_files=str(folder / "rows.jsonl"), split="train")
    arguments: dict[str, Any] = {
        "output_dir": str(folder / kind),
        "per_device_train_batch_size": 1,
        "max_steps": 3,
        "learning_rate": 1e-4,
        "use_cpu": True,
        "bf16": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    if kind == "trl":
        from trl import SFTConfig, SFTTrainer

        config = SFTConfig(**arguments, max_length=512, packing=True)
        SFTTrainer(model, config, train_dataset=rows, processing_class=tokenizer, callbacks=[FirstStep()]).train()
        return

    def tokenise(row: dict[str, Any]) -> dict[str, Any]:
        return {"input_ids": tokenizer.apply_chat_template(row["messages"], return_dict=True)["input_ids"]}

    rows = rows.map(tokenise, remove_columns=["messages"])
    arguments["per_device_train_batch_size"] = 8
    Trainer(
        model=model,
        args=TrainingArguments(**arguments),
        train_dataset=rows,
        data_collator=DataCollatorWithFlattening(),
        callbacks=[FirstStep()],
    ).train()


if __name__ == "__main__":
    main()
