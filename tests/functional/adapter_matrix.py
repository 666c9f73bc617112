"""The adapter matrix: train 5 steps → audit → save → reload → merge → compare, for every kind of adapter and model.

`python -m tests.functional.adapter_matrix` runs all of it and writes the table in docs/adapters.md.
"""

from __future__ import annotations

import itertools
import json
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from eft import run
from eft.config.load import config_from_mapping
from eft.core.records import PromiseResult
from eft.models import verify_child, verify_export
from eft.models.merge import Merge, merge_adapter
from tests.tiny import tiny_tokenizer
from tests.tiny_models import tiny_model

METHODS: dict[str, dict[str, Any]] = {
    "LoRA": {"adapter": "lora"},
    "QLoRA": {"adapter": "qlora", "load_in_4bit": True},
    "DoRA": {"adapter": "lora", "peft_use_dora": True},
    "PiSSA": {"adapter": "lora", "peft_init_lora_weights": "pissa"},
}
FAMILIES = {"Llama": "llama", "Qwen3": "qwen3", "Gemma3": "gemma3_text", "Qwen3-MoE": "qwen3_moe"}
NEW_TOKENS = ["<one>", "<two>", "<three>", "<four>", "<five>"]
ROWS: dict[str, dict[str, Any]] = {
    "none": {},
    "rows": {"tokens": NEW_TOKENS, "peft_trainable_token_indices": "new"},
    "whole": {"tokens": NEW_TOKENS},
}
"""How the five new tokens are trained: not there, their rows alone, the embeddings whole (`lora_modules_to_save`)."""
STEPS = 5


@dataclass(frozen=True)
class Case:
    """One cell."""

    method: str
    family: str
    tied: bool
    new_tokens: str

    def __str__(self) -> str:
        return f"{self.method}-{self.family}-{'tied' if self.tied else 'untied'}-{self.new_tokens}"

    def keys(self) -> dict[str, Any]:
        """Of the config."""
        keys = {**METHODS[self.method], **ROWS[self.new_tokens]}
        if self.new_tokens == "whole":
            keys["lora_modules_to_save"] = ["embed_tokens"] if self.tied else ["embed_tokens", "lm_head"]
        if self.family == "Qwen3-MoE" and self.method in ("DoRA", "PiSSA"):  # not offered for fused experts
            keys |= {"lora_target_linear": False, "lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
        return keys


ALL = [Case(*cell) for cell in itertools.product(METHODS, FAMILIES, (True, False), ROWS)]


def save_base(folder: Path, case: Case, tokenizer: PreTrainedTokenizerFast) -> None:
    """The tiny bf16 base of a case, in files."""
    model = tiny_model(
        FAMILIES[case.family],
        vocab_size=len(tokenizer),
        tie_word_embeddings=case.tied,
        hidden_size=64,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_rows(path: Path) -> None:
    """Conversations in which every new token occurs."""
    words = "one two three four five hello world Rome Paris France".split()
    with path.open("w") as file:
        for number in range(24):
            question = " ".join(words[number % 5 : number % 5 + 3])
            answer = f"{NEW_TOKENS[number % 5]} {words[number % 10]} {NEW_TOKENS[(number + 2) % 5]}"
            turns = [{"role": "user", "content": f"{question} {number}"}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": turns}) + "\n")


def check_reloaded(folder: Path, model: Any, tokenizer: PreTrainedTokenizerFast) -> list[PromiseResult]:
    """E6 of an export, by the program that a fresh process would run: a process for every cell takes too long."""

    def run_here(export: Path, ids: list[int]) -> tuple[dict[str, Tensor] | None, str]:
        out = export.parent / "logits.safetensors"
        verify_child.main(export, ids, out)
        return load_file(out), ""

    manifest = json.loads((folder / "manifest.json").read_text())
    with mock.patch.object(verify_export, "_run_child", run_here):
        return [
            verify_export.check_saved_tensors(folder, model, getattr(torch, manifest["dtype"])),
            verify_export.verify_export(folder, model, tokenizer, list(range(3, 40))),
        ]


def run_case(case: Case, place: Path) -> tuple[list[PromiseResult], Merge]:
    """Train, export, reload and merge; returns the promises of the run and of the export, and the merge."""
    tokenizer = tiny_tokenizer()
    save_base(place / "base", case, tokenizer)
    write_rows(place / "rows.jsonl")
    config = config_from_mapping(
        {
            "base_model": str(place / "base"),
            "datasets": [{"path": str(place / "rows.jsonl"), "type": "chat_template"}],
            "dataset_prepared_path": str(place / "prepared"),
            "output_dir": str(place / "out"),
            "sequence_len": 64,
            "sample_packing": True,
            "micro_batch_size": 2,
            "max_steps": STEPS,
            "learning_rate": 1e-2,
            "bf16": True,
            "verify_saves": "never",
            "save_strategy": "no",
            "lora_target_linear": True,
            **case.keys(),
        }
    )
    model, trained_tokenizer, trainer = run.train(config)
    promises = [*trainer.outcome.promises, *check_reloaded(place / "out", model, trained_tokenizer)]
    merged = merge_adapter(place / "out", place / "merged")
    AutoModelForCausalLM.from_pretrained(place / "merged")
    return promises, merged


def table() -> str:
    """One line per method, family and tie; the largest difference of logits over the three ways of new tokens."""
    lines = ["| method | model | embeddings | audit | reloaded | merged, fp32 | merged, bf16 |", "|---" * 7 + "|"]
    for method, family, tied in itertools.product(METHODS, FAMILIES, (True, False)):
        exact = rounded = 0.0
        for rows in ROWS:
            with tempfile.TemporaryDirectory() as place:
                promises, merged = run_case(Case(method, family, tied, rows), Path(place))
            for promise in (*promises, *merged.promises):
                assert promise.status != "fail", promise
            shares = [p.numbers["max_abs_difference"] / p.numbers["max_abs_logit"] for p in merged.promises[:2]]
            exact, rounded = max(exact, shares[0]), max(rounded, shares[1])
        what = "tied" if tied else "untied"
        lines.append(f"| {method} | {family} | {what} | pass | bit-equal | {exact:.0e} | {rounded:.0e} |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


def main() -> None:
    """Write the table between its marks."""
    page = Path(__file__).parents[2] / "docs" / "adapters.md"
    text = page.read_text()
    body = f"<!-- matrix -->\n{table()}\n<!-- /matrix -->"
    page.write_text(re.sub(r"<!-- matrix -->.*<!-- /matrix -->", lambda _: body, text, flags=re.DOTALL))


if __name__ == "__main__":
    main()
