"""What the key `deepspeed` says: bundled settings, a JSON file or the options inline; and which of them eft takes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eft.config.root import Rule, TrainConfig
from eft.core.errors import ConfigError, nearest

BUNDLED: dict[str, dict[str, Any]] = {f"zero{stage}": {"zero_optimization": {"stage": stage}} for stage in (1, 2, 3)}
"""DeepSpeed's own defaults: stage 1 shares the optimizer's state, 2 the gradients too, 3 the weights too."""

OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd", "rmsprop")
"""Each number is updated by itself, and all state has the shape of its parameter or is a count: right on flat parts."""

OWNED = {
    "train_micro_batch_size_per_gpu": "micro_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "train_batch_size": "global_batch_size",
    "gradient_clipping": "max_grad_norm",
    "bf16": "bf16",
    "fp16": "fp16",
    "optimizer": "optimizer",
    "scheduler": "lr_scheduler",
}
"""DeepSpeed's options that the YAML decides, and by which key: `auto`, equal to it, or an error."""

_OWN = ("zero_optimization", "steps_per_print", "wall_clock_breakdown", "zero_allow_untested_optimizer")
_ZERO = (
    "stage",
    "allgather_bucket_size",
    "allgather_partitions",
    "contiguous_gradients",
    "ignore_unused_parameters",
    "overlap_comm",
    "reduce_bucket_size",
    "reduce_scatter",
    "stage3_gather_16bit_weights_on_model_save",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_param_persistence_threshold",
    "stage3_prefetch_bucket_size",
    "sub_group_size",
)
_OFFLOAD = ("offload_optimizer", "offload_param")
_FP32 = "remove it: gradients are added up and averaged in fp32"
_ELSEWHERE = {
    "activation_checkpointing": "use the key `gradient_checkpointing`",
    "amp": "use `bf16: true`",
    "torch_autocast": "remove it: `bf16: true` sets it",
    "data_types": _FP32,
    "communication_data_type": _FP32,
    "prescale_gradients": _FP32,
    "gradient_predivide_factor": _FP32,
    "pipeline": "pipelines are not offered; ZeRO shards the weights",
    "tensor_parallel": "use `tensor_parallel_size`, without `deepspeed`",
    "sequence_parallel_size": "use `context_parallel_size`, without `deepspeed`",
    "checkpoint": "remove it: a checkpoint has one format, whatever wrote it",
    "aio": "nothing is kept on NVMe: remove it",
}
_OFFLOADED = "keeping state on the host or on NVMe is not offered; use ZeRO-3, or FSDP2 with `offload_params`"


def deepspeed_options(value: str | Mapping[str, Any]) -> dict[str, Any]:
    """The options that `deepspeed` names or holds, as DeepSpeed's own JSON has them.

    Raises:
        ConfigError: neither bundled nor a file, or no JSON object.
    """
    if isinstance(value, Mapping):
        return dict(value)
    if value in BUNDLED:
        return dict(BUNDLED[value])
    path = Path(value).expanduser()
    if not path.is_file():
        close = nearest(value, BUNDLED)
        advice = f"; did you mean `{close}`?" if close else ""
        raise ConfigError(f"`deepspeed: {value}`: neither a file nor one of {', '.join(BUNDLED)}{advice}")
    try:
        options = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"`deepspeed: {value}`: {error}") from error
    if not isinstance(options, dict):
        raise ConfigError(f"`deepspeed: {value}`: expected a JSON object, got a {type(options).__name__}")
    return options


def zero_stage(options: Mapping[str, Any]) -> int:
    """1, 2 or 3; the options have been checked."""
    return int(options["zero_optimization"]["stage"])


def deepspeed_is_known(config: TrainConfig) -> tuple[str, str] | None:
    if config.deepspeed is None:
        return None
    try:
        options = deepspeed_options(config.deepspeed)
    except ConfigError as error:
        return "deepspeed", str(error)
    faults = [*_unknown(options), *_zero_faults(options.get("zero_optimization"))]
    return ("deepspeed", f"`deepspeed`: {'; '.join(faults)}") if faults else None


def _unknown(options: Mapping[str, Any]) -> list[str]:
    known = (*OWNED, *_OWN)
    return [_not_taken(name, known) for name in options if name not in known]


def _zero_faults(zero: Any) -> list[str]:
    if not isinstance(zero, Mapping) or zero.get("stage") not in (1, 2, 3):
        stage = zero.get("stage") if isinstance(zero, Mapping) else None
        return [f"`zero_optimization.stage` must be 1, 2 or 3, got {stage!r}; without ZeRO remove `deepspeed` (DDP)"]
    faults = [
        f"`zero_optimization.{name}.device: {zero[name].get('device')}`: {_OFFLOADED}"
        for name in _OFFLOAD
        if isinstance(zero.get(name), Mapping) and zero[name].get("device", "none") != "none"
    ]
    known = (*_ZERO, *_OFFLOAD)
    return faults + [_not_taken(name, known, "zero_optimization.") for name in zero if name not in known]


def _not_taken(name: str, known: tuple[str, ...], place: str = "") -> str:
    close = nearest(name, known)
    advice = _ELSEWHERE.get(name) or (f"did you mean `{close}`?" if close else "remove it")
    return f"`{place}{name}` is not offered: {advice}"


def deepspeed_stands_alone(config: TrainConfig) -> tuple[str, str] | None:
    if config.deepspeed is None:
        return None
    obstacles = {
        "both it and FSDP shard: remove `fsdp_version`, `fsdp_config`, `dp_shard_size` and `dp_replicate_size`": (
            any([config.fsdp_version, config.fsdp_config, config.dp_shard_size, config.dp_replicate_size])
        ),
        "remove `tensor_parallel_size`": config.tensor_parallel_size > 1,
        "remove `context_parallel_size`": config.context_parallel_size > 1,
        "its loss scaler decides about updates: use `bf16: true` instead of `fp16`": config.fp16,
        "it keeps fp32 weights: use `bf16: true` instead of `bfloat16`": config.bfloat16,
        "remove `optimizer_in_backward`: DeepSpeed updates after the whole backward pass": config.optimizer_in_backward,
        "remove `weight_average`: an average is kept tensor by tensor": config.weight_average is not None,
        "remove `torch_compile`": config.torch_compile,
        "weights in 4 or 8 bits are not offered with it: remove `load_in_4bit` and `load_in_8bit`, or use DDP": (
            config.load_in_4bit or config.load_in_8bit
        ),
        "it has no step that could be tried beforehand: remove `preflight`": config.preflight is True,
        "`load_best_model_at_end` with `save_only_model` is refused by Trainer": config.load_best_model_at_end
        and config.save_only_model,
        f"`optimizer: {config.optimizer}` needs whole tensors or whole parameters; use one of "
        f"{', '.join(OPTIMIZERS)}": config.optimizer not in OPTIMIZERS,
        "it updates in one go with the backward pass, before a step is judged: use `nonfinite_action: stop`": (
            config.nonfinite_action in ("skip", "rollback")
        ),
        "it updates in one go with the backward pass, before a step is judged: use `loss_watchdog_action: stop`": (
            config.loss_watchdog_threshold is not None and config.loss_watchdog_action in ("skip", "rollback")
        ),
    }
    found = [text for text, applies in obstacles.items() if applies]
    return ("deepspeed", f"`deepspeed`: {'; '.join(found)}") if found else None


def zero3_knows_lora_only(config: TrainConfig) -> tuple[str, str] | None:
    if config.deepspeed is None or deepspeed_is_known(config) is not None:
        return None
    if zero_stage(deepspeed_options(config.deepspeed)) < 3 or config.adapter != "peft":
        return None
    return "deepspeed", "`deepspeed`: stage 3 is not offered with `adapter: peft`; use `adapter: lora`, or stage 2"


DEEPSPEED_RULES: tuple[Rule, ...] = (deepspeed_is_known, deepspeed_stands_alone, zero3_knows_lora_only)
