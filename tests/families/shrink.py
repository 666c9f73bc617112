"""Small configs of every causal-LM family that transformers knows, by rules on the names of config fields.

A default config tells which fields a family has. Sizes become small, every kind of layer stays, and whatever limits how
far a token looks (windows, chunks, top-k of an index) becomes `limit`. What the rules cannot know stands in FIXES.
"""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

HIDDEN_SIZE = 64
NUM_HEADS = 4
HEAD_DIM = HIDDEN_SIZE // NUM_HEADS
VOCAB_SIZE = 128
_MAX_LAYERS = 4

_SIZES: list[tuple[int, str]] = [
    (
        HIDDEN_SIZE,
        "hidden_size d_model n_embd emb_dim embedding_size embedding_dim word_embed_proj_dim lru_width "
        "attention_hidden_size input_embedding_size output_embedding_size",
    ),
    (
        VOCAB_SIZE,
        "vocab_size vocab_size_per_layer_input decoder_vocab_size unpadded_vocab_size pronunciation_vocab_size "
        "shape_vocab_size",
    ),
    (
        NUM_HEADS,
        "num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads "
        "encoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads "
        "linear_num_value_heads linear_num_heads index_n_heads "
        "num_experts num_local_experts n_routed_experts moe_num_experts index_block_size",
    ),
    (
        HEAD_DIM,
        "head_dim swa_head_dim d_head dim_head kv_channels attention_head_size linear_head_dim "
        "linear_key_head_dim linear_value_head_dim index_head_dim v_head_dim query_pre_attn_scalar global_head_dim "
        "mamba_d_head mamba_head_dim mamba_headdim hidden_size_per_layer_input adapter_rank router_hidden_size "
        "kv_lora_rank q_lora_rank o_lora_rank gated_norm_rank laurel_rank",
    ),
    (
        8,
        "mamba_n_heads mamba_num_heads n_mamba_heads qk_rope_head_dim qk_nope_head_dim rotary_dim mamba_d_state "
        "ssm_state_size state_size time_step_rank "
        "mamba_dt_rank mamba_chunk_size chunk_size d_rel local_attn_chunk_length lsh_attn_chunk_length",
    ),
    (
        64,
        "intermediate_size moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size ffn_dim "
        "decoder_ffn_dim encoder_ffn_dim dff dim_ff d_inner n_inner ffn_hidden_size expert_ffn_hidden_size "
        "intermediate_size_mlp dense_intermediate_size feed_forward_size shared_experts_intermediate_size "
        "moe_shared_expert_intermediate_size",
    ),
    (
        2,
        "num_experts_per_tok num_experts_per_token moe_topk moe_k swa_num_key_value_heads linear_num_key_heads "
        "num_kv_heads hc_mult hc_count",
    ),
    (
        1,
        "n_group num_expert_group topk_group n_shared_experts num_shared_experts mamba_n_groups n_groups mamba_ngroups "
        "moe_num_shared_experts",
    ),
    (512, "max_position_embeddings n_positions n_ctx max_seq_len context_length max_target_positions"),
]
_SMALL = {name: size for size, names in _SIZES for name in names.split()}
_LIMITS = frozenset(
    "sliding_window sliding_window_size attention_chunk_size window_size local_attention attention_window_size "
    "keep_window_size index_topk local_attention_window_len rel_extent".split()
)
"""Fields for how far, or at how many tokens, a token looks."""
_LAYERS = frozenset("num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_blocks".split())
_DROPOUT = ("dropout", "pdrop", "layerdrop", "dropout_prob", "dropout_p", "jitter_noise")
"""Endings of fields that make a forward random."""
_WIDE = {"initializer_range": 0.15, "init_std": 0.15}
"""Drawn wider than usual, so that attention is far from uniform and a leak is far above rounding."""

_SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "num_hidden_layers": 2, "sliding_window": "limit"}
_MAMBA_HEADS = {"mamba_d_head": HEAD_DIM}
_QWEN4_INDEXER = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": HEAD_DIM,
    "indexer_budget": "limit",
    "indexer_compress_ratio": 4,
}
FIXES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1], **_MAMBA_HEADS},
    "blt": {
        "encoder_hash_byte_group_vocab": 64,
        "encoder_config": {"hidden_size_global": HIDDEN_SIZE},
        "decoder_config": {"hidden_size_global": HIDDEN_SIZE},
    },
    "cohere_compass_text": {
        **_SLIDING,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
            for kind in ("sliding_attention", "full_attention")
        },
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"], "num_hidden_layers": 2},
    "xmod": {"default_language": "en_XX"},
    "dots3_note": {
        "text_config": {"per_layer_config": {}},
        "vision_config": {"adapter_in_dim": HIDDEN_SIZE, "adapter_out_dim": HIDDEN_SIZE},
        "audio_config": {"adapter_input_size": HIDDEN_SIZE, "adapter_out_dim": HIDDEN_SIZE},
    },
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, **_SLIDING},
    "falcon_h1": {"mamba_d_ssm": 2 * HIDDEN_SIZE, **_MAMBA_HEADS},
    "dots3_note_text": {"per_layer_config": {}},
    "gemma3n_text": {"num_kv_shared_layers": 0, "intermediate_size": 64},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {**_MAMBA_HEADS},
    "hunyuan_v1_dense": {"head_dim": HEAD_DIM},
    "hunyuan_v1_moe": {"head_dim": HEAD_DIM},
    "laguna": _SLIDING,
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"zero_expert_num": 2},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": HEAD_DIM, **_SLIDING},
    "qwen4_exp": {"text_config": _QWEN4_INDEXER},
    "qwen4_exp_text": _QWEN4_INDEXER,
    "reformer": {"axial_pos_embds_dim": [24, 40], "axial_pos_shape": [16, 16]},
    "qwen2": {"use_sliding_window": True, **_SLIDING},
    "qwen3": {"use_sliding_window": True, **_SLIDING},
    "phi3": {"sliding_window": "limit"},
    "zamba2": {"attention_hidden_size": 2 * HIDDEN_SIZE, "attention_head_dim": 2 * HEAD_DIM, "mamba_headdim": HEAD_DIM},
    "zamba": {
        "attention_hidden_size": 2 * HIDDEN_SIZE,
        "attention_head_dim": 2 * HEAD_DIM,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "num_hidden_layers": 4,
    },
    "zaya": {"num_experts_per_tok": 1},
}


def small_config(name: str, *, limit: int) -> PretrainedConfig:
    """The config of family `name` with every limit on how far a token looks set to `limit` tokens.

    Raises whatever transformers raises where the family has no default config.
    """
    config_class = CONFIG_MAPPING[name]
    return config_class(**_small_settings(config_class().to_dict(), limit, FIXES.get(name, {})))


def _small_settings(default: dict[str, Any], limit: int, fixes: dict[str, Any]) -> dict[str, Any]:
    """Overrides of a config's default fields, nested configs included; `fixes` win and may name new fields."""
    settings: dict[str, Any] = {}
    for name, value in default.items():
        if isinstance(value, dict) and "model_type" in value:
            settings[name] = _small_settings(value, limit, fixes.get(name, {}))
        elif (small := _small_value(name, value, limit)) is not None:
            settings[name] = small
    nested = settings.keys() & {name for name, value in settings.items() if isinstance(value, dict)}
    settings |= _small_layers(default)
    if (heads := settings.get("num_attention_heads")) and "num_key_value_heads" in default:
        shared = default["num_key_value_heads"] not in (None, default.get("num_attention_heads"))
        settings["num_key_value_heads"] = min(default["num_key_value_heads"], heads // 2) if shared else heads
    if default.get("qk_rope_head_dim") is not None and default.get("head_dim") == default["qk_rope_head_dim"]:
        settings["head_dim"] = settings["qk_rope_head_dim"]
    chosen = {name: limit if value == "limit" else value for name, value in fixes.items() if name not in nested}
    return settings | chosen


def _small_value(name: str, value: Any, limit: int) -> Any:
    """What a field becomes, None where it stays."""
    if name == "is_decoder":
        return True
    if isinstance(value, bool) or value is None:
        return None
    if name in _LIMITS:
        return limit
    if name == "index_topk_blocks":
        return max(1, limit // NUM_HEADS)
    if name in _WIDE:
        return _WIDE[name]
    if isinstance(value, int | float) and name.endswith(_DROPOUT):
        return type(value)(0)
    if isinstance(value, int) and name.endswith("_token_id"):
        return {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}.get(name, VOCAB_SIZE - 1)
    return _SMALL.get(name) if isinstance(value, int) else None


def _small_layers(default: dict[str, Any]) -> dict[str, Any]:
    """Fewer layers: the first of each kind where the config lists kinds, else two."""
    counts = {name: default[name] for name in _LAYERS & default.keys() if isinstance(default[name], int)}
    depth = max(counts.values(), default=0)
    lists = {name: value for name, value in default.items() if isinstance(value, list) and len(value) == depth > 0}
    kinds = {name: value for name, value in lists.items() if all(isinstance(entry, str) for entry in value)}
    chosen: list[int] = []
    seen: set[tuple[str, str]] = set()
    for layer in range(depth if kinds else 0):
        found = {(name, value[layer]) for name, value in kinds.items()}
        if found - seen and len(chosen) < _MAX_LAYERS:
            chosen.append(layer)
            seen |= found
    chosen = sorted({*chosen, *range(2)} if len(chosen) < 2 else chosen)
    return {name: [value[layer] for layer in chosen] for name, value in lists.items()} | dict.fromkeys(
        counts, len(chosen)
    )
