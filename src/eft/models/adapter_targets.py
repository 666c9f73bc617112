"""Which layers and parameters of a model an adapter goes to: every name is found, or the nearest ones are named."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from eft.config.model import AdapterConfig
from eft.core.errors import ConfigError, ModelError, nearest

ALL_LINEAR = "all-linear"
"""peft's name for every linear layer but the output head."""


def target_modules(model: nn.Module, cfg: AdapterConfig) -> list[str] | str:
    """peft's `target_modules`, after checking that every name or the expression finds something."""
    targets, linear = cfg.lora_target_modules, cfg.lora_target_linear
    if not targets:
        if not linear:
            if cfg.lora_target_parameters:
                return []
            raise ConfigError(
                "adapter: nothing to adapt; set lora_target_modules (names or one regular expression) or "
                "lora_target_linear: true"
            )
        return ALL_LINEAR
    names = [name for name, _ in model.named_modules() if name]
    if isinstance(targets, str):
        if targets == ALL_LINEAR:
            return ALL_LINEAR
        if linear:
            raise ConfigError("lora_target_linear: cannot be added to a regular expression in lora_target_modules")
        if not any(_fullmatch("lora_target_modules", targets, name) for name in names):
            if any(name.endswith(f".{targets}") for name in names):
                hint = f"; as text it is a regular expression for the whole name, so write a list: [{targets}]"
            else:
                hint = advice(targets, names)
            raise ModelError(f"lora_target_modules: {targets!r} matches no module{hint}")
        return targets
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise ModelError(f"lora_target_modules: {target!r} matches no module{advice(target, names)}")
    return [*targets, *_linear_layers(model)] if linear else list(targets)


def target_parameters(model: nn.Module, cfg: AdapterConfig) -> list[str] | None:
    names = [name for name, _ in model.named_parameters()]
    for target in cfg.lora_target_parameters or []:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise ModelError(f"lora_target_parameters: {target!r} ends no parameter's name{advice(target, names)}")
    return list(cfg.lora_target_parameters) if cfg.lora_target_parameters else None


def matching(model: nn.Module, key: str, wanted: list[str] | str | None) -> list[str] | str | None:
    """Names or one expression, each of which finds a module."""
    names = [name for name, _ in model.named_modules() if name]
    if isinstance(wanted, str):
        found = {wanted} if any(_fullmatch(key, wanted, name) for name in names) else set()
    else:
        found = {entry for entry in wanted or [] if any(n == entry or n.endswith(f".{entry}") for n in names)}
    for entry in [wanted] if isinstance(wanted, str) else wanted or []:
        if entry not in found:
            raise ModelError(f"{key}: {entry!r} matches no module{advice(entry, names)}")
    return wanted


def name_pattern(model: nn.Module, key: str, values: dict[str, int] | None) -> dict[str, int]:
    """Ranks or alphas by the end of a name; peft would pass over an entry that finds nothing."""
    names = [name for name, _ in model.named_modules() if name]
    for entry in values or {}:
        if not any(_fullmatch(key, rf"(.*\.)?({entry})", name) for name in names):
            raise ModelError(f"{key}: {entry!r} matches no module{advice(entry, names)}")
    return dict(values or {})


def layer_numbers(model: PreTrainedModel, cfg: AdapterConfig) -> list[int] | int | None:
    wanted = cfg.peft_layers_to_transform
    if wanted is None:
        return None
    name, layers = decoder_layers(model)
    for number in [wanted] if isinstance(wanted, int) else wanted:
        if not 0 <= number < len(layers):
            raise ModelError(
                f"peft_layers_to_transform: {number}, but the model has layers 0 to {len(layers) - 1} ({name})"
            )
    return wanted


def token_rows(
    model: PreTrainedModel, cfg: AdapterConfig, new_token_ids: Sequence[int]
) -> list[int] | dict[str, list[int]] | None:
    """Rows to train; with `new` in the embedding and, where it has weights of its own, in the head."""
    wanted = cfg.peft_trainable_token_indices
    if wanted != "new":
        rows = int(model.get_input_embeddings().weight.shape[0])
        by_module = wanted if isinstance(wanted, dict) else {"": wanted or []}
        for number in (number for ids in by_module.values() for number in ids):
            if not 0 <= number < rows:
                raise ModelError(f"peft_trainable_token_indices: {number}, but the embedding has rows 0 to {rows - 1}")
        return wanted
    if not new_token_ids:
        raise ConfigError("peft_trainable_token_indices: `new`, but the config adds no tokens; list some in `tokens`")
    return {name: list(new_token_ids) for name in trained_embeddings(model)}


def trained_embeddings(model: PreTrainedModel) -> list[str]:
    """Names of the embedding and, unless it is tied, of the head: what a token has a row in."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    is_tied = head is None or head.weight is embedding.weight
    wanted = [embedding] if is_tied else [embedding, head]
    return [name for name, module in model.named_modules() if any(module is one for one in wanted)]


def _linear_layers(model: nn.Module) -> list[str]:
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return [n for n, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D) and module is not head]


def modules_to_save(model: nn.Module, cfg: AdapterConfig) -> list[str] | None:
    names = [name for name, _ in model.named_modules() if name]
    for target in cfg.lora_modules_to_save or []:
        if not any(name.endswith(target) for name in names):
            raise ModelError(f"lora_modules_to_save: {target!r} matches no module{advice(target, names)}")
    return list(cfg.lora_modules_to_save) if cfg.lora_modules_to_save else None


def saves_tied_embedding(model: PreTrainedModel, cfg: AdapterConfig) -> bool:
    """peft trains a copy of a module to save; without this flag a tied head would go on using the old weights."""
    output, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if output is None or output.weight is not embedding.weight:
        return False
    saved = cfg.lora_modules_to_save or []
    tied = [name for name, module in model.named_modules() if module is output or module is embedding]
    return any(name.endswith(entry) for entry in saved for name in tied)


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder layers: the longest ModuleList that is in no other (experts lie inside layers)."""
    outer: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{other}.") for other in outer):
            outer[name] = module
    if not outer:
        raise ModelError(f"train_top_layers: no list of decoder layers in a {type(model).__name__}")
    return max(outer.items(), key=lambda item: len(item[1]))


def search(key: str, pattern: str, name: str) -> bool:
    try:
        return re.match(pattern, name) is not None
    except re.error as error:
        raise ConfigError(f"{key}: {pattern!r} is no regular expression: {error}") from error


def _fullmatch(key: str, pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise ConfigError(f"{key}: {pattern!r} is no regular expression: {error}") from error


def advice(word: str, names: Iterable[str]) -> str:
    """`; did you mean …?` from the last parts of the names, or from the names themselves."""
    names = list(names)
    endings = list(dict.fromkeys(part for name in names for part in name.split(".") if not part.isdigit()))
    plain = re.sub(r"[\^$\\*?()\[\]|+]", "", word).strip(".")
    unknown = [part for part in plain.split(".") if part and not part.isdigit() and part not in endings]
    close = next((found for part in unknown if (found := nearest(part, endings))), None)
    return f"; did you mean {close!r}?" if close else f"; there are: {', '.join(endings[:12])}"
