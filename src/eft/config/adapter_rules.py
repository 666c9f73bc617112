"""Rules about adapters and the quantised base beneath them."""

from __future__ import annotations

import re

from eft.config.root import Rule, TrainConfig
from eft.core.errors import nearest

BNB_OPTIONS = (
    "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant",
    "bnb_4bit_compute_dtype",
    "bnb_4bit_quant_storage",
    "llm_int8_threshold",
    "llm_int8_skip_modules",
)
"""What `bnb_config_kwargs` may set."""

_NEEDS_DATA = "it needs activations or gradients of your data before the training"
REFUSED_STARTS = {
    "eva": _NEEDS_DATA,
    "corda": _NEEDS_DATA,
    "lora_ga": _NEEDS_DATA,
    "loftq": "peft computes it on CUDA only, and not for the scale alpha / r",
    "mica": "it freezes half of each pair of factors",
}
"""Values of `peft_init_lora_weights` that peft knows and eft does not offer, with the reason."""

_STARTS = ("gaussian", "orthogonal", "pissa", "olora")
_FAST_PISSA = re.compile(r"pissa_niter_\d+")

LORA_ONLY = (
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "lora_target_parameters",
    "lora_rank_pattern",
    "lora_alpha_pattern",
    "peft_use_dora",
    "peft_use_rslora",
    "peft_init_lora_weights",
)
"""Keys that only LoRA has a use for."""


def one_width_of_the_base(config: TrainConfig) -> tuple[str, str] | None:
    if config.load_in_4bit and config.load_in_8bit:
        return "load_in_8bit", "`load_in_8bit` and `load_in_4bit` are both on; keep one of them"
    return None


def quantised_base_needs_adapter(config: TrainConfig) -> tuple[str, str] | None:
    for name, is_on in (("load_in_4bit", config.load_in_4bit), ("load_in_8bit", config.load_in_8bit)):
        if is_on and config.adapter is None:
            return name, f"`{name}`: quantised weights cannot be trained; set `adapter: lora`, or remove it"
    return None


def qlora_needs_four_bits(config: TrainConfig) -> tuple[str, str] | None:
    if config.adapter != "qlora" or config.load_in_4bit:
        return None
    if config.load_in_8bit:
        return "adapter", "`adapter: qlora` is over 4 bits; write `adapter: lora` beside `load_in_8bit`"
    return "adapter", "`adapter: qlora` needs `load_in_4bit: true`; over a base that is not quantised write `lora`"


def bnb_options_are_known(config: TrainConfig) -> tuple[str, str] | None:
    for name, value in (config.bnb_config_kwargs or {}).items():
        if name not in BNB_OPTIONS:
            close = nearest(name, BNB_OPTIONS)
            hint = f"did you mean `{close}`?" if close else f"there are: {', '.join(BNB_OPTIONS)}"
            return "bnb_config_kwargs", f"`bnb_config_kwargs`: unknown option `{name}`; {hint}"
        width = "load_in_4bit" if name.startswith("bnb_4bit") else "load_in_8bit"
        both = name == "llm_int8_skip_modules"
        if not both and not (config.load_in_4bit if width == "load_in_4bit" else config.load_in_8bit):
            return "bnb_config_kwargs", f"`bnb_config_kwargs`: `{name}: {value}` has no effect without `{width}: true`"
    if config.bnb_config_kwargs and not (config.load_in_4bit or config.load_in_8bit):
        return (
            "bnb_config_kwargs",
            "`bnb_config_kwargs`: not used without `load_in_4bit` or `load_in_8bit`",
        )
    return None


def start_of_factors_is_offered(config: TrainConfig) -> tuple[str, str] | None:
    start, name = config.peft_init_lora_weights, "peft_init_lora_weights"
    if not isinstance(start, str) or start in _STARTS or _FAST_PISSA.fullmatch(start):
        return None
    offered = f"there are: true, {', '.join(_STARTS)}, pissa_niter_4 (or another number)"
    if start in REFUSED_STARTS:
        return name, f"`{name}: {start}` is not offered: {REFUSED_STARTS[start]}; {offered}"
    close = nearest(start, _STARTS)
    return name, f"`{name}: {start}` is unknown; " + (f"did you mean `{close}`?" if close else offered)


def start_from_weights_has_weights(config: TrainConfig) -> tuple[str, str] | None:
    """PiSSA and OLoRA: see `models.weight_start`."""
    start, name = config.peft_init_lora_weights, "peft_init_lora_weights"
    if not isinstance(start, str) or not start.startswith(("pissa", "olora")):
        return None
    sharded = config.fsdp_version or config.fsdp_config or config.dp_shard_size or config.deepspeed
    obstacles = {
        "`peft_use_dora` scales the base's weights itself": config.peft_use_dora,
        "a base in 4 or 8 bits is not the weights that they would start from": config.load_in_4bit
        or config.load_in_8bit,
        "`lora_target_parameters` are no linear layers": config.lora_target_parameters is not None,
        "`lora_model_dir` brings trained factors": config.lora_model_dir is not None,
        "`weight_decay` would shrink the half of each factor that is fixed": config.weight_decay > 0,
        "FSDP and DeepSpeed might train the half of each factor that is fixed": sharded,
    }
    found = [text for text, applies in obstacles.items() if applies]
    return (name, f"`{name}: {start}`: {'; '.join(found)}; remove one of the two") if found else None


def other_methods_bring_their_own_config(config: TrainConfig) -> tuple[str, str] | None:
    if config.adapter != "peft":
        return None
    if config.lora_model_dir is None and "peft_type" not in (config.peft or {}):
        return "adapter", "`adapter: peft` needs the method: `peft: {peft_type: IA3, target_modules: […]}`"
    changed = config.changed_keys()
    for name in LORA_ONLY:
        if name in changed:
            return name, f"`{name}` is LoRA's; with `adapter: peft` write the options of the method under `peft`"
    return None


ADAPTER_RULES: tuple[Rule, ...] = (
    one_width_of_the_base,
    quantised_base_needs_adapter,
    qlora_needs_four_bits,
    bnb_options_are_known,
    start_of_factors_is_offered,
    start_from_weights_has_weights,
    other_methods_bring_their_own_config,
)
