"""Tiny random causal language models of many families: seeded, fp32, on the CPU, in milliseconds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB_SIZE = 128
HIDDEN_SIZE = 32
NUM_LAYERS = 2
WINDOW = 4
"""Sliding window, in tokens: shorter than the tests' documents."""

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN_SIZE,
    "num_hidden_layers": NUM_LAYERS,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "max_position_embeddings": 512,
}
_HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
_DENSE: dict[str, Any] = {**_HEADS, "intermediate_size": 64}
_SLIDING_AND_FULL = ["sliding_attention", "full_attention"]


@dataclass(frozen=True)
class _Family:
    model_type: str
    settings: dict[str, Any] = field(default_factory=dict)


FAMILIES: dict[str, _Family] = {
    "llama": _Family("llama", _DENSE),
    "qwen2": _Family("qwen2", _DENSE),
    "qwen3": _Family("qwen3", {**_DENSE, "head_dim": 8}),
    "qwen3_moe": _Family(
        "qwen3_moe",
        {**_DENSE, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
    "mixtral": _Family("mixtral", {**_DENSE, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "deepseek_v3": _Family(
        "deepseek_v3",
        {
            **_DENSE,
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "head_dim": 4,
            "n_routed_experts": 4,
            "n_group": 2,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 1,
        },
    ),
    "mistral": _Family("mistral", {**_DENSE, "sliding_window": WINDOW}),
    "gemma2": _Family(
        "gemma2",
        {
            **_DENSE,
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": WINDOW,
            "layer_types": _SLIDING_AND_FULL,
        },
    ),
    "gemma3_text": _Family(
        "gemma3_text",
        {
            **_DENSE,
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": WINDOW,
            "layer_types": _SLIDING_AND_FULL,
        },
    ),
    "phi3": _Family("phi3", _DENSE),
    "olmo2": _Family("olmo2", _DENSE),
    "gpt_neox": _Family("gpt_neox", {"num_attention_heads": 4, "intermediate_size": 64}),
    "smollm3": _Family("smollm3", {**_DENSE, "no_rope_layers": [1, 0]}),
    "granite": _Family("granite", _DENSE),
    "cohere2": _Family("cohere2", {**_DENSE, "sliding_window": WINDOW, "layer_types": _SLIDING_AND_FULL}),
    "gpt_oss": _Family(
        "gpt_oss",
        {
            **_DENSE,
            "head_dim": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": WINDOW,
            "layer_types": _SLIDING_AND_FULL,
        },
    ),
    "llama4_text": _Family(
        "llama4_text",
        {
            **_DENSE,
            "head_dim": 8,
            "intermediate_size_mlp": 64,
            "num_local_experts": 2,
            "attention_chunk_size": WINDOW,
            "layer_types": ["chunked_attention", "full_attention"],
            "no_rope_layers": [1, 0],
            "moe_layers": [],
        },
    ),
    "phimoe": _Family("phimoe", {**_DENSE, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "olmoe": _Family("olmoe", {**_DENSE, "num_experts": 4, "num_experts_per_tok": 2}),
    # Does not hand its keyword arguments on to its attention.
    "stablelm": _Family("stablelm", _DENSE),
    # Computes a mask of its own from the values in each layer.
    "doge": _Family("doge", {**_DENSE, "head_dim": 8}),
    # Families whose attention never asks transformers for a registered function.
    "falcon": _Family("falcon", {"num_attention_heads": 4, "alibi": False}),
    "bloom": _Family("bloom", {"n_head": 4}),
    # No attention at all: nothing keeps documents apart without its kernels.
    "mamba2": _Family("mamba2", {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 4}),
}


def tiny_model(
    family: str, *, attn_implementation: str | None = None, seed: int = 0, **overrides: Any
) -> PreTrainedModel:
    """A random model of a family, in training mode. `overrides` are config values, `hidden_size=64` for one.

    Weights are drawn wider than usual, so that attention is far from uniform and a leak is far above rounding.
    """
    entry = FAMILIES[family]
    settings = {**_COMMON, **entry.settings, "initializer_range": 0.15, **overrides}
    if attn_implementation is not None:
        settings["attn_implementation"] = attn_implementation
    config = AutoConfig.for_model(entry.model_type, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if overrides.get("tie_word_embeddings"):
        _check_tied(model)
    return model.train()


def _check_tied(model: PreTrainedModel) -> None:
    """Two threads that load models at once leave transformers unable to tie any; what tying depends on is shown."""
    head = model.get_output_embeddings()
    assert head is None or head.weight is model.get_input_embeddings().weight, (
        f"not tied: {type(model).__name__}, {PreTrainedModel.tie_weights}, {type(model).tie_weights}, "
        f"{type(model)._tied_weights_keys}, {model.all_tied_weights_keys}, {model.config.tie_word_embeddings}"
    )
