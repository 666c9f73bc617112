"""From the command to the first step: `eft train` and scripts with the peers, each a cold process, files in the cache.

    python benchmarks/startup.py

A tiny model and a few hundred chat rows, so that what is timed is imports, preparation and set-up. eft is timed with
rows that it prepared before and with an empty cache; the peers tokenise theirs with `datasets.map`, whose cache is warm
after the first round.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from environments import CACHE, environment_of
from tables import command_line, device_name, markdown_table, spread, today, write_section
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHILDREN = Path(__file__).parent / "children"
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WORDS = [
    *("the", "parcel", "came", "with", "a", "broken", "lid", "how", "long", "does", "shipping", "take", "please"),
    *("refund", "my", "card", "it", "is", "on", "its", "way"),
]
MARK = "first step at "


def prepare(folder: Path, rows: int) -> None:
    """A tiny model with a tokenizer, chat rows, and eft's config."""
    source = random.Random(0)
    with (folder / "rows.jsonl").open("w") as file:
        for _ in range(rows):
            turns = [
                {"role": role, "content": " ".join(source.choices(WORDS, k=source.randint(5, 60)))}
                for role in ("user", "assistant")
            ]
            file.write(json.dumps({"messages": turns}) + "\n")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|end|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|end|>", chat_template=CHATML
    )
    fast.save_pretrained(folder / "model")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(fast), pad_token_id=fast.pad_token_id, eos_token_id=fast.eos_token_id, **shape)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    (folder / "eft.yaml").write_text(
        f"base_model: {folder / 'model'}\n"
        f"datasets:\n  - path: {folder / 'rows.jsonl'}\n    type: chat_template\n"
        f"dataset_prepared_path: {folder / 'prepared'}\n"
        f"output_dir: {folder / 'eft'}\n"
        "sequence_len: 512\nsample_packing: true\nmicro_batch_size: 1\nlearning_rate: 1e-4\nmax_steps: 3\n"
        "bf16: false\nlogging_steps: 1\nsave_strategy: 'no'\nverify_saves: never\n"
    )


def seconds_to_first_step(command: list[str | Path], folder: Path, has_begun: str) -> float:
    """Seconds from the start of the process to the line that starts with, or holds, `has_begun`."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    environment |= {"TRANSFORMERS_VERBOSITY": "error", "COLUMNS": "200", "HF_HOME": str(folder / "hf")}
    started = time.time()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=folder
    ) as process:
        assert process.stdout is not None
        lines = []
        first: float | None = None
        for line in process.stdout:
            lines.append(line)
            if first is None and has_begun in line:
                first = time.time() - started
    if first is None or process.returncode:
        raise SystemExit(f"{command[0]} ended with {process.returncode}:\n{''.join(lines[-25:])}")
    return first


def main() -> int:
    """Measure in turn, print, write the section `startup` of docs/benchmarks.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--section", default="startup", help="section of docs/benchmarks.md to write; empty: none")
    options = parser.parse_args()
    torch.set_num_threads(1)
    CACHE.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="eft-bench-"))
    prepare(folder, options.rows)
    eft = [sys.executable, "-c", "from eft.cli.app import main; main()", "train", folder / "eft.yaml"]
    script = CHILDREN / "startup_script.py"
    trainer = [environment_of("transformers", "cpu"), script, "trainer", folder]
    trl = [environment_of("trl", "cpu"), script, "trl", folder]
    times: dict[str, list[float]] = {
        "eft train, rows prepared before": [],
        "eft train, rows not prepared": [],
        "transformers.Trainer, a script": [],
        "TRL SFTTrainer, a script": [],
    }
    for number in range(options.rounds + 1):
        shutil.rmtree(folder / "prepared", ignore_errors=True)
        values = []
        for command in (eft, eft, trainer, trl):
            shutil.rmtree(folder / "eft", ignore_errors=True)
            values.append(seconds_to_first_step(command, folder, "step 1/" if command is eft else MARK))
        if number:  # the first round warms the caches of files
            for name, value in zip(times, (values[1], values[0], values[2], values[3]), strict=True):
                times[name].append(value)
    rows = [[name, spread(values)] for name, values in times.items()]
    medians = [statistics.median(values) for values in times.values()]
    text = (
        f"`{command_line()}`, {today()}, {device_name('cpu')}; seconds from the "
        f"start of the process to the end of step 1, {options.rounds} rounds in turn, {options.rows} rows; median "
        f"(least to most).\n\n{markdown_table(['command', 'seconds'], rows)}\n\n"
        f"eft / transformers.Trainer: {medians[0] / medians[2]:.2f}."
    )
    print(text)
    if options.section:
        write_section(options.section, text)
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
