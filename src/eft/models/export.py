"""Write the final weights so that plain transformers loads them; a killed export leaves no half-new folder behind.

`verify_export` proves what was written (E6).
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils.other import TrainableTokensWrapper
from safetensors.torch import save_file
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from eft.core.atomic import TEMPORARY_MARK, fsync_path, fsync_tree, write_json
from eft.core.constants import MANIFEST_NAME
from eft.core.hashing import hash_file
from eft.models.generate import stop_token_ids
from eft.models.load import base_dtype
from eft.models.plain import adapter_name_of, adapter_state, cast_floats, plain_base
from eft.models.quantised import quantisation_facts
from eft.models.verify_export import check_saved_tensors, verify_export

__all__ = ["check_saved_tensors", "export_model", "verify_export"]

MAX_SHARD_SIZE = "5GB"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def export_model(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    save_dtype: torch.dtype | None,
    gguf_file: str | None = None,
    processor: Any = None,
) -> dict[str, Any]:
    """Write `model` (an adapter as an adapter) and `tokenizer` into `folder`; returns the manifest.

    Floating-point tensors are saved in `save_dtype`, else in the base checkpoint's dtype. `gguf_file` names the file an
    adapter's base came from; `processor`, of a model that takes images, is written with its tokenizer. Generation stops
    at what the tokenizer's chat template ends a turn with. The live model is not changed. Files appear in `folder` one
    by one once all of them are on disk, `manifest.json` (sha256 and size of each) last; files of an earlier export that
    the new one does not have are removed.
    """
    dtype = save_dtype or base_dtype(model)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{TEMPORARY_MARK}export.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        if isinstance(model, PeftModel):
            facts = _write_adapter(model, temporary, dtype, gguf_file)
        else:
            facts = _write_model(model, tokenizer, temporary, dtype)
        (tokenizer if processor is None else processor).save_pretrained(temporary)
        for path in temporary.iterdir():
            path.chmod(temporary.stat().st_mode & 0o666)  # safetensors makes files that only their owner may read
        manifest = {
            "kind": "export",
            "dtype": str(dtype).removeprefix("torch."),
            "vocabulary_rows": int(model.get_input_embeddings().weight.shape[0]),
            **facts,
            "files": {
                path.name: {"sha256": hash_file(path), "size": path.stat().st_size}
                for path in sorted(temporary.iterdir())
            },
        }
        _publish(temporary, folder, manifest)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return manifest


def _write_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: torch.dtype
) -> dict[str, Any]:
    plain = plain_base(model, dtype)
    if plain.generation_config is not None:
        mend_generation_config(plain, tokenizer)
    plain.save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE)
    return {"content": "model", "base_model": model.config.name_or_path or None}


def mend_generation_config(plain: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let generation stop at what the tokenizer ends a turn with, and keep an inherited contradiction from raising."""
    generation = plain.generation_config
    stops = stop_token_ids(plain, tokenizer)
    generation.eos_token_id = stops[0] if len(stops) == 1 else (stops or None)
    if generation.pad_token_id is None:
        generation.pad_token_id = tokenizer.pad_token_id
    try:
        generation.validate(strict=True)
    except ValueError:
        # Checkpoints are about that set a temperature without do_sample; transformers loads them but refuses to save.
        generation.do_sample = True


def _write_adapter(model: PeftModel, folder: Path, dtype: torch.dtype, gguf_file: str | None) -> dict[str, Any]:
    name = adapter_name_of(model)
    config = copy.deepcopy(model.peft_config[name])
    base = model.get_base_model().config.name_or_path or None
    state = cast_floats(adapter_state(model, with_embeddings=_base_was_resized(model, base, gguf_file)), dtype)
    # A tied head is listed beside the embedding and shares its memory, which safetensors does not allow.
    save_file(
        {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in state.items()},
        folder / ADAPTER_WEIGHTS,
        metadata={"format": "pt"},
    )
    config.inference_mode = True
    config.base_model_name_or_path = base
    config.save_pretrained(folder)
    return {
        "content": "adapter",
        "base_model": base,
        "gguf_file": gguf_file,
        "revision": config.revision,
        "quantization": quantisation_facts(model.get_base_model()),
    }


def _base_was_resized(model: PeftModel, base: str | None, gguf_file: str | None) -> bool:
    """Whether the base in memory has other embedding rows than its files; if so the adapter must bring them along.

    Embeddings under `lora_modules_to_save` are part of the adapter anyway, and so are rows that are trained alone.
    """
    embedding = model.get_base_model().get_input_embeddings()
    if base is None or hasattr(embedding, "modules_to_save"):
        return False
    options = {} if gguf_file is None else {"gguf_file": gguf_file}
    before = AutoConfig.from_pretrained(base, **options).get_text_config().vocab_size
    new_rows = set(range(before, embedding.weight.shape[0]))
    head = model.get_base_model().get_output_embeddings()
    trained = [module for module in (embedding, head) if isinstance(module, TrainableTokensWrapper)]
    if len(trained) == 2 and all(new_rows <= set(_trained_rows(module)) for module in trained):
        return False
    return bool(before != embedding.weight.shape[0])


def _trained_rows(embedding: TrainableTokensWrapper) -> list[int]:
    (rows,) = embedding.token_adapter.token_indices.values()
    return list(rows)


def _publish(temporary: Path, folder: Path, manifest: dict[str, Any]) -> None:
    """Move the finished files over; without a manifest in between, so that a mixture never looks complete."""
    fsync_tree(temporary)
    manifest_path = folder / MANIFEST_NAME
    stale: set[str] = set()
    if manifest_path.is_file():
        old = json.loads(manifest_path.read_text())
        if old.get("kind") == "export":
            stale = set(old["files"]) - set(manifest["files"])
        manifest_path.unlink()
        fsync_path(folder)
    for name in stale:
        (folder / Path(name).name).unlink(missing_ok=True)
    for path in sorted(temporary.iterdir()):
        path.replace(folder / path.name)
    fsync_path(folder)
    write_json(manifest_path, manifest)
