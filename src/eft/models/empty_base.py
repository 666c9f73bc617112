"""A model without weights, and the adapter of a folder on top of it: shapes and arithmetic, no memory."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import PeftConfig, PeftModel
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from eft.core.constants import MANIFEST_NAME
from eft.core.errors import ModelError


@dataclass(frozen=True)
class AdapterFacts:
    """What an adapter's folder says of itself and of its base."""

    folder: Path
    base: str
    """Folder or hub id."""
    gguf_file: str | None
    revision: str | None
    rows: int | None
    """Of the embedding it was trained with."""
    quantisation: dict[str, Any] | None
    """How the base was quantised in training."""


def adapter_facts(folder: Path) -> AdapterFacts:
    """Raises ModelError when the folder holds no adapter, or does not say of which base."""
    if not (folder / "adapter_config.json").is_file():
        raise ModelError(f"{folder} has no adapter_config.json, so there is nothing to merge")
    path = folder / MANIFEST_NAME
    facts: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    name = facts.get("base_model") or PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    if not name:
        raise ModelError(f"{folder}: adapter_config.json names no base model (base_model_name_or_path)")
    return AdapterFacts(
        folder,
        str(name),
        facts.get("gguf_file"),
        facts.get("revision"),
        facts.get("vocabulary_rows"),
        facts.get("quantization"),
    )


def empty_base(folder: Path, rows: int | None, real: Collection[str] = ()) -> PreTrainedModel:
    """The fp32 model of `folder` with `rows` embedding rows, its parameters empty (see `is_empty`), its buffers real.

    `real`: names of parameters that get memory all the same.
    """
    config = AutoConfig.from_pretrained(folder)
    if rows is not None:
        config.get_text_config().vocab_size = rows
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.tie_weights()
    made: dict[int, nn.Parameter] = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        # Not left on the meta device, where peft would put the adapter's own tensors too.
        empty = torch.empty(parameter.shape) if name in real else torch.zeros(()).expand(parameter.shape)
        tied = made.setdefault(id(parameter), nn.Parameter(empty, requires_grad=False))
        model.get_submodule(name.rpartition(".")[0]).register_parameter(name.rpartition(".")[2], tied)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()


def is_empty(parameter: Tensor) -> bool:
    """Whether a parameter has a shape, but no memory for it: all of its elements are one."""
    return parameter.is_meta or parameter.untyped_storage().nbytes() < parameter.nbytes


def empty_adapted(facts: AdapterFacts, base: Path) -> PeftModel:
    """`empty_base` with the adapter on top; the adapter's tensors are real, fp32 and on the CPU."""
    with safe_open(facts.folder / "adapter_model.safetensors", framework="pt") as file:
        saved = [name.removeprefix("base_model.model.") for name in file.keys()]  # noqa: SIM118  # safetensors' file cannot be iterated
    names = [name.replace(".token_adapter.", ".").replace(".base_layer.", ".") for name in saved]
    model = empty_base(base, facts.rows, names)
    try:
        adapted = PeftModel.from_pretrained(model, facts.folder)
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).splitlines()[:3])
        raise ModelError(f"{facts.folder}: the adapter does not fit {facts.base}: {reason}") from error
    return adapted.eval()
