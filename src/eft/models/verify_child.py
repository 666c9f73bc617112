"""`python -m eft.models.verify_child FOLDER IDS OUT`: load an export as any user of transformers would, in a process of
its own, and write the logits of one document.

IDS are comma-separated token ids. OUT is a safetensors file with `logits` [tokens, vocabulary] and, when the folder has
a tokenizer, `tokens`: its encoding of the text that it decodes the ids to.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from eft.core.constants import MANIFEST_NAME
from eft.models.plain import probe_logits

MODEL_KEYS = ("gguf_file", "revision")
"""Manifest entries that `from_pretrained` needs besides the base's name."""


def load_export(folder: Path) -> Any:
    """The exported model through plain `from_pretrained`, in its own dtype with stock attention."""
    if not (folder / "adapter_config.json").is_file():
        return AutoModelForCausalLM.from_pretrained(folder)
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    base = load_base(str(manifest["base_model"]), manifest.get("gguf_file"), manifest.get("revision"))
    rows = int(manifest["vocabulary_rows"])
    if rows != base.get_input_embeddings().weight.shape[0]:
        base.resize_token_embeddings(rows, mean_resizing=False)
    return PeftModel.from_pretrained(base, folder)


def load_base(name: str, gguf_file: str | None, revision: str | None) -> Any:
    """The base model of an adapter; a GGUF file is de-quantised to bf16, as `load_model` does."""
    options: dict[str, Any] = {} if revision is None else {"revision": revision}
    if gguf_file is not None:
        options |= {"gguf_file": gguf_file, "quantization_config": GgufConfig(dequantize=True), "dtype": torch.bfloat16}
    return AutoModelForCausalLM.from_pretrained(name, **options)


def main(folder: Path, ids: list[int], out: Path) -> None:
    """Write the logits, and the tokenizer's round trip, to `out`."""
    tensors = {"logits": probe_logits(load_export(folder), ids).contiguous()}
    if (folder / "tokenizer_config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        encoded = tokenizer.encode(tokenizer.decode(ids), add_special_tokens=False)
        tensors["tokens"] = torch.tensor(encoded, dtype=torch.int64)
    save_file(tensors, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(number) for number in sys.argv[2].split(",")], Path(sys.argv[3]))
