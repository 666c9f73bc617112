"""TRL's own preparation of conversations, masked but for the assistant's turns: SFTTrainer does it when it is built."""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time

import datasets
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer


def cpu_seconds() -> float:
    """Of this process and of the children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def main() -> None:
    """One preparation."""
    settings = json.loads(sys.argv[1])
    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(settings["tokenizer"])
    tokenizer.chat_template = settings["template"]
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape))
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder,
            assistant_only_loss=True,
            dataset_num_proc=settings["processes"],
            max_length=None,
            report_to="none",
            use_cpu=True,
            bf16=False,
        )
        start, used = time.perf_counter(), cpu_seconds()
        rows = datasets.load_dataset("json", data_files=settings["rows"], split="train", cache_dir=folder)
        trainer = SFTTrainer(model=model, args=config, train_dataset=rows, processing_class=tokenizer)
        wall, cpu = time.perf_counter() - start, cpu_seconds() - used
        table = trainer.train_dataset.with_format("arrow")
        tokens = trainable = 0
        mask = "assistant_masks" if "assistant_masks" in table.column_names else "labels"
        for batch in table.iter(1000):
            tokens += len(batch["input_ids"].combine_chunks().flatten())
            values = batch[mask].combine_chunks().flatten().to_numpy(zero_copy_only=False)
            trainable += int((values == 1).sum() if mask == "assistant_masks" else (values != -100).sum())
        print(json.dumps({"wall_s": wall, "cpu_s": cpu, "tokens": tokens, "trainable": trainable}))


if __name__ == "__main__":
    main()
