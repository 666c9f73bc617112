"""Rules that span keys of parallelism; see `rules`. What depends on the number of processes is in `parallel.plan`."""

from __future__ import annotations

from eft.config.root import Rule, TrainConfig
from eft.core.errors import nearest

FSDP_OPTIONS = (
    "transformer_layer_cls_to_wrap",
    "auto_wrap_policy",
    "min_num_params",
    "reshard_after_forward",
    "offload_params",
)
"""What `fsdp_config` may hold."""

_ELSEWHERE = {
    "activation_checkpointing": "use the key `gradient_checkpointing`",
    "state_dict_type": "remove it: a checkpoint has one format, whatever wrote it",
    "final_state_dict_type": "remove it: the export is always whole",
    "cpu_ram_efficient_loading": "remove it",
    "use_orig_params": "remove it: FSDP2 always does",
    "sync_module_states": "remove it: FSDP2 does not need it",
    "cpu_offload": "use `offload_params`",
    "version": "use the key `fsdp_version`",
}


def fsdp_options_are_known(config: TrainConfig) -> tuple[str, str] | None:
    for name in config.fsdp_config or {}:
        if name in FSDP_OPTIONS:
            continue
        bare = name.removeprefix("fsdp_")
        close = bare if bare in FSDP_OPTIONS else nearest(bare, FSDP_OPTIONS)
        advice = _ELSEWHERE.get(bare) or (f"did you mean `{close}`?" if close else "remove it")
        text = f"`fsdp_config: {name}`: expected one of {', '.join(FSDP_OPTIONS)}; {advice}"
        return "fsdp_config", text
    return None


def one_way_to_split_a_row(config: TrainConfig) -> tuple[str, str] | None:
    if config.context_parallel_size > 1 and config.tensor_parallel_size > 1:
        return (
            "context_parallel_size",
            "`context_parallel_size` and `tensor_parallel_size` both split the attention heads; keep one of them",
        )
    return None


def tensor_parallelism_trains_whole_models(config: TrainConfig) -> tuple[str, str] | None:
    if config.tensor_parallel_size == 1:
        return None
    obstacles = {
        "`adapter` wraps layers that are already split; use `fsdp_version: 2`": config.adapter is not None,
        "`load_best_model_at_end` is not offered with it": config.load_best_model_at_end,
    }
    found = [text for text, applies in obstacles.items() if applies]
    return ("tensor_parallel_size", f"`tensor_parallel_size`: {'; '.join(found)}") if found else None


def context_parallelism_is_packed(config: TrainConfig) -> tuple[str, str] | None:
    if config.context_parallel_size == 1:
        return None
    obstacles = {
        "set `attn_implementation: eft` (the default), which keeps documents apart": config.attn_implementation
        != "eft",
        "needs `sample_packing: true`: only a row without padding is split": not config.sample_packing,
        "is not offered with `torch_compile`": config.torch_compile,
    }
    found = [text for text, applies in obstacles.items() if applies]
    return ("context_parallel_size", f"`context_parallel_size`: {'; '.join(found)}") if found else None


PARALLEL_RULES: tuple[Rule, ...] = (
    fsdp_options_are_known,
    one_way_to_split_a_row,
    tensor_parallelism_trains_whole_models,
    context_parallelism_is_packed,
)
