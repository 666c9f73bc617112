"""What each trained parameter is to the model, which decides its weight decay, learning rate and update rule."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

Role = Literal["matrix", "embedding", "head", "norm or bias", "adapter factor"]

# peft keeps the factors and rows of an adapted embedding outside any nn.Embedding.
_EMBEDDING_MARKS = ("lora_embedding_A", "lora_embedding_B", "trainable_tokens_delta")
_SECOND_FACTORS = ("lora_B", "lora_embedding_B")


@dataclass(frozen=True)
class Member:
    """One trained parameter."""

    name: str
    parameter: nn.Parameter
    role: Role
    decays: bool
    is_second_factor: bool
    """LoRA's B, which starts at zero."""
    is_embedding_factor: bool
    """Of an adapter around an embedding."""
    depth: int | None
    """Its decoder layer, from 0; None outside of them."""


def trained_members(model: nn.Module) -> list[Member]:
    """Every trainable parameter of `model` once, in the model's order.

    A parameter shared by several modules (a tied output head) is what it is to the first of them that makes it an
    embedding, and decays only if it does so wherever it is used.
    """
    roles: dict[int, Role] = {}
    fixed: set[int] = set()
    head = _head(model)
    factors = _factor_prefixes(model)
    for name, module, parameter in _owned(model):
        role = _role(name, module, parameter, head, factors)
        if role == "embedding" or id(parameter) not in roles:
            roles[id(parameter)] = role
        if not _decays(name, module, parameter, role):
            fixed.add(id(parameter))
    layers = _layer_pattern(model)
    members = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found = layers.match(name) if layers is not None else None
            members.append(
                Member(
                    name,
                    parameter,
                    roles[id(parameter)],
                    id(parameter) not in fixed,
                    any(f".{mark}." in f".{name}." for mark in _SECOND_FACTORS),
                    any(mark in name for mark in _EMBEDDING_MARKS),
                    int(found[1]) if found else None,
                )
            )
    return members


def num_layers(model: nn.Module) -> int:
    """Decoder layers of `model`; 0 where none can be told."""
    found = _layer_list(model)
    return 0 if found is None else len(found[1])


def _owned(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            yield (f"{prefix}.{name}" if prefix else name), module, parameter


def _role(
    name: str, module: nn.Module, parameter: nn.Parameter, head: frozenset[str], factors: tuple[str, ...]
) -> Role:
    if isinstance(module, nn.Embedding) or any(mark in name for mark in _EMBEDDING_MARKS):
        return "embedding"
    if name.startswith(factors):
        return "adapter factor"
    if parameter.ndim < 2 or name.endswith("bias") or "norm" in type(module).__name__.lower():
        return "norm or bias"
    return "head" if name in head else "matrix"


def _decays(name: str, module: nn.Module, parameter: nn.Parameter, role: Role) -> bool:
    if role in ("embedding", "norm or bias") or parameter.ndim < 2 or name.endswith("bias"):
        return False
    # Models mark what must not decay although it is two-dimensional (Mamba's A_log) with this attribute.
    return not getattr(parameter, "_no_weight_decay", False)


def _head(model: nn.Module) -> frozenset[str]:
    """Names of the parameters of the output head, wrapped by peft or not."""
    find = getattr(model, "get_output_embeddings", None)
    head = find() if find is not None else None
    prefixes = tuple(f"{name}." for name, module in model.named_modules() if head is not None and module is head)
    return frozenset(name for name, _ in model.named_parameters(remove_duplicate=False) if name.startswith(prefixes))


def _factor_prefixes(model: nn.Module) -> tuple[str, ...]:
    """Where adapters keep their own weights: `….q_proj.lora_A`."""
    return tuple(
        f"{name}.{part}"
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
        for part in module.adapter_layer_names
    )


def _layer_list(model: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """The longest list of modules that is in no other list: the decoder's layers."""
    lists: list[tuple[str, nn.ModuleList]] = []
    for name, module in model.named_modules():
        inside: Any = any(name.startswith(f"{outer}.") for outer, _ in lists)
        if isinstance(module, nn.ModuleList) and not inside:
            lists.append((name, module))
    return max(lists, key=lambda entry: len(entry[1]), default=None)


def _layer_pattern(model: nn.Module) -> re.Pattern[str] | None:
    found = _layer_list(model)
    return None if found is None else re.compile(rf"{re.escape(found[0])}\.(\d+)\.")
