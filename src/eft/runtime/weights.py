"""A model's weights in a checkpoint: in their live dtypes, restored bit for bit into the live model.

Different from an export, which converts to the base checkpoint's dtype: here training goes on.
"""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from torch import Tensor, nn
from transformers import PretrainedConfig

from eft.core.errors import CheckpointError
from eft.runtime.draft import Draft
from eft.runtime.sharding import ONE_PROCESS, Sharding
from eft.runtime.tensors import INDEX_SUFFIX, TensorFiles, copy_exactly

MODEL_FILE = "model.safetensors"
ADAPTER_FILE = "adapter_model.safetensors"
BASE_FILE = "trained_base.safetensors"
"""Weights of the base model that are trained beside an adapter, outside its own modules; usually not there."""


def save_weights(folder: Path, model: nn.Module) -> None:
    """Write what `add_weights` gathers into `folder`, at once.

    Raises:
        CheckpointError: a file read back differs from the live weights.
    """
    draft = Draft()
    add_weights(draft, model)
    draft.write(folder)


def add_weights(draft: Draft, model: nn.Module) -> None:
    """Add what the base model alone does not give back: an adapter with its whole modules, else all weights.

    `adapter_model.safetensors` + `adapter_config.json` for a PeftModel; `model.safetensors`, sharded where it is large,
    + `config.json` otherwise: named as in the module, tied weights once. `model` is the unwrapped model (no DDP).
    """
    for name, tensors in live_weights(model).items():
        draft.add_tensors(name, tensors, sharded=name != ADAPTER_FILE)
    # A plain module has no config.
    config = model.peft_config[model.active_adapter] if isinstance(model, PeftModel) else getattr(model, "config", None)
    if isinstance(config, PretrainedConfig | PeftConfig):
        draft.add_files(lambda folder: config.save_pretrained(str(folder)))


def load_weights(folder: Path, model: nn.Module, sharding: Sharding = ONE_PROCESS) -> None:
    """Copy this process's part of the weights in `folder` into the live `model`, in place, one tensor at a time.

    Raises:
        CheckpointError: file missing, names, shapes or dtypes that do not fit.
    """
    for name, live in live_weights(model).items():
        if not _is_there(folder / name):
            held = [other for other in (MODEL_FILE, ADAPTER_FILE) if _is_there(folder / other)]
            raise CheckpointError(f"{folder / name}: missing" + (f"; the folder holds {held[0]}." if held else "."))
        copy_exactly(TensorFiles(folder / name), live, sharding)
    sharding.loaded(model)


def _is_there(path: Path) -> bool:
    return path.exists() or path.with_name(path.name + INDEX_SUFFIX).exists()


def live_weights(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """File name to tensors (sharing memory with the model) of what a checkpoint stores."""
    if isinstance(model, PeftModel):
        return _adapter_weights(model)
    # The parameters themselves: what shards them knows more of them than their memory.
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    persistent = model.state_dict(keep_vars=True)
    tensors.update({name: buffer.detach() for name, buffer in model.named_buffers() if name in persistent})
    return {MODEL_FILE: tensors}


def _adapter_weights(model: PeftModel) -> dict[str, dict[str, Tensor]]:
    # With its default, this asks the hub whether the vocabulary grew; trained embeddings are in the result anyway.
    live = model.state_dict(keep_vars=True)
    gathers = getattr(model.get_base_model(), "is_distributed_loading_by_transformers", False)
    # Of a model that was split at load peft would gather every weight: it is asked for names alone.
    given = {name: torch.tensor(number) for number, name in enumerate(live)} if gathers else live
    adapter = get_peft_model_state_dict(model, given, adapter_name=model.active_adapter, save_embedding_layers=False)
    if gathers:
        tensors = list(live.values())
        adapter = {name: tensors[int(number)] for name, number in adapter.items()}
    # Tensors without memory of their own (ZeRO-3) are told apart as objects.
    covered = {id(tensor) for tensor in adapter.values()} | {tensor.data_ptr() for tensor in adapter.values()} - {0}
    base = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not {id(parameter), parameter.data_ptr()} & covered
    }
    return {ADAPTER_FILE: dict(adapter), **({BASE_FILE: base} if base else {})}
