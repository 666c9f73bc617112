"""Which weights are trained: an adapter beside the model, a part of the model, or all of it; and in which dtype."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, PromptLearningConfig, TaskType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from eft.config.model import AdapterConfig, FreezingConfig
from eft.core.errors import ConfigError, ModelError, nearest
from eft.models.adapter_targets import (
    advice,
    decoder_layers,
    layer_numbers,
    matching,
    modules_to_save,
    name_pattern,
    saves_tied_embedding,
    search,
    target_modules,
    target_parameters,
    token_rows,
)
from eft.models.location import is_local, resolve_location
from eft.models.plain import base_model_of, unwrapped_names
from eft.models.quantised import keep_as_stored
from eft.models.seeding import seeded_rng
from eft.models.weight_start import start_from_weights, starts_from_weights

logger = logging.getLogger(__name__)

_OWN_KEYS = {
    "r": "lora_r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "target_modules": "lora_target_modules",
    "target_parameters": "lora_target_parameters",
    "exclude_modules": "lora_exclude_modules",
    "rank_pattern": "lora_rank_pattern",
    "alpha_pattern": "lora_alpha_pattern",
    "modules_to_save": "lora_modules_to_save",
    "use_dora": "peft_use_dora",
    "use_rslora": "peft_use_rslora",
    "init_lora_weights": "peft_init_lora_weights",
    "layers_to_transform": "peft_layers_to_transform",
    "layers_pattern": "peft_layers_pattern",
    "trainable_token_indices": "peft_trainable_token_indices",
}
"""Options of peft's LoraConfig that have a key of their own."""


def apply_adapter(
    model: PreTrainedModel, cfg: AdapterConfig, seed: int, new_token_ids: Sequence[int] = ()
) -> PreTrainedModel | PeftModel:
    """Wrap `model` in the adapter of `cfg`, or return it as it is when `adapter` is empty.

    Adapter weights are fp32 and depend on `seed` alone; the global RNG is left as it was. With `lora_model_dir` the
    trained adapter there is continued. A tied head stays tied when its embedding is in `lora_modules_to_save`.
    `new_token_ids`: rows that `peft_trainable_token_indices: new` stands for.

    Raises ConfigError when no target is set, a key contradicts `lora_model_dir` or peft knows no such option,
    ModelError when a name matches nothing or peft cannot adapt what it matches.
    """
    if cfg.adapter is None:
        return model
    if cfg.lora_model_dir is not None:
        return _continue_adapter(model, cfg)
    config = _lora_config(model, cfg, new_token_ids) if cfg.adapter != "peft" else _other_config(model, cfg)
    with seeded_rng(seed, model):
        try:
            adapted = get_peft_model(model, config, autocast_adapter_dtype=True)
        except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:  # peft, of what it cannot adapt
            what = str(error).partition("(")[0].strip()  # in brackets peft prints the whole module
            if "is not supported" in str(error):
                what = f"lora_target_modules: {what} cannot take a LoRA adapter; name linear layers"
            if "ParamWrapper" in what:
                what += (
                    "; fused experts are adapted through it: leave that out, or the experts (list lora_target_modules)"
                )
            raise ModelError(f"adapter: {what}") from error
        if starts_from_weights(cfg.peft_init_lora_weights):
            start_from_weights(adapted, str(cfg.peft_init_lora_weights))
    if cfg.lora_target_linear:
        _mention_frozen_experts(adapted)
    return adapted


def _mention_frozen_experts(model: PeftModel) -> None:
    """`lora_target_linear` reads as if it were everything; peft knows the fused experts of some families only."""
    base = base_model_of(model)
    adapted = {
        f"{name.replace('.base_layer', '')}.{module.parameter_name}"
        for name, module in base.named_modules()
        if isinstance(module, ParamWrapper)
    }
    plain = unwrapped_names(base, [name for name, parameter in base.named_parameters() if parameter.ndim == 3])
    frozen = [name for name in plain.values() if ".experts." in name and name not in adapted]
    if frozen:
        ends = sorted({".".join(name.split(".")[-3:]) for name in frozen})
        logger.warning(
            "lora_target_linear: the fused experts (%d tensors) are no linear layers and stay frozen; to adapt them "
            "set lora_target_parameters: [%s]",
            len(frozen),
            ", ".join(ends),
        )


def _lora_config(model: PreTrainedModel, cfg: AdapterConfig, new_token_ids: Sequence[int]) -> LoraConfig:
    options: dict[str, Any] = {
        "lora_dropout": cfg.lora_dropout,
        "target_modules": target_modules(model, cfg),
        "target_parameters": target_parameters(model, cfg),
        "exclude_modules": matching(model, "lora_exclude_modules", cfg.lora_exclude_modules),
        "modules_to_save": modules_to_save(model, cfg),
        "use_dora": cfg.peft_use_dora,
        "use_rslora": cfg.peft_use_rslora,
        **_ranks_and_start(model, cfg),
        "layers_to_transform": layer_numbers(model, cfg),
        "layers_pattern": cfg.peft_layers_pattern,
        "trainable_token_indices": token_rows(model, cfg, new_token_ids),
        "bias": "none",
        "ensure_weight_tying": saves_tied_embedding(model, cfg),
    }
    return LoraConfig(task_type=TaskType.CAUSAL_LM, **(options | _further_options(cfg, LoraConfig, _OWN_KEYS)))


def _ranks_and_start(model: PreTrainedModel, cfg: AdapterConfig) -> dict[str, Any]:
    """Ranks, alphas and how the factors start; a start from the weights takes twice the rank at the same scale."""
    start = True if cfg.peft_init_lora_weights is None else cfg.peft_init_lora_weights
    ranks = name_pattern(model, "lora_rank_pattern", cfg.lora_rank_pattern)
    alphas = name_pattern(model, "lora_alpha_pattern", cfg.lora_alpha_pattern)
    wider: int = 1
    stronger: float = 1
    if starts_from_weights(start):
        start, wider, stronger = True, 2, (2**0.5 if cfg.peft_use_rslora else 2)
    return {
        "r": cfg.lora_r * wider,
        "lora_alpha": cfg.lora_alpha * stronger,
        "rank_pattern": {name: rank * wider for name, rank in ranks.items()},
        "alpha_pattern": {name: alpha * stronger for name, alpha in alphas.items()},
        "init_lora_weights": start,
    }


def _other_config(model: PreTrainedModel, cfg: AdapterConfig) -> PeftConfig:
    """The config of any other method of peft, as `peft` describes it."""
    values = dict(cfg.peft or {})
    wanted = str(values.pop("peft_type", "")).upper()
    methods = {kind.value: config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if wanted not in methods:
        close = nearest(wanted, methods)
        hint = f"did you mean {close}?" if close else f"there are: {', '.join(methods)}"
        raise ConfigError(f"peft: {wanted!r} is no peft_type; {hint}")
    kind = methods[wanted]
    if kind is LoraConfig:
        raise ConfigError("peft: write LoRA as `adapter: lora`, with the keys `lora_…` and `peft_…`")
    if issubclass(kind, PromptLearningConfig) or not any(entry.name == "target_modules" for entry in fields(kind)):
        raise ConfigError(
            f"peft: {wanted} puts tokens of its own before each row, and packed rows hold many documents; choose a "
            "method that adapts layers"
        )
    options = _further_options(cfg, kind, {}) | values
    options.pop("peft_type", None)
    if cfg.lora_target_modules or cfg.lora_target_linear:
        options.setdefault("target_modules", target_modules(model, cfg))
    if cfg.lora_modules_to_save:
        options.setdefault("modules_to_save", modules_to_save(model, cfg))
    try:
        config: PeftConfig = kind(task_type=TaskType.CAUSAL_LM, **options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"peft: {error}") from error
    return config


def _further_options(cfg: AdapterConfig, kind: type[PeftConfig], own_keys: dict[str, str]) -> dict[str, Any]:
    """What `peft` adds, after checking that the method knows it and that it has no key of its own."""
    known = [entry.name for entry in fields(kind)]
    for name in cfg.peft or {}:
        if name in own_keys:
            raise ConfigError(f"peft: `{name}` has a key of its own; write `{own_keys[name]}`")
        if name not in known:
            close = nearest(name, known)
            hint = f"did you mean {close!r}?" if close else f"there are: {', '.join(known)}"
            raise ConfigError(f"peft: {kind.__name__} has no option {name!r}; {hint}")
    return dict(cfg.peft or {})


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
        found = {name for name, _ in parameters if search("unfrozen_parameters", pattern, name)}
        if not found:
            hint = advice(pattern, [name for name, _ in parameters])
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


def set_dtypes(
    model: PreTrainedModel | PeftModel,
    *,
    pure_bf16: bool = False,
    fp32_gradients: bool = False,
    autocast: bool = True,
) -> None:
    """D10: trainable parameters to fp32, frozen ones as they were loaded; in place, tied weights stay tied.

    With `pure_bf16` all parameters to bf16 instead, and the model's config says so, by which it is saved; those stay
    fp32 that a half-precision checkpoint was loaded with, because the family computes them so. `fp32_gradients`: their
    gradients are fp32 all the same, for sums over micro-batches.

    Call it after the adapter and the freezing.

    Raises ConfigError where the run has no `autocast` and trains some whole modules of a half-precision base: nothing
    would bring the two dtypes together.
    """
    keep_as_stored(model)
    if not autocast and not pure_bf16:
        _check_one_dtype(model)
    if pure_bf16:
        _set_bf16(base_model_of(model), fp32_gradients)
        return
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            _convert(parameter, torch.float32)


def _convert(parameter: nn.Parameter, dtype: torch.dtype) -> None:
    if isinstance(parameter, DTensor):
        # Assigned data would change what it says of itself, and not the part that lies here.
        converted = nn.Parameter(parameter.detach().to(dtype), parameter.requires_grad)
        torch.utils.swap_tensors(parameter, converted)
    else:
        parameter.data = parameter.data.to(dtype)


def _check_one_dtype(model: PreTrainedModel | PeftModel) -> None:
    """LoRA layers cast their input themselves; modules that are trained whole do not."""
    half = {p.dtype for p in model.parameters() if not p.requires_grad} & {torch.bfloat16, torch.float16}
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if isinstance(model, PeftModel):
        trained = [name for name in trained if ".modules_to_save." in name]
    if half and trained:
        name = trained[0].removeprefix("base_model.model.").replace(".modules_to_save.default", "")
        dtype = str(half.pop()).removeprefix("torch.")
        raise ConfigError(
            f"bf16: false: the frozen weights of the base are {dtype} and {name} is trained in float32, which nothing "
            "casts without autocast; set `bf16: true`, or train LoRA layers or the whole model only"
        )


def _set_bf16(model: PreTrainedModel, fp32_gradients: bool) -> None:
    config = model.config
    stays = torch.float32 if config.dtype in (torch.bfloat16, torch.float16) else None
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.dtype != stays:
            _convert(parameter, torch.bfloat16)
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
