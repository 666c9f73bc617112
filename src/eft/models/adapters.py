"""Which weights are trained: an adapter beside the model, a part of the model, or all of it; and in which dtype."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from eft.config.model import AdapterConfig, FreezingConfig
from eft.core.errors import ConfigError, ModelError, nearest
from eft.models.location import is_local, resolve_location
from eft.models.plain import base_model_of
from eft.models.seeding import seeded_rng

ALL_LINEAR = "all-linear"
"""peft's name for every linear layer but the output head."""


def apply_adapter(model: PreTrainedModel, cfg: AdapterConfig, seed: int) -> PreTrainedModel | PeftModel:
    """Wrap `model` in the adapter of `cfg`, or return it as it is when `adapter` is empty.

    Adapter weights are fp32 and depend on `seed` alone; the global RNG is left as it was. With `lora_model_dir` the
    trained adapter there is continued. A tied head stays tied when its embedding is in `lora_modules_to_save`.

    Raises ConfigError when no target is set or a key contradicts `lora_model_dir`, ModelError when a name matches no
    module.
    """
    if cfg.adapter is None:
        return model
    if cfg.lora_model_dir is not None:
        return _continue_adapter(model, cfg)
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=cfg.lora_r,
        lora_alpha=cfg.lora_alpha,
        lora_dropout=cfg.lora_dropout,
        target_modules=_target_modules(model, cfg),
        modules_to_save=_modules_to_save(model, cfg),
        use_dora=cfg.peft_use_dora,
        use_rslora=cfg.peft_use_rslora,
        bias="none",
        ensure_weight_tying=_saves_tied_embedding(model, cfg),
    )
    with seeded_rng(seed, model):
        try:
            return get_peft_model(model, config, autocast_adapter_dtype=True)
        except ValueError as error:
            what = str(error).partition("(")[0].strip()  # in brackets peft prints the whole module
            raise ModelError(f"lora_target_modules: {what} cannot take a LoRA adapter; name linear layers") from error


def _target_modules(model: nn.Module, cfg: AdapterConfig) -> list[str] | str:
    """peft's `target_modules`, after checking that every name or the expression finds something."""
    targets, linear = cfg.lora_target_modules, cfg.lora_target_linear
    if not targets:
        if not linear:
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
                advice = f"; as text it is a regular expression for the whole name, so write a list: [{targets}]"
            else:
                advice = _advice(targets, names)
            raise ModelError(f"lora_target_modules: {targets!r} matches no module{advice}")
        return targets
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise ModelError(f"lora_target_modules: {target!r} matches no module{_advice(target, names)}")
    return [*targets, *_linear_layers(model)] if linear else list(targets)


def _linear_layers(model: nn.Module) -> list[str]:
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return [n for n, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D) and module is not head]


def _modules_to_save(model: nn.Module, cfg: AdapterConfig) -> list[str] | None:
    names = [name for name, _ in model.named_modules() if name]
    for target in cfg.lora_modules_to_save or []:
        if not any(name.endswith(target) for name in names):
            raise ModelError(f"lora_modules_to_save: {target!r} matches no module{_advice(target, names)}")
    return list(cfg.lora_modules_to_save) if cfg.lora_modules_to_save else None


def _saves_tied_embedding(model: PreTrainedModel, cfg: AdapterConfig) -> bool:
    """peft trains a copy of a module to save; without this flag a tied head would go on using the old weights."""
    output, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if output is None or output.weight is not embedding.weight:
        return False
    saved = cfg.lora_modules_to_save or []
    tied = [name for name, module in model.named_modules() if module is output or module is embedding]
    return any(name.endswith(entry) for entry in saved for name in tied)


def _continue_adapter(model: PreTrainedModel, cfg: AdapterConfig) -> PeftModel:
    """Load the trained adapter of `lora_model_dir`; only its dropout may be set anew."""
    assert cfg.lora_model_dir is not None
    location = resolve_location("lora_model_dir", cfg.lora_model_dir)
    if is_local(location) and not Path(location, "adapter_config.json").is_file():
        raise ModelError(f"lora_model_dir: {location} has no adapter_config.json, so it holds no trained adapter")
    config = PeftConfig.from_pretrained(location)
    if not isinstance(config, LoraConfig):
        raise ModelError(f"lora_model_dir: {location} is a {config.peft_type} adapter, not LoRA")
    trained: dict[str, Any] = {
        "lora_r": config.r,
        "lora_alpha": config.lora_alpha,
        "peft_use_dora": config.use_dora,
        "peft_use_rslora": config.use_rslora,
    }
    for key, value in cfg.changed_keys().items():
        if key in trained and getattr(cfg, key) != trained[key]:
            raise ConfigError(
                f"{key}: {value}, but the adapter in {location} was trained with {trained[key]}; remove the key"
            )
        if key in ("lora_target_modules", "lora_target_linear", "lora_modules_to_save"):
            raise ConfigError(f"{key}: the adapter in {location} brings its own modules; remove the key")
    if "lora_dropout" in cfg.model_fields_set:
        config.lora_dropout = cfg.lora_dropout
    config.inference_mode = False
    try:
        return PeftModel.from_pretrained(model, location, is_trainable=True, config=config, autocast_adapter_dtype=True)
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).splitlines()[:3])
        raise ModelError(
            f"lora_model_dir: the adapter in {location} does not fit {model.name_or_path}: {reason}"
        ) from error


def apply_freezing(model: PreTrainedModel, cfg: FreezingConfig) -> None:
    """Freeze what `cfg` does not name: `requires_grad` is set on every parameter. Does nothing when no key is set.

    `unfrozen_parameters` and `train_top_layers` together train the union. Raises ModelError when a pattern matches no
    parameter or there are fewer layers, ConfigError for a model that already has an adapter.
    """
    if not cfg.unfrozen_parameters and cfg.train_top_layers is None:
        return
    if isinstance(model, PeftModel):
        raise ConfigError("unfrozen_parameters, train_top_layers: not with an adapter; use lora_modules_to_save")
    trained = trained_base_parameters(model, cfg)
    chosen = {id(parameter) for name, parameter in _all_parameters(model) if name in trained}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in chosen)


def trained_base_parameters(model: PreTrainedModel, cfg: FreezingConfig) -> set[str]:
    """Names of the parameters that `cfg` trains, both names of a tied one; all of them when no key is set."""
    parameters = _all_parameters(model)
    if not cfg.unfrozen_parameters and cfg.train_top_layers is None:
        return {name for name, _ in parameters}
    names: set[str] = set()
    for pattern in cfg.unfrozen_parameters or []:
        if re.search(r"\[\d*:\d*\]$", pattern):
            raise ConfigError(f"unfrozen_parameters: {pattern!r} ends in a range of rows; eft trains whole tensors")
        found = {name for name, _ in parameters if _search("unfrozen_parameters", pattern, name)}
        if not found:
            hint = _advice(pattern, [name for name, _ in parameters])
            raise ModelError(f"unfrozen_parameters: {pattern!r} matches no parameter{hint}")
        names |= found
    if cfg.train_top_layers is not None:
        prefixes = _top_layers(model, cfg.train_top_layers)
        names |= {name for name, _ in parameters if any(name.startswith(f"{prefix}.") for prefix in prefixes)}
    chosen = {id(parameter) for name, parameter in parameters if name in names}
    return {name for name, parameter in parameters if id(parameter) in chosen}


def _all_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(model.named_parameters(remove_duplicate=False))


def _top_layers(model: nn.Module, count: int) -> list[str]:
    """Names of the last `count` decoder layers and of the final norm."""
    name, layers = decoder_layers(model)
    if count > len(layers):
        raise ModelError(f"train_top_layers: {count}, but the model has {len(layers)} layers ({name})")
    return [*(f"{name}.{index}" for index in range(len(layers) - count, len(layers))), *final_norms(model)]


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder layers: the longest ModuleList that is in no other (experts lie inside layers)."""
    outer: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{other}.") for other in outer):
            outer[name] = module
    if not outer:
        raise ModelError(f"train_top_layers: no list of decoder layers in a {type(model).__name__}")
    return max(outer.items(), key=lambda item: len(item[1]))


def final_norms(model: nn.Module) -> list[str]:
    """Names of the norms applied after the last decoder layer.

    They sit beside the layer list and hold vectors only. Those registered after the list are meant; a family that
    registers its norm before it calls it `final_…` (OPT), which tells it from a norm on the embeddings (Bloom).
    """
    list_name, _ = decoder_layers(model)
    parent_name = list_name.rpartition(".")[0]
    children = list(model.get_submodule(parent_name).named_children())
    position = [name for name, _ in children].index(list_name.rpartition(".")[2])

    def is_norm(module: nn.Module) -> bool:
        parameters = list(module.parameters())
        return bool(parameters) and all(parameter.ndim == 1 for parameter in parameters)

    after = [name for name, module in children[position + 1 :] if is_norm(module)]
    chosen = after or [name for name, module in children[:position] if is_norm(module) and "final" in name]
    return [f"{parent_name}.{name}" if parent_name else name for name in chosen]


def set_dtypes(model: PreTrainedModel | PeftModel, *, pure_bf16: bool = False, fp32_gradients: bool = False) -> None:
    """D10: trainable parameters to fp32, frozen ones as they were loaded; in place, tied weights stay tied.

    With `pure_bf16` all parameters to bf16 instead, and the model's config says so, by which it is saved; those stay
    fp32 that a half-precision checkpoint was loaded with, because the family computes them so. `fp32_gradients`: their
    gradients are fp32 all the same, for sums over micro-batches.

    Call it after the adapter and the freezing.
    """
    if pure_bf16:
        _set_bf16(base_model_of(model), fp32_gradients)
        return
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()


def _set_bf16(model: PreTrainedModel, fp32_gradients: bool) -> None:
    config = model.config
    stays = torch.float32 if config.dtype in (torch.bfloat16, torch.float16) else None
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.dtype != stays:
            parameter.data = parameter.data.bfloat16()
        if parameter.requires_grad and fp32_gradients:
            parameter.grad_dtype = torch.float32
    config.dtype = torch.bfloat16


def enable_gradient_flow(model: PreTrainedModel | PeftModel, *, use_reentrant: bool) -> bool:
    """Make reentrant activation checkpointing work over frozen embeddings; returns whether anything had to be done.

    The reentrant form only runs a backward through a layer whose input asks for a gradient. The non-reentrant form,
    eft's default, needs nothing; asking there would only drag the backward pass through frozen bottom layers.
    """
    embedding = model.get_input_embeddings()
    if not use_reentrant or any(parameter.requires_grad for parameter in embedding.parameters()):
        return False
    model.enable_input_require_grads()
    return True


def _search(key: str, pattern: str, name: str) -> bool:
    try:
        return re.match(pattern, name) is not None
    except re.error as error:
        raise ConfigError(f"{key}: {pattern!r} is no regular expression: {error}") from error


def _fullmatch(key: str, pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise ConfigError(f"{key}: {pattern!r} is no regular expression: {error}") from error


def _advice(word: str, names: Iterable[str]) -> str:
    """`; did you mean …?` from the last parts of the names, or from the names themselves."""
    names = list(names)
    endings = list(dict.fromkeys(part for name in names for part in name.split(".") if not part.isdigit()))
    plain = re.sub(r"[\^$\\*?()\[\]|+]", "", word).strip(".")
    unknown = [part for part in plain.split(".") if part and not part.isdigit() and part not in endings]
    close = next((found for part in unknown if (found := nearest(part, endings))), None)
    return f"; did you mean {close!r}?" if close else f"; there are: {', '.join(endings[:12])}"
