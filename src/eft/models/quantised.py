"""Bases in 4 or 8 bits, through bitsandbytes: how one is loaded, and the plain weights that it stands for.

QLoRA (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314): the frozen linear layers are kept in blocks of 4-bit
NormalFloat numbers with one scale per block, the scales themselves in 8 bits (double quantisation), and each layer is
multiplied in the compute dtype. Embeddings, norms, the output head and fused experts stay as they are.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.integrations.bitsandbytes import dequantize_bnb_weight

from eft.config.model import ModelConfig
from eft.core.errors import ConfigError, ModelError
from eft.models.seeding import seeded_rng

_LAYERS = ("Linear4bit", "Linear8bitLt")


def quantisation_of(cfg: ModelConfig, compute_dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """How the base is to be quantised; None where it is not.

    Four bits are NF4 with double quantisation, multiplied in `compute_dtype`, where `bnb_config_kwargs` says nothing
    else.

    Raises ModelError when bitsandbytes is missing, ConfigError for a value that it does not know.
    """
    if not (cfg.load_in_4bit or cfg.load_in_8bit):
        return None
    name = "load_in_4bit" if cfg.load_in_4bit else "load_in_8bit"
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(f"{name}: needs the package bitsandbytes; pip install 'eft-trainer[qlora]'")
    options: dict[str, Any] = {name: True}
    if cfg.load_in_4bit:
        options |= {
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": compute_dtype,
        }
    options |= cfg.bnb_config_kwargs or {}
    try:
        return BitsAndBytesConfig(**options)
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"bnb_config_kwargs: {error}") from error


def quantisation_facts(model: nn.Module) -> dict[str, Any] | None:
    """What a manifest says of a quantised base, enough to quantise it again; None for a plain one."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    return cast("dict[str, Any]", config.to_dict()) if isinstance(config, BitsAndBytesConfig) else None


def quantised(model: PreTrainedModel, quantisation: BitsAndBytesConfig) -> PreTrainedModel:
    """The same model with its linear layers quantised, for weights that come from no safetensors file."""
    with seeded_rng(0):
        result = type(model).from_pretrained(
            None,
            config=model.config,
            state_dict=model.state_dict(),
            dtype=model.config.dtype,
            quantization_config=quantisation,
        )
    result.generation_config = model.generation_config
    result.name_or_path = result.config.name_or_path = model.config.name_or_path
    return cast("PreTrainedModel", result)


def quantised_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The quantised layers by name."""
    if "bitsandbytes" not in sys.modules:
        return {}
    import bitsandbytes as bnb

    kinds = tuple(getattr(bnb.nn, name) for name in _LAYERS)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def plain_weight(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """The weight [out, in] that a quantised layer stands for, in `dtype`; memory of its own."""
    state = layer.state if type(layer).__name__ == "Linear8bitLt" else None
    with torch.no_grad():
        return cast("Tensor", dequantize_bnb_weight(layer.weight, state)).to(dtype)


def plain_linear(layer: nn.Module, dtype: torch.dtype) -> nn.Linear:
    """A frozen linear layer with the weights that the quantised `layer` stands for."""
    weight = plain_weight(layer, dtype)
    with torch.device("meta"):
        plain = nn.Linear(weight.shape[1], weight.shape[0], bias=layer.bias is not None)
    plain.weight = nn.Parameter(weight, requires_grad=False)
    if layer.bias is not None:
        plain.bias = cast("nn.Parameter", layer.bias)
    return plain.train(layer.training)


def keep_as_stored(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit layers for its inference kernel on CPUs with AVX512-BF16.

    Its first forward in evaluation mode would repack them in place, round their scales to bf16, and leave them so: the
    kernel knows no backward, so the training after it would get wrong gradients for everything below (0.50.2).
    """
    for layer in quantised_layers(model).values():
        if type(layer).__name__ == "Linear4bit":
            layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]  # a flag of the layer


@contextmanager
def plain_layers(model: nn.Module) -> Iterator[None]:
    """Inside it every quantised layer of `model` is a plain one with the weights that it stands for."""
    layers = quantised_layers(model)
    make_plain(model)
    try:
        yield
    finally:
        for name, layer in layers.items():
            model.set_submodule(name, layer)


def make_plain(model: nn.Module) -> None:
    """Put a plain linear layer in the place of every quantised one, for good."""
    for name, layer in quantised_layers(model).items():
        model.set_submodule(name, plain_linear(layer, _dtype_of(model)))


def _dtype_of(model: nn.Module) -> torch.dtype:
    """What the base was loaded in."""
    dtype = model.config.dtype
    assert isinstance(dtype, torch.dtype), "transformers records the dtype of what it loads"
    return dtype


def element_count(parameter: Tensor) -> int:
    """Weights that a parameter holds; one of 4 bits packs two or more into each of its elements."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else int(torch.Size(state.shape).numel())
