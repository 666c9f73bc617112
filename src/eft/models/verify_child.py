"""`python -m eft.models.verify_child FOLDER IDS OUT`: load an export as any user of transformers would, in a process of
its own, and write the logits of one document.

IDS are comma-separated token ids. OUT is a safetensors file with `logits` [tokens, vocabulary], `peak_mib` (memory of
this process) and, when the folder has a tokenizer, `tokens`: its encoding of the text that it decodes the ids to.
Without IDS it holds the SHA-256 of every loaded tensor (of an adapter: of its own), uint8 [32] each, and `peak_mib`.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GgufConfig

from eft.core.constants import MANIFEST_NAME
from eft.models.auto_class import auto_class
from eft.models.plain import live_adapter_state, probe_logits, tensor_digest
from eft.models.quantised import make_plain, quantised

MODEL_KEYS = ("gguf_file", "revision")
"""Manifest entries that `from_pretrained` needs besides the base's name."""


def load_export(folder: Path) -> Any:
    """The saved model through plain `from_pretrained`, with stock attention: an export in its own dtype, the weights of
    a checkpoint in fp32, which holds those of a live model exactly.

    A quantised base is loaded as it was in training, and each of its layers is multiplied as the weights that it stands
    for: the kernels for 4 and 8 bits differ from machine to machine, the weights do not.
    """
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    if not (folder / "adapter_config.json").is_file():
        options = {"dtype": torch.float32} if manifest["kind"] == "checkpoint" else {}
        return auto_class(str(folder)).from_pretrained(folder, **options)
    base = load_base(
        str(manifest["base_model"]),
        manifest.get("gguf_file"),
        manifest.get("revision"),
        manifest.get("quantization"),
    )
    make_plain(base)
    rows = int(manifest["vocabulary_rows"])
    if rows != base.get_input_embeddings().weight.shape[0]:
        base.resize_token_embeddings(rows, mean_resizing=False)
    return PeftModel.from_pretrained(base, folder)


def load_base(
    name: str, gguf_file: str | None, revision: str | None, quantization: dict[str, Any] | None = None
) -> Any:
    """The base model of an adapter, as `load_model` loads it: a GGUF file is de-quantised to bf16, for one.

    `quantization`: the config of a 4- or 8-bit base.
    """
    options: dict[str, Any] = {} if revision is None else {"revision": revision}
    if gguf_file is not None:
        options |= {"gguf_file": gguf_file, "quantization_config": GgufConfig(dequantize=True), "dtype": torch.bfloat16}
    bits = None if quantization is None else BitsAndBytesConfig.from_dict(quantization)
    if bits is not None and gguf_file is None:
        options["quantization_config"] = bits
    loader = AutoModelForCausalLM if gguf_file is not None else auto_class(name, revision)
    model = loader.from_pretrained(name, **options)
    return model if bits is None or gguf_file is None else quantised(model, bits)


def main(folder: Path, ids: list[int], out: Path) -> None:
    """Write the logits, and the tokenizer's round trip, to `out`."""
    model = load_export(folder)
    if not ids:
        save_file({**_digests(model), "peak_mib": torch.tensor(_peak_mib())}, out)
        return
    logits = probe_logits(model, ids).contiguous()
    tensors = {"logits": logits, "peak_mib": torch.tensor(_peak_mib())}
    if (folder / "tokenizer_config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        encoded = tokenizer.encode(tokenizer.decode(ids), add_special_tokens=False)
        tensors["tokens"] = torch.tensor(encoded, dtype=torch.int64)
    save_file(tensors, out)


def _digests(model: Any) -> dict[str, torch.Tensor]:
    state = live_adapter_state(model, with_embeddings=False) if isinstance(model, PeftModel) else model.state_dict()
    digests = {name: bytes.fromhex(tensor_digest(tensor)) for name, tensor in state.items()}
    return {name: torch.tensor(list(digest), dtype=torch.uint8) for name, digest in digests.items()}


def _peak_mib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(number) for number in sys.argv[2].split(",") if number], Path(sys.argv[3]))
