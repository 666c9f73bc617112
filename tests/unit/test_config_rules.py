"""Contradictions between keys: one test per rule, each seen to pass without and to fail with the contradiction."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from eft.config.load import config_from_mapping
from eft.config.root import TrainConfig
from eft.config.rules import DATASET_RULES, RULES, rule_problems
from eft.core.errors import ConfigError

MAPPING: dict[str, Any] = {"base_model": "tiny", "learning_rate": 2e-5, "datasets": [{"path": "rows.jsonl"}]}
HELD_OUT = {"val_set_size": 0.1}
STREAM: dict[str, Any] = {"streaming": True, "max_steps": 5}
IMAGES: dict[str, Any] = {
    "processor_type": "AutoProcessor",
    "datasets": [{"path": "rows.jsonl", "type": "chat_template"}],
}

FSDP: dict[str, Any] = {"fsdp_version": 2}
PACKED: dict[str, Any] = {"sample_packing": True}
LORA: dict[str, Any] = {"adapter": "lora", "lora_target_linear": True}
QLORA: dict[str, Any] = {"adapter": "qlora", "load_in_4bit": True, "lora_target_linear": True}

# Rule, keys that break it, the key the message is about, and keys that are right in its place.
CASES: list[tuple[str, dict[str, Any], str, dict[str, Any]]] = [
    ("one_source_of_held_out_data", {"val_set_size": 0.1, "test_datasets": [{"path": "x"}]}, "val_set_size", HELD_OUT),
    ("held_out_rows_are_whole", {"val_set_size": 1.5}, "val_set_size", {"val_set_size": 2}),
    (
        "template_text_needs_jinja",
        {"chat_template_jinja": "x"},
        "chat_template_jinja",
        {"chat_template": "jinja", "chat_template_jinja": "x"},
    ),
    ("deepspeed_is_known", {"deepspeed": "zero4"}, "deepspeed", {"deepspeed": "zero3"}),
    (
        "deepspeed_is_known",
        {"deepspeed": {"zero_optimization": {"stage": 2, "bucket": 1}}},
        "deepspeed",
        {"deepspeed": {"zero_optimization": {"stage": 2, "reduce_bucket_size": 1}}},
    ),
    ("deepspeed_stands_alone", {"deepspeed": "zero2", **FSDP}, "deepspeed", {"deepspeed": "zero2"}),
    (
        "zero3_knows_lora_only",
        {"deepspeed": "zero3", "adapter": "peft", "peft": {"peft_type": "IA3"}},
        "deepspeed",
        {"deepspeed": "zero3", **LORA},
    ),
    ("jinja_needs_template_text", {"chat_template": "jinja"}, "chat_template", {"chat_template": "chatml"}),
    ("template_is_known", {"chat_template": "lama9"}, "chat_template", {"chat_template": "./own.jinja"}),
    (
        "shares_fit",
        {"datasets": [{"path": "x", "token_share": 0.5}, {"path": "y", "token_share": 0.4}]},
        "datasets",
        {"datasets": [{"path": "x", "token_share": 0.5}, {"path": "y"}], "epoch_tokens": 1000},
    ),
    (
        "shares_fit",
        {"datasets": [{"path": "x", "token_share": 1.0}, {"path": "y"}]},
        "datasets",
        {"datasets": [{"path": "x", "token_share": 1.0}]},
    ),
    ("shares_fit", {"epoch_tokens": 9}, "epoch_tokens", {}),
    (
        "shares_are_of_training",
        {"test_datasets": [{"path": "x", "max_rows": 3}]},
        "test_datasets",
        {"test_datasets": [{"path": "x"}]},
    ),
    (
        "weight_or_share",
        {"datasets": [{"path": "x", "token_share": 1.0, "weight": 2.0}]},
        "weight",
        {"datasets": [{"path": "x", "weight": 2.0}]},
    ),
    ("a_stream_has_a_length", {"streaming": True}, "streaming", STREAM),
    ("a_stream_has_a_length", STREAM | {"streaming_token_budget": 9}, "max_steps", STREAM),
    ("a_stream_has_no_epochs", STREAM | {"num_epochs": 2.0}, "num_epochs", STREAM),
    ("a_stream_holds_nothing_out", STREAM | HELD_OUT, "val_set_size", STREAM | {"test_datasets": [{"path": "x"}]}),
    ("a_stream_is_not_known_as_a_whole", STREAM | {"balance_buffer_steps": 4}, "balance_buffer_steps", STREAM),
    (
        "a_stream_is_not_known_as_a_whole",
        STREAM | {"datasets": [{"path": "x", "max_rows": 3}]},
        "datasets",
        STREAM | {"datasets": [{"path": "x", "weight": 3.0}]},
    ),
    ("a_stream_is_not_known_as_a_whole", STREAM | {"dataloader_num_workers": 2}, "dataloader_num_workers", STREAM),
    ("images_are_not_packed", IMAGES | {"sample_packing": True}, "sample_packing", IMAGES),
    ("images_need_conversations", {"processor_type": "AutoProcessor"}, "processor_type", IMAGES),
    ("what_images_do_not_go_with", IMAGES | STREAM, "streaming", IMAGES),
    ("image_size_is_positive", IMAGES | {"image_size": [1, 2, 3]}, "image_size", IMAGES | {"image_size": [4, 5]}),
    ("shortest_below_longest", {"min_sample_len": 513}, "min_sample_len", {"min_sample_len": 512}),
    ("one_half_precision", {"bf16": True, "fp16": True}, "fp16", {"bf16": False, "fp16": True}),
    (
        "global_batch_divides",
        {"global_batch_size": 10, "micro_batch_size": 4},
        "global_batch_size",
        {"global_batch_size": 12, "micro_batch_size": 4},
    ),
    ("pure_bf16_stands_alone", {"bfloat16": True, "bf16": False}, "bfloat16", {"bfloat16": True}),
    (
        "rounding_noise_is_not_averaged",
        {"bfloat16": True, "optimizer": "schedule_free_adamw"},
        "bf16_update",
        {"bfloat16": True, "optimizer": "schedule_free_adamw", "bf16_update": "fp32_master"},
    ),
    (
        "compile_mode_is_inductors",
        {
            "torch_compile": True,
            "torch_compile_backend": "eager",
            "torch_compile_mode": "max-autotune-no-cudagraphs",
        },
        "torch_compile_mode",
        {"torch_compile": True, "torch_compile_mode": "max-autotune-no-cudagraphs"},
    ),
    ("one_kind_of_fused_kernel", {"torch_compile": True, "liger_rope": True}, "liger_rope", {"liger_rope": True}),
    (
        "compiled_layers_are_recomputed_whole",
        {"torch_compile": True, "gradient_checkpointing": True, "selective_checkpointing": True},
        "selective_checkpointing",
        {"torch_compile": True, "gradient_checkpointing": True},
    ),
    (
        "checkpoint_options_are_known",
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"every_n_layers": 2}},
        "gradient_checkpointing_kwargs",
        {"gradient_checkpointing": True, "gradient_checkpointing_every": 2},
    ),
    (
        "selection_needs_saved_tensors",
        {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": True},
            "selective_checkpointing": True,
        },
        "selective_checkpointing",
        {"gradient_checkpointing": True, "selective_checkpointing": ["attention", "matmul"]},
    ),
    (
        "updates_in_backward_stand_alone",
        {"optimizer_in_backward": True},
        "optimizer_in_backward",
        {"optimizer_in_backward": True, "max_grad_norm": 0},
    ),
    (
        "updates_in_backward_stand_alone",
        {"optimizer_in_backward": True, "max_grad_norm": 0, "gradient_accumulation_steps": 2},
        "optimizer_in_backward",
        {"optimizer_in_backward": True, "max_grad_norm": 0, "micro_batch_size": 2, "global_batch_size": 2},
    ),
    (
        "adapter_or_freezing",
        {"adapter": "lora", "lora_target_linear": True, "train_top_layers": 2},
        "train_top_layers",
        {"train_top_layers": 2},
    ),
    (
        "one_freezing_key",
        {"train_top_layers": 2, "unfrozen_parameters": ["x"]},
        "train_top_layers",
        {"unfrozen_parameters": ["x"]},
    ),
    ("adapter_needs_targets", {"adapter": "lora"}, "adapter", {"adapter": "lora", "lora_target_modules": ["q_proj"]}),
    (
        "unfrozen_parameters_are_patterns",
        {"unfrozen_parameters": ["lm_head.weight[:32000]"]},
        "unfrozen_parameters",
        {"unfrozen_parameters": [r"layers\.[01]\."]},
    ),
    ("unfrozen_parameters_are_patterns", {"unfrozen_parameters": ["("]}, "unfrozen_parameters", {}),
    (
        "special_tokens_are_roles",
        {"special_tokens": {"pad": "x"}},
        "special_tokens",
        {"special_tokens": {"pad_token": "x"}},
    ),
    (
        "one_embedding_rate",
        {"embedding_lr": 1e-4, "embedding_lr_scale": 0.5},
        "embedding_lr_scale",
        {"embedding_lr_scale": 0.5},
    ),
    (
        "one_average",
        {"weight_average": "ema", "optimizer": "schedule_free_adamw"},
        "weight_average",
        {"weight_average": "ema"},
    ),
    (
        "decay_belongs_to_ema",
        {"weight_average": "mean", "weight_average_decay": 0.9},
        "weight_average_decay",
        {"weight_average": "ema", "weight_average_decay": 0.9},
    ),
    (
        "restarts_leave_room",
        {"jagged_restart_steps": 10},
        "jagged_restart_steps",
        {"jagged_restart_steps": 11},
    ),
    ("one_warmup_key", {"warmup_steps": 1, "warmup_ratio": 0.1}, "warmup_ratio", {"warmup_steps": 1}),
    ("one_save_interval", {"save_steps": 5, "saves_per_epoch": 2}, "saves_per_epoch", {"save_steps": 5}),
    ("save_interval_fits_strategy", {"save_strategy": "steps"}, "save_strategy", {"save_strategy": "epoch"}),
    (
        "save_interval_fits_strategy",
        {"save_strategy": "no", "saves_per_epoch": 2},
        "saves_per_epoch",
        {"save_strategy": "steps", "saves_per_epoch": 2},
    ),
    ("save_steps_are_whole", {"save_steps": 2.5}, "save_steps", {"save_steps": 0.5}),
    (
        "best_model_needs_checkpoints",
        {**HELD_OUT, "load_best_model_at_end": True, "save_strategy": "no"},
        "load_best_model_at_end",
        {**HELD_OUT, "load_best_model_at_end": True},
    ),
    (
        "best_average_needs_optimizer_state",
        {
            **HELD_OUT,
            "load_best_model_at_end": True,
            "save_only_model": True,
            "optimizer": "schedule_free_adamw",
        },
        "save_only_model",
        {**HELD_OUT, "load_best_model_at_end": True, "save_only_model": True},
    ),
    (
        "one_eval_interval",
        {**HELD_OUT, "eval_steps": 5, "evals_per_epoch": 2},
        "evals_per_epoch",
        {**HELD_OUT, "eval_steps": 5},
    ),
    (
        "eval_interval_fits_strategy",
        {**HELD_OUT, "eval_strategy": "epoch", "eval_steps": 5},
        "eval_steps",
        {**HELD_OUT, "eval_strategy": "epoch"},
    ),
    ("eval_steps_are_whole", {**HELD_OUT, "eval_steps": 2.5}, "eval_steps", {**HELD_OUT, "eval_steps": 0.25}),
    ("evaluation_needs_data", {"early_stopping_patience": 2}, "early_stopping_patience", {"eval_strategy": "no"}),
    ("evaluation_needs_data", {"load_best_model_at_end": True}, "load_best_model_at_end", {}),
    ("evaluation_needs_data", {"generate_samples": True}, "generate_samples", {**HELD_OUT, "generate_samples": True}),
    ("evaluation_needs_data", {"evals_per_epoch": 2}, "evals_per_epoch", {**HELD_OUT, "evals_per_epoch": 2}),
    (
        "evaluation_is_not_off",
        {**HELD_OUT, "eval_strategy": "no", "early_stopping_patience": 2},
        "early_stopping_patience",
        {**HELD_OUT, "early_stopping_patience": 2},
    ),
    (
        "a_loss_gets_better_downwards",
        {**HELD_OUT, "greater_is_better": True},
        "greater_is_better",
        {**HELD_OUT, "greater_is_better": True, "metric_for_best_model": "accuracy"},
    ),
    (
        "one_way_to_pack",
        {"sample_packing": True, "sample_packing_sequentially": True, "sample_packing_strategy": "fit"},
        "sample_packing_strategy",
        {"sample_packing": True, "sample_packing_sequentially": True},
    ),
    (
        "order_is_kept",
        {"sample_packing": True, "curriculum_sampling": True, "sample_packing_strategy": "dense"},
        "sample_packing_strategy",
        {"sample_packing": True, "curriculum_sampling": True, "sample_packing_strategy": "fit"},
    ),
    (
        "order_is_kept",
        {"curriculum_sampling": True, "balance_buffer_steps": 8},
        "balance_buffer_steps",
        {"balance_buffer_steps": 8},
    ),
    (
        "format_is_known",
        {"datasets": [{"path": "x", "type": "alpca"}]},
        "type",
        {"datasets": [{"path": "x", "type": "m.f:g"}]},
    ),
    (
        "keys_fit_format",
        {"datasets": [{"path": "x", "type": "completion", "field_messages": "y"}]},
        "field_messages",
        {"datasets": [{"path": "x", "type": "chat_template", "field_messages": "y"}]},
    ),
    (
        "own_template_is_known",
        {"datasets": [{"path": "x", "type": "chat_template", "chat_template": "lama9"}]},
        "chat_template",
        {"datasets": [{"path": "x", "type": "chat_template", "chat_template": "tokenizer_default_fallback_chatml"}]},
    ),
    (
        "own_template_text_needs_jinja",
        {"datasets": [{"path": "x", "type": "chat_template", "chat_template": "gemma", "chat_template_jinja": "x"}]},
        "chat_template_jinja",
        {"datasets": [{"path": "x", "type": "chat_template", "chat_template_jinja": "x"}]},
    ),
    (
        "updates_are_left_out_as_a_whole",
        {"nonfinite_action": "skip", "optimizer_in_backward": True, "max_grad_norm": 0},
        "nonfinite_action",
        {"nonfinite_action": "rollback", "optimizer_in_backward": True, "max_grad_norm": 0},
    ),
    (
        "rollback_needs_checkpoints",
        {"loss_watchdog_threshold": 5, "loss_watchdog_action": "rollback", "save_strategy": "no"},
        "loss_watchdog_action",
        {"loss_watchdog_threshold": 5, "loss_watchdog_action": "rollback"},
    ),
    (
        "loss_scaling_leaves_updates_out_itself",
        {"nonfinite_action": "rollback", "fp16": True, "bf16": False},
        "nonfinite_action",
        {"nonfinite_action": "stop", "fp16": True, "bf16": False},
    ),
    (
        "prompt_keys_are_known",
        {"datasets": [{"path": "x", "type": {"fromat": "x"}}]},
        "type",
        {"datasets": [{"path": "x", "type": {"format": "x", "field_system": None}}]},
    ),
    ("one_width_of_the_base", {**QLORA, "load_in_8bit": True}, "load_in_8bit", QLORA),
    ("quantised_base_needs_adapter", {"load_in_4bit": True}, "load_in_4bit", QLORA),
    ("qlora_needs_four_bits", {**QLORA, "load_in_4bit": False}, "adapter", QLORA),
    ("qlora_needs_four_bits", {**QLORA, "load_in_4bit": False, "load_in_8bit": True}, "adapter", QLORA),
    (
        "bnb_options_are_known",
        {**QLORA, "bnb_config_kwargs": {"bnb_4bit_quant_typ": "nf4"}},
        "bnb_config_kwargs",
        {**QLORA, "bnb_config_kwargs": {"bnb_4bit_quant_type": "fp4"}},
    ),
    (
        "bnb_options_are_known",
        {**QLORA, "bnb_config_kwargs": {"llm_int8_threshold": 5.0}},
        "bnb_config_kwargs",
        {**QLORA, "bnb_config_kwargs": {"llm_int8_skip_modules": ["lm_head"]}},
    ),
    (
        "start_of_factors_is_offered",
        {**LORA, "peft_init_lora_weights": "eva"},
        "peft_init_lora_weights",
        {**LORA, "peft_init_lora_weights": "gaussian"},
    ),
    (
        "start_of_factors_is_offered",
        {**LORA, "peft_init_lora_weights": "gausian"},
        "peft_init_lora_weights",
        {**LORA, "peft_init_lora_weights": "orthogonal"},
    ),
    (
        "start_from_weights_has_weights",
        {**LORA, "peft_init_lora_weights": "pissa_niter_4", "peft_use_dora": True},
        "peft_init_lora_weights",
        {**LORA, "peft_init_lora_weights": "pissa_niter_4", "peft_use_rslora": True},
    ),
    (
        "start_from_weights_has_weights",
        {**LORA, "peft_init_lora_weights": "olora", "weight_decay": 0.1},
        "peft_init_lora_weights",
        {**LORA, "peft_init_lora_weights": "olora"},
    ),
    (
        "other_methods_bring_their_own_config",
        {"adapter": "peft"},
        "adapter",
        {"adapter": "peft", "peft": {"peft_type": "IA3"}},
    ),
    (
        "other_methods_bring_their_own_config",
        {"adapter": "peft", "peft": {"peft_type": "IA3"}, "lora_r": 4},
        "lora_r",
        {"adapter": "peft", "peft": {"peft_type": "IA3"}},
    ),
    (
        "fsdp_options_are_known",
        FSDP | {"fsdp_config": {"reshard_after": True}},
        "fsdp_config",
        FSDP | {"fsdp_config": {"reshard_after_forward": True}},
    ),
    (
        "one_way_to_split_a_row",
        PACKED | {"context_parallel_size": 2, "tensor_parallel_size": 2},
        "context_parallel_size",
        PACKED | {"context_parallel_size": 2},
    ),
    (
        "what_is_loaded_in_parts_is_plain",
        LORA | {"tensor_parallel_size": 2, "peft_use_dora": True},
        "tensor_parallel_size",
        LORA | {"tensor_parallel_size": 2},
    ),
    (
        "context_parallelism_is_packed",
        {"context_parallel_size": 2},
        "context_parallel_size",
        PACKED | {"context_parallel_size": 2},
    ),
]


@pytest.mark.parametrize(("rule", "wrong", "key", "right"), CASES, ids=[f"{case[0]}-{case[2]}" for case in CASES])
def test_rule(rule: str, wrong: dict[str, Any], key: str, right: dict[str, Any]) -> None:
    function = {rule.__name__: rule for rule in (*RULES, *DATASET_RULES)}[rule]
    is_dataset_rule = function in DATASET_RULES
    for keys, is_broken in ((wrong, True), (right, False)):
        config = TrainConfig(**MAPPING | keys)
        found = function(config.datasets[0] if is_dataset_rule else config)  # type: ignore[operator]
        assert (found is not None) == is_broken
        if found is not None:
            assert found[0] == key
    with pytest.raises(ConfigError, match=key):
        config_from_mapping(MAPPING | wrong)
    config_from_mapping(MAPPING | right)


def test_every_rule_has_a_case() -> None:
    assert {case[0] for case in CASES} == {rule.__name__ for rule in (*RULES, *DATASET_RULES)}


def test_the_suggested_global_batch_size_is_valid() -> None:
    with pytest.raises(ConfigError, match=r"= 12; 24 is$"):
        config_from_mapping(
            MAPPING | {"global_batch_size": 20, "micro_batch_size": 4, "gradient_accumulation_steps": 3}
        )


def _with_switch() -> list[tuple[str, str]]:
    pairs = []
    for name, info in TrainConfig.model_fields.items():
        extra = info.json_schema_extra
        if isinstance(extra, dict) and "used_when" in extra:
            pairs.append((name, str(extra["used_when"])))
    return pairs


@pytest.mark.parametrize(("name", "switch"), _with_switch())
def test_a_key_whose_switch_is_off_is_an_error(name: str, switch: str) -> None:
    assert switch in TrainConfig.model_fields
    named = get_args(TrainConfig.model_fields[name].annotation)
    changed = None
    for value in (
        7,
        0.5,
        True,
        "x",
        ["x"],
        [7],
        {"x": "y"},
        {"x": 7},
        *(value for value in named[1:] if isinstance(value, str)),
    ):
        try:
            changed = TrainConfig(**MAPPING | {name: value})
        except ValueError:
            continue
        break
    assert changed is not None
    assert [text for path, text in rule_problems(changed) if path == (name,)] == [
        f"`{name}`: not used because `{switch}` is not set; set `{switch}`, or remove `{name}`"
    ]


def test_rules_leave_no_read_marks() -> None:
    config = config_from_mapping(MAPPING)
    assert config.keys_read() == frozenset()
    assert config.__dict__["datasets"][0].keys_read() == frozenset()
