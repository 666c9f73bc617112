"""Keys that Axolotl (0.18) knows and eft does not, with what to do about each; and renamed keys.

Null, false, empty, or Axolotl's own default is accepted anywhere: it asks for nothing.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Foreign(NamedTuple):
    """A key of Axolotl's that eft does not have."""

    advice: str
    default: Any = None
    """Axolotl's default, which is accepted as well as null."""


RENAMED = {
    "scheduler": "lr_scheduler",
    "batch_size": "global_batch_size",
    "noisy_embedding_alpha": "neftune_noise_alpha",
    "dataset_num_proc": "dataset_processes",
    "evaluation_strategy": "eval_strategy",
    "liger_swiglu": "liger_glu_activation",
    "pretrain_multipack_buffer_size": "streaming_multipack_buffer_size",
}
"""Spellings that mean exactly one of our keys. Axolotl's `batch_size` is micro-batch × accumulation × devices."""

ELSEWHERE = {
    "model": "base_model",
    "model_name": "base_model",
    "model_name_or_path": "base_model",
    "pretrained_model_name_or_path": "base_model",
    "tokenizer": "tokenizer_config",
    "lr": "learning_rate",
    "lr_scheduler_type": "lr_scheduler",
    "optim": "optimizer",
    "epochs": "num_epochs",
    "num_train_epochs": "num_epochs",
    "per_device_train_batch_size": "micro_batch_size",
    "per_device_eval_batch_size": "eval_batch_size",
    "train_batch_size": "global_batch_size",
    "grad_accum": "gradient_accumulation_steps",
    "max_length": "sequence_len",
    "max_seq_length": "sequence_len",
    "max_seq_len": "sequence_len",
    "cutoff_len": "sequence_len",
    "model_max_length": "sequence_len",
    "packing": "sample_packing",
    "dataset": "datasets",
    "train_datasets": "datasets",
    "eval_datasets": "test_datasets",
    "val_datasets": "test_datasets",
    "template": "chat_template",
    "lora_rank": "lora_r",
    "lora_target": "lora_target_modules",
    "target_modules": "lora_target_modules",
    "use_dora": "peft_use_dora",
    "use_rslora": "peft_use_rslora",
    "additional_target": "lora_modules_to_save",
    "clip_grad_norm": "max_grad_norm",
    "output": "output_dir",
    "resume": "resume_from_checkpoint",
    "random_seed": "seed",
    "attn_impl": "attn_implementation",
    "tensorboard": "use_tensorboard",
    "wandb": "use_wandb",
}
"""Names that other trainers use: what an unknown key most likely meant."""


def _keys(advice: str, names: str = "", **with_default: Any) -> dict[str, Foreign]:
    """The same advice for several keys; those with a default other than null are given as keywords."""
    return {name: Foreign(advice) for name in names.split()} | {
        name: Foreign(advice, default) for name, default in with_default.items()
    }


_ATTENTION = (
    "remove it: eft's attention keeps packed documents apart by itself; `attn_implementation` picks another kernel"
)
_LOSS = "remove it: eft's loss only ever holds the logits of trained tokens"
_KERNEL = "remove it: eft has no such kernel; speed and memory change, the numbers do not"
_QUANT = "this quantisation is not offered: remove it; `load_in_4bit: true` with `adapter: qlora` is"
_SHARD = "use `fsdp_version: 2`, `deepspeed`, `tensor_parallel_size` or `context_parallel_size`, or remove it for DDP"
_RL = "eft does supervised fine-tuning only: use another trainer for preference or reinforcement learning"
_LORA = "this LoRA option is not offered: remove it"
_OPTIMIZER = "it belongs to an optimizer that eft does not have; options of ours go under `optim_args`"
_GENERATE = "remove it: sample answers are decoded greedily, so that two runs can be compared"
_CACHE = "remove it: the prepared data are content-addressed and memory-mapped, so there is nothing to tune"
_STREAM = "list the data under `datasets` (`type: completion`, or any other format) and set `streaming: true`"
_MULTIMODAL = "remove it: `processor_type` is all that rows with images need, and masks come from the template"
_HUB = "remove it, and upload the finished folder with `hf upload`"
_WANDB = "remove it, and set Weights & Biases' environment variable of that name (`WANDB_MODE`, `WANDB_RUN_ID`, …)"
_TRACKER = "this tracker is not offered: `use_tensorboard`, `use_wandb`, `use_mlflow` and `use_trackio` are"
_AUTO = "remove it: transformers finds the right class by itself"
_PLACE = "remove it: eft puts the model on this process's device"
_DETERMINED = "remove it: eft works it out"
_METRIC = "generation-based metrics during training are not offered: use `eft evaluate` and `generate_samples`"
_PLUGIN = "plugins and their keys are not offered: remove it"

AXOLOTL_KEYS: dict[str, Foreign] = {
    # Attention, kernels, loss
    **_keys(
        _ATTENTION,
        "flash_attention sdp_attention xformers_attention flex_attention sage_attention eager_attention s2_attention "
        "flash_optimum sdpa_varlen gemma4_hybrid_attn_impl large_head_attention flash_attn_d512 fused_attn_kernel "
        "flex_attn_compile_kwargs pretrain_multipack_attn_impl",
    ),
    **_keys(
        _LOSS,
        "cut_cross_entropy chunked_cross_entropy chunked_cross_entropy_num_chunks flash_attn_cross_entropy "
        "liger_cross_entropy liger_fused_linear_cross_entropy liger_use_token_scaling",
    ),
    **_keys(
        _KERNEL,
        "liger_rms_norm_gated liger_layer_norm "
        "flash_attn_rms_norm flash_attn_fuse_mlp unsloth_cross_entropy_loss unsloth_rms_norm unsloth_rope "
        "use_kernels experts_implementation use_scattermoe use_sonicmoe tiled_mlp tiled_mlp_num_shards",
        tiled_mlp_use_original_mlp=True,
    ),
    **_keys(
        "remove it: eft has no fused adapter kernels; `torch_compile: true` fuses what surrounds their products",
        "lora_mlp_kernel lora_qkv_kernel lora_o_kernel lora_embedding_kernel unsloth_lora_mlp unsloth_lora_qkv "
        "unsloth_lora_o",
    ),
    **_keys("remove it: `torch_compile_backend` and `torch_compile_mode` are the options", "torch_compile_options"),
    **_keys(
        "not offered: it changes the model or the loss",
        "scaling_softmax scaling_softmax_factor scaling_softmax_bias use_pose pose_split_on_token_ids "
        "pose_max_context_len pose_num_chunks rope_scaling "
        "dense_mixer llama4_linearized_experts reinit_weights",
    ),
    # Precision and quantisation
    **_keys("use `fp16: true`, or better `bf16: true`", "float16"),
    **_keys("use `bf16: false`", "float32"),
    **_keys(
        "matrix products in fp8 are not offered: use `bf16: true`; `ao_adamw_fp8` keeps the optimizer's state in fp8",
        "fp8 fp8_enable_fsdp_float8_all_gather",
    ),
    **_keys(
        _QUANT,
        "gptq qat quantization model_quantization_config model_quantization_config_kwargs use_onebitllms llmcompressor",
        quantize_moe_experts=False,
    ),
    **_keys("remove it: eft never casts norms behind your back", "fp32_norms fp32_norm_classes embeddings_skip_upcast"),
    # Memory
    **_keys("streaming of frozen layers is not offered: use `activation_offloading: true`", "layer_offloading"),
    **_keys("remove it: eft frees what it no longer needs", "gc_steps gc_collect_steps"),
    # Distribution
    **_keys(
        _SHARD,
        "deepcompile fsdp fsdp_final_state_dict_type expert_parallel_token_capacity accelerator_config",
        expert_parallel_size=1,
    ),
    **_keys(
        "use `context_parallel_size`: attention heads are shared (Ulysses); ring attention is not offered",
        "sequence_parallel_degree heads_k_stride ring_attn_func",
    ),
    **_keys("remove it: DDP's own default is right for eft's batches", "ddp_broadcast_buffers"),
    **_keys(_PLACE, "device_map max_memory gpu_memory_limit low_cpu_mem_usage", experimental_skip_move_to_device=True),
    # Model and tokenizer
    **_keys(
        _AUTO,
        "model_type type_of_model base_model_config cls_model_config tokenizer_type tokenizer_use_fast "
        "tokenizer_legacy is_falcon_derived_model is_llama_derived_model is_mistral_derived_model "
        "is_qwen_derived_model",
    ),
    **_keys(
        "remove it, and change the model's own config.json instead",
        "overrides_of_model_config overrides_of_model_kwargs",
    ),
    **_keys("use `tokens`: new tokens get new rows", "added_tokens_overrides"),
    **_keys(
        "remove it: new rows are initialised from `seed` and trained, or refused",
        "mean_resizing_embeddings shrink_embeddings fix_untrained_tokens",
    ),
    **_keys("remove it: eft uses transformers' own tokenizers", "tokenizer_use_mistral_common"),
    **_keys("remove it: the template is saved with the tokenizer", tokenizer_save_jinja_files=True),
    **_keys(
        _MULTIMODAL,
        "processor_kwargs role_boundaries freeze_mm_modules is_multimodal",
    ),
    # Adapters
    **_keys(
        _LORA,
        "lora_fan_in_fan_out lora_on_cpu peft_layer_replication qlora_sharded_model_loading mora",
    ),
    **_keys("remove it: adapter weights are always fp32", "peft_autocast_adapter_dtype"),
    **_keys("remove it: a tied head stays tied", "peft_ensure_weight_tying"),
    **_keys(
        "merging is a step of its own, after the training: remove it, and run `eft merge`",
        "merge_lora",
        merge_method="memory_efficient",
    ),
    **_keys(
        "restarts and layer sampling are not offered: remove it",
        "relora relora_prune_ratio relora_cpu_offload lisa_n_layers lisa_step_interval "
        "spectrum_top_fraction spectrum_model_name",
        relora_prune_method="magnitude",
        lisa_layers_attribute="model.layers",
    ),
    # Data
    **_keys(_CACHE, "dataset_keep_in_memory num_dataset_shards_to_save"),
    **_keys(
        _STREAM,
        "pretraining_dataset pretraining_sample_concatenation skip_prepare_dataset",
        pretrain_multipack_attn=True,
    ),
    **_keys(_HUB, "push_dataset_to_hub push_to_hub_model_id hub_model_id hub_strategy hub_revision"),
    **_keys("remove it, and log in with `hf auth login`", "hf_use_auth_token"),
    **_keys("remove it: cut the file, or give another `split`", "dataset_shard_num dataset_shard_idx"),
    **_keys("remove it: `shuffle_merged_datasets` shuffles all samples together", "shuffle_before_merging_datasets"),
    **_keys("remove it: held-out samples obey `sequence_len` too", "eval_sequence_len max_prompt_len"),
    **_keys("write it into the template or the rows", "default_system_message"),
    # Batches
    **_keys("remove it: set `micro_batch_size`; memory is the same in every step", "auto_find_batch_size"),
    **_keys(
        "use `sample_packing: true`: without padding there is nothing to group", "group_by_length batch_flattening"
    ),
    **_keys("use `sample_packing: true` and `sequence_len`", "max_packed_sequence_len"),
    **_keys(
        "remove it: the planner packs all samples at once and needs no tuning",
        "sample_packing_mp_start_method multipack_real_batches pad_to_multiple_of",
        sample_packing_group_size=100000,
    ),
    **_keys(_DETERMINED, "dataloader_prefetch_factor remove_unused_columns"),
    **_keys("remove it: every sample is trained once per epoch; none is dropped", "dataloader_drop_last"),
    # Optimizer and schedule
    **_keys("remove it: Axolotl never reads it either", "lr_div_factor"),
    **_keys(
        _OPTIMIZER,
        "optim_target_modules torchdistx_path adam_epsilon2 dion_lr dion_momentum",
        dion_rank_fraction=1.0,
        dion_rank_multiple_of=1,
        qgalore_rank=256,
        qgalore_update_proj_gap=200,
        qgalore_scale=0.25,
        qgalore_proj_type="std",
        qgalore_proj_quant=True,
        qgalore_proj_bits=4,
        qgalore_proj_group_size=256,
        qgalore_cos_threshold=0.4,
        qgalore_gamma_proj=2,
        qgalore_queue_size=5,
        grokfast_alpha=0.98,
        grokfast_lamb=2.0,
    ),
    # Evaluation, checkpoints, trackers
    **_keys(_METRIC, "do_causal_lm_eval eval_causal_lm_metrics do_bench_eval bench_dataset bench_split lm_eval_tasks"),
    **_keys(
        "use `generate_samples: true`, with `num_generation_samples` and `generation_max_new_tokens`",
        "eval_table_size eval_max_new_tokens",
    ),
    **_keys(
        _GENERATE,
        "generation_top_p generation_top_k",
        generation_temperature=0.7,
        generation_prompt_ratio=0.5,
        generation_do_sample=True,
    ),
    **_keys("use `stop_file`, which ends the run after the checkpoint; signals do, too", "dynamic_checkpoint"),
    **_keys("remove it: eft writes safetensors only", save_safetensors=True),
    **_keys("use `include_tkps`", "include_tokens_per_second"),
    **_keys(_WANDB, "wandb_run_id wandb_mode wandb_watch wandb_log_model"),
    **_keys("remove it: the output folder stays where it is", "hf_mlflow_log_artifacts"),
    **_keys("remove it, and set `TRACKIO_SPACE_ID` in the environment", "trackio_space_id"),
    **_keys(
        _TRACKER,
        "use_comet comet_api_key comet_workspace comet_project_name comet_experiment_key comet_mode comet_online "
        "comet_experiment_config use_otel_metrics use_swanlab swanlab_project swanlab_experiment_name swanlab_mode",
        otel_metrics_host="localhost",
        otel_metrics_port=8000,
    ),
    **_keys(
        "remove it: use `eft chat`",
        "gradio_title gradio_share gradio_server_name gradio_server_port gradio_max_new_tokens gradio_temperature",
    ),
    # Commands and leftovers of older versions
    **_keys("use `eft preprocess`, which shows the trained tokens in colour", "debug prepare_ds_only"),
    **_keys("remove it: `seed` covers the order of the data too", "data_seed"),
    **_keys(
        "remove it: a leftover of old versions",
        "landmark_attention xpos_rope load_4bit sample_packing_seq_len_multiplier",
    ),
    # Other kinds of training
    **_keys(
        _RL,
        "rl trl ebft reward_model process_reward_model center_rewards_coefficient num_labels dpo_use_weighting "
        "dpo_label_smoothing precompute_ref_log_probs dpo_use_liger_kernel dpo_padding_free dpo_loss_type "
        "dpo_loss_weights dpo_beta dpo_use_logits_to_keep dpo_generate_during_eval dpo_norm_loss rpo_alpha orpo_alpha "
        "simpo_gamma cpo_alpha kto_desirable_weight kto_undesirable_weight rl_beta vllm nemo_gym_enabled hatchery",
    ),
    **_keys(
        "distillation and diffusion are not offered: remove it",
        "kd_trainer kd_ce_alpha kd_alpha kd_temperature diffusion",
    ),
    **_keys(_PLUGIN, "plugins trainer_cls"),
    **_keys("remove it: eft always refuses unknown keys", "strict"),
}

COMPUTED = frozenset(
    {
        "axolotl_config_path",
        "capabilities",
        "env_capabilities",
        "is_preprocess",
        "preprocess_iterable",
        "total_num_tokens",
        "total_supervised_tokens",
        "sample_packing_eff_est",
        "world_size",
        "local_rank",
        "device",
        "ddp",
    }
)
"""Keys that Axolotl writes into a config itself; whatever they say, eft works it out anew."""

AXOLOTL_DATASET_KEYS: dict[str, Foreign] = {
    **_keys("remove it: give another `split`, or cut the file", "shards shards_idx preprocess_shards skip"),
    **_keys("write `message_property_mappings: {role: …}`", "message_field_role"),
    **_keys("write `message_property_mappings: {content: …}`", "message_field_content"),
    **_keys("use `type: chat_template` with `field_messages` and `message_property_mappings`", "conversation"),
    **_keys("use `type: chat_template` with `roles`", "field_human field_model"),
    **_keys("not offered: remove it", "logprobs_field temperature"),
    **_keys("use `type: package.module:function`", "input_transform input_format"),
    **_keys("code from data sets is never run: convert the data to JSONL or Parquet", "trust_remote_code"),
    **_keys("use `field`", "text_column"),
    **_keys(_RL, "field_prompt field_chosen field_rejected field_completion field_label"),
}


def asks_for_nothing(value: Any, default: Any) -> bool:
    """Whether a key that eft lacks is set to null, off, empty, or Axolotl's default."""
    return (
        value is None or value is False or value in ("", [], {}) or (value == default and type(value) is type(default))
    )
