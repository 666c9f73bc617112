"""Rules that span keys of parallelism; see `rules`. What depends on the number of processes is in `parallel.plan`."""

from __future__ import annotations

from eft.config.deepspeed import DEEPSPEED_RULES
from eft.config.parallel import asks_for_parts
from eft.config.root import Rule, TrainConfig
from eft.core.errors import nearest

FSDP_OPTIONS = (
    "transformer_layer_cls_to_wrap",
    "auto_wrap_policy",
    "min_num_params",
    "reshard_after_forward",
    "offload_params",
    "cpu_ram_efficient_loading",
)
"""What `fsdp_config` may hold."""

_ELSEWHERE = {
    "activation_checkpointing": "use the key `gradient_checkpointing`",
    "state_dict_type": "remove it: a checkpoint has one format, whatever wrote it",
    "final_state_dict_type": "remove it: the export is always whole",
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


def what_is_loaded_in_parts_is_plain(config: TrainConfig) -> tuple[str, str] | None:
    """Where transformers splits the model while it is loaded, nothing may come between."""
    options = config.fsdp_config or {}
    by_tensor = config.tensor_parallel_size > 1
    if not asks_for_parts(config):
        return None
    key = "tensor_parallel_size" if by_tensor else "fsdp_config"
    # What transformers shards together its own plan of the family says.
    wrapping = [name for name in FSDP_OPTIONS[:3] if options.get(name) is not None]
    obstacles = {
        "`adapter` may only be `lora`": config.adapter not in (None, "lora"),
        "`lora_modules_to_save` copies layers that are already split": bool(config.lora_modules_to_save),
        "`peft_trainable_token_indices` needs the whole embedding": config.peft_trainable_token_indices is not None,
        "`peft_use_dora` needs whole matrices": bool(config.peft_use_dora),
        "`lora_target_parameters` needs whole tensors": bool(config.lora_target_parameters),
        "`lora_model_dir` holds whole tensors": config.lora_model_dir is not None,
        "`peft_init_lora_weights` needs whole matrices": config.peft_init_lora_weights not in (None, True, "gaussian"),
        "`resize_token_embeddings_to_32x` needs the whole embedding": config.resize_token_embeddings_to_32x,
        "`load_in_4bit` and `load_in_8bit` need whole matrices": config.load_in_4bit or config.load_in_8bit,
        "`gguf_file` is read as a whole": config.gguf_file is not None,
        "`load_best_model_at_end` is not offered with it": config.load_best_model_at_end,
        f"`fsdp_config: {', '.join(wrapping)}` is the family's own there": bool(wrapping),
    }
    found = [text for text, applies in obstacles.items() if applies]
    what = "`tensor_parallel_size`" if by_tensor else "`fsdp_config: cpu_ram_efficient_loading`"
    return (key, f"{what}: {'; '.join(found)}") if found else None


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
    what_is_loaded_in_parts_is_plain,
    context_parallelism_is_packed,
    *DEEPSPEED_RULES,
)
