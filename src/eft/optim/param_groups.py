"""Which parameters decay: matrices do; norms, biases and embeddings do not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from eft.config.optim import OptimConfig
from eft.core.errors import ModelError

DECAYED = "matrices"
PLAIN = "norms, biases, embeddings"

# peft keeps the factors and rows of an adapted embedding outside any nn.Embedding.
_EMBEDDING_MARKS = ("lora_embedding_A", "lora_embedding_B", "trainable_tokens_delta")


def param_groups(model: nn.Module, cfg: OptimConfig) -> list[dict[str, Any]]:
    """The optimizer's groups: `{"name", "params", "lr", "weight_decay"}`, every trainable parameter in exactly one.

    Parameters are in the model's order; a group without parameters is left out. The groups do not depend on the value
    of `weight_decay`, so that a checkpoint's groups fit a run with another one.

    Raises:
        ModelError: nothing is trainable.
    """
    decayed = decayed_names(model)
    members: dict[str, list[nn.Parameter]] = {DECAYED: [], PLAIN: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            members[DECAYED if name in decayed else PLAIN].append(parameter)
    if not any(members.values()):
        raise ModelError("No parameter of the model is trainable; check `adapter` and `unfrozen_parameters`.")
    decay = {DECAYED: cfg.weight_decay, PLAIN: 0.0}
    return [
        {"name": group, "params": parameters, "lr": cfg.learning_rate, "weight_decay": decay[group]}
        for group, parameters in members.items()
        if parameters
    ]


def decayed_names(model: nn.Module) -> frozenset[str]:
    """Names of the trainable parameters that decay.

    A parameter shared by several modules (a tied output head) decays only if it does so wherever it is used.
    """
    plain = {id(parameter) for name, module, parameter in _owned(model) if not _is_matrix(name, module, parameter)}
    return frozenset(
        name for name, parameter in model.named_parameters() if parameter.requires_grad and id(parameter) not in plain
    )


def _owned(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            yield (f"{prefix}.{name}" if prefix else name), module, parameter


def _is_matrix(name: str, module: nn.Module, parameter: nn.Parameter) -> bool:
    if parameter.ndim < 2 or name.endswith("bias") or any(mark in name for mark in _EMBEDDING_MARKS):
        return False
    if isinstance(module, nn.Embedding) or "norm" in type(module).__name__.lower():
        return False
    # Models mark what must not decay although it is two-dimensional (Mamba's A_log) with this attribute.
    return not getattr(parameter, "_no_weight_decay", False)


def group_table(groups: list[dict[str, Any]]) -> list[list[str]]:
    """Rows for the start print, the header first: group, tensors, parameters, learning rate, weight decay."""
    rows = [["group", "tensors", "parameters", "peak learning rate", "weight decay"]]
    for group in groups:
        count = sum(parameter.numel() for parameter in group["params"])
        rate = group.get("initial_lr", group["lr"])
        rows.append([group["name"], str(len(group["params"])), f"{count:,}", f"{rate:g}", f"{group['weight_decay']:g}"])
    return rows
