"""What is refused because only long rows would show it."""

from __future__ import annotations

import pytest

from eft.models.attention import PACKED_ATTENTION, install_attention, packing_support
from eft.models.row_length import row_length_fault
from tests.families.oracle import LENGTHS, measure
from tests.families.shrink import small_config
from tests.tiny_models import tiny_model

LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}


def test_plain_families_of_any_length_have_no_fault() -> None:
    for name in ("llama", "gemma3_text", "llama4_text", "qwen3_next", "jamba", "nemotron_h", "gpt_oss"):
        assert row_length_fault(small_config(name, limit=24).get_text_config(), None, None) is None, name


@pytest.mark.parametrize(
    ("family", "key", "limit"),
    [("deepseek_v32", "index_topk", 24), ("doge", "keep_window_size", 24), ("qwen4_exp_text", "indexer_budget", 24)],
)
def test_families_that_rank_tokens_pack_short_rows_only(family: str, key: str, limit: int) -> None:
    config = small_config(family, limit=limit)
    assert row_length_fault(config, None, limit) is None
    for row in (limit + 1, None):
        assert f"the best {limit} tokens of the whole row (`{key}`)" in str(row_length_fault(config, None, row))


def test_ranked_blocks_count_their_tokens_and_layers_without_ranking_do_not_matter() -> None:
    config = small_config("minimax_m3_vl_text", limit=24)
    tokens = config.index_topk_blocks * config.index_block_size
    assert row_length_fault(config, None, tokens) is None
    assert f"best {tokens} tokens" in str(row_length_fault(config, None, tokens + 1))
    config.layer_types = ["full_attention", "full_attention"]
    assert row_length_fault(config, None, None) is None


def test_unknown_kinds_of_layers_are_refused() -> None:
    config = small_config("llama", limit=24)
    config.layer_types = ["full_attention", "window_attention"]
    assert "layers of kind window_attention" in str(row_length_fault(config, 1, 1))
    config.layer_types = ["indexed_attention"]
    assert "by no limit known here" in str(row_length_fault(config, 1, 1))


def test_position_codes_that_follow_the_longest_document() -> None:
    """The leak is real: a short document beside a long one gets other position codes than alone."""
    settings = {"rope_parameters": LONGROPE, "original_max_position_embeddings": 16}
    stock, model = tiny_model("phi3", **settings), tiny_model("phi3", **settings)
    assert row_length_fault(model.config, 16, None) is None
    for longest in (17, None):
        assert "`longrope` position codes" in str(row_length_fault(model.config, longest, None))
    install_attention(model, PACKED_ATTENTION)
    short = packing_support(model, longest_document=16)
    assert short.mode == "native"
    assert measure(model, stock, short).difference > 1e-3, "documents of 41 and of 12 tokens"
    refused = packing_support(model, longest_document=max(LENGTHS))
    assert (refused.mode, "`longrope`" in refused.reason) == ("refused", True)


def test_dynamic_position_codes_count_from_the_models_own_length() -> None:
    config = small_config("llama", limit=24)
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    assert row_length_fault(config, config.max_position_embeddings, None) is None
    assert "`dynamic`" in str(row_length_fault(config, config.max_position_embeddings + 1, None))
    config.rope_parameters = {
        "sliding_attention": dict(config.rope_parameters),
        "full_attention": {"rope_type": "yarn"},
    }
    assert "`dynamic`" in str(row_length_fault(config, config.max_position_embeddings + 1, None))
