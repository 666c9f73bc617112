"""E8 through runs: a key that nothing uses ends the run before its first step, and a key that is used never does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eft import run
from eft.config.root import TrainConfig
from eft.config.section import key
from eft.core.errors import ConfigError, PromiseBroken
from tests.functional.conftest import MakeConfig, MakeTrainer


class WiderConfig(TrainConfig):
    """A config with a key that no component knows."""

    sharpness: float = key(1.0, "Read by nobody.")


def wider(config: TrainConfig, **keys: Any) -> WiderConfig:
    wide = WiderConfig(**{**config.model_dump(exclude_unset=True), **keys})
    wide.forget_reads()
    return wide


def test_a_key_that_nobody_reads_ends_the_run(make_config: MakeConfig, make_trainer: MakeTrainer) -> None:
    trainer: Any = make_trainer(config=wider(make_config(max_steps=3), sharpness=2.0))
    with pytest.raises(PromiseBroken, match="E8.*`sharpness`"):
        trainer.train()
    assert trainer.state.global_step == 0
    (promise,) = [result for result in trainer.outcome.promises if result.promise == "E8"]
    assert promise.status == "fail"
    assert promise.numbers["unused"] == 1.0


def test_its_default_is_accepted(make_config: MakeConfig, make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(config=wider(make_config(max_steps=1), sharpness=1.0))
    assert trainer.train().global_step == 1


def test_a_key_that_is_read_is_accepted(make_config: MakeConfig, make_trainer: MakeTrainer) -> None:
    config = wider(make_config(max_steps=1), sharpness=2.0)
    assert config.sharpness == 2.0  # a component of the user's own, say
    assert make_trainer(config=config).train().global_step == 1


def test_a_whole_run_finds_it_too(make_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(PromiseBroken, match="`sharpness`"):
        run.train(wider(make_config(max_steps=3), sharpness=2.0))
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_key_whose_switch_is_off_is_refused_at_once(make_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="`lora_r`: not used because `adapter` is not set"):
        make_config(lora_r=4)
    with pytest.raises(ConfigError, match="not used because `loss_watchdog_threshold` is not set"):
        run.train({"base_model": "x", "datasets": [{"path": "x"}], "learning_rate": 1, "loss_watchdog_patience": 2})


TOUR: dict[str, dict[str, Any]] = {
    "adapter, cosine, schedules of saving and evaluating in steps": {
        "special_tokens": {"pad_token": "<|endoftext|>"},
        "attn_implementation": "sdpa",
        "adapter": "lora",
        "lora_r": 2,
        "lora_alpha": 8,
        "lora_dropout": 0.1,
        "lora_target_modules": ["q_proj", "v_proj"],
        "lora_modules_to_save": ["lm_head"],
        "peft_use_dora": True,
        "peft_use_rslora": True,
        "val_set_size": 4,
        "chat_template": "chatml",
        "train_on_inputs": True,
        "excess_length_strategy": "truncate",
        "min_sample_len": 3,
        "malformed_rows": "drop",
        "shuffle_merged_datasets": False,
        "data_gates": "warn",
        "data_gate_limits": {"duplicates": 0.5},
        "data_gate_conversations": 8,
        "dataset_exact_deduplication": True,
        "seed": 1,
        "eval_sample_packing": False,
        "sample_packing_sequentially": True,
        "sample_packing_bin_size": 3,
        "pad_to_sequence_len": True,
        "curriculum_sampling": True,
        "micro_batch_size": 2,
        "global_batch_size": 4,
        "deterministic": False,
        "max_steps": 3,
        "dataloader_pin_memory": False,
        "optimizer": "adamw_torch",
        "optim_args": {"amsgrad": True},
        "weight_decay": 0.1,
        "adam_beta1": 0.8,
        "adam_beta2": 0.95,
        "adam_epsilon": 1e-6,
        "max_grad_norm": 0.5,
        "warmup_steps": 1,
        "cosine_min_lr_ratio": 0.1,
        "cosine_constant_lr_ratio": 0.9,
        "lr_quadratic_warmup": True,
        "label_smoothing_factor": 0.1,
        "z_loss_weight": 1e-4,
        "router_aux_loss_coef": 0.0,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "gradient_checkpointing_every": 2,
        "selective_checkpointing": True,
        "activation_offloading": True,
        "torch_empty_cache_steps": 1,
        "preflight": True,
        "save_strategy": "steps",
        "save_steps": 2,
        "save_first_step": True,
        "save_total_limit": 2,
        "save_keep_every": 2,
        "save_asynchronously": False,
        "dataset_processes": 1,
        "auto_resume_from_checkpoints": False,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "eval_on_start": True,
        "eval_batch_size": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "early_stopping_patience": 5,
        "generate_samples": True,
        "num_generation_samples": 1,
        "generation_max_new_tokens": 2,
        "ddp_timeout": 60,
        "stall_timeout": 30,
        "fsdp_version": 2,
        "fsdp_config": {"reshard_after_forward": False},
        "dp_shard_size": 1,
        "dp_replicate_size": 1,
        "ddp_find_unused_parameters": True,
        "ddp_bucket_cap_mb": 10,
        "logging_steps": 2,
        "include_tkps": False,
        "profiler_steps": 1,
        "profiler_steps_start": 1,
        "loss_watchdog_threshold": 100.0,
        "loss_watchdog_patience": 2,
        "loss_watchdog_action": "skip",
        "nonfinite_action": "rollback",
        "stop_file": "/tmp/eft-stop",
    },
    "a base in 4 bits, other ranks, one layer": {
        "adapter": "qlora",
        "load_in_4bit": True,
        "bnb_config_kwargs": {"bnb_4bit_use_double_quant": False},
        "lora_target_modules": ["q_proj", "v_proj", "up_proj"],
        "lora_exclude_modules": ["up_proj"],
        "lora_rank_pattern": {"q_proj": 2},
        "lora_alpha_pattern": {"q_proj": 2},
        "peft_init_lora_weights": "gaussian",
        "peft_layers_to_transform": [1],
        "peft_layers_pattern": "layers",
        "peft_trainable_token_indices": [3],
        "peft": {"lora_bias": False},
    },
    "part of the weights, another schedule, parts of epochs": {
        "train_top_layers": 1,
        "lr_scheduler": "warmup_stable_decay",
        "lr_scheduler_kwargs": {"num_decay_steps": 2},
        "warmup_ratio": 0.2,
        "eot_tokens": ["<|im_end|>"],
        "num_epochs": 0.5,
        "sample_packing_strategy": "dense",
        "balance_buffer_steps": 2,
        "gradient_accumulation_steps": 1,
        "saves_per_epoch": 1,
        "save_only_model": True,
        "save_dtype": "bfloat16",
        "evals_per_epoch": 1,
        "val_set_size": 4,
        "greater_is_better": True,
        "metric_for_best_model": "eval_samples_per_second",
        "bf16": True,
        "resize_token_embeddings_to_32x": True,
        "trust_remote_code": True,
        "use_tensorboard": True,
    },
    "bf16 weights, compiled layers": {
        "max_steps": 1,
        "bf16": "auto",
        "bfloat16": True,
        "bf16_update": "fp32_master",
        "torch_compile": True,
        "torch_compile_backend": "eager",
    },
    "rates of their own, an average, noise, restarts": {
        "max_steps": 3,
        "optimizer": "ademamix",
        "adam_beta3": 0.99,
        "lr_groups": [{"name": "queries", "modules": ["q_proj"], "lr": 1e-3}],
        "embedding_lr": 1e-3,
        "layerwise_lr_decay": 0.9,
        "weight_average": "ema",
        "weight_average_decay": 0.9,
        "weight_average_start": 1,
        "jagged_restart_steps": 3,
        "jagged_restart_warmup_steps": 1,
        "jagged_restart_anneal_steps": 2,
        "neftune_noise_alpha": 5.0,
        "use_eaft": True,
        "eaft_alpha": 0.5,
        "eaft_k": 10,
    },
    "LoRA+": {
        "max_steps": 3,
        "adapter": "lora",
        "lora_target_linear": True,
        "lora_modules_to_save": ["lm_head"],
        "loraplus_lr_ratio": 16.0,
        "loraplus_lr_embedding": 1e-5,
        "embedding_lr_scale": 0.5,
    },
    "a stream": {
        "streaming": True,
        "streaming_token_budget": 300,
        "streaming_multipack_buffer_size": 5,
    },
    "chosen weights": {
        "unfrozen_parameters": ["lm_head"],
        "max_steps": 1,
        "dataloader_num_workers": 1,
        "optimizer_in_backward": True,
        "max_grad_norm": 0.0,
    },
}
"""Whole runs that together set almost every key to something else than its default."""

NOT_TOURED = {
    "tensor_parallel_size", "context_parallel_size", "deepspeed",  # of several processes
    "base_model", "datasets", "learning_rate", "output_dir", "dataset_prepared_path", "sequence_len", "sample_packing",
    "verify_saves",  # set in every run here
    "lora_target_parameters", "load_in_8bit", "lora_model_dir", "test_datasets", "tokens",
    "resume_from_checkpoint", "epoch_tokens",  # in other tests
    "chat_template_kwargs", "chat_template_date",  # in the tests of templates
    "processor_type", "image_size", "image_resize_algorithm",  # in the tests of rows with images
    "gguf_file", "chat_template_jinja", "tokenizer_config", "revision_of_model", "fp16", "tf32",  # files, hub, CUDA
    "use_wandb", "wandb_project", "wandb_entity", "wandb_name", "use_trackio", "trackio_project_name",
    "trackio_run_name", "use_mlflow", "mlflow_tracking_uri", "mlflow_experiment_name", "mlflow_run_name",  # trackers
    "use_ray", "ray_num_workers", "resources_per_worker", "ray_placement_strategy", "ray_max_failures", "ray_run_name",
    "ray_storage_path",  # in the tests of Ray
    "torch_compile_mode", "liger_rms_norm", "liger_rope", "liger_glu_activation",  # inductor, CUDA
}  # fmt: skip


@pytest.mark.parametrize("name", TOUR)
def test_no_key_in_use_is_called_unused(name: str, make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(**{"gradient_accumulation_steps": None, **TOUR[name]})
    run.train(config)
    promises = json.loads((tmp_path / "out" / "promises.json").read_text())
    assert [promise["status"] for promise in promises if promise["promise"] == "E8"] == ["pass"]


def test_the_tour_misses_no_key() -> None:
    toured = set().union(*TOUR.values())
    assert toured | NOT_TOURED == set(TrainConfig.model_fields)
    assert not toured & NOT_TOURED
