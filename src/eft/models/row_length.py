"""What a probe of tiny documents cannot see: computations that change once a row or a document is long enough.

Read off the config by the names that transformers gives such things. A kind of layer that is not known here is a fault:
better to refuse what could be right than to let documents of real length see each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PretrainedConfig

_PLAIN_KINDS = frozenset(
    {
        *("full_attention", "sliding_attention", "chunked_attention"),
        # State that is carried along leaks from its first token on, so that a short row shows it.
        *("linear_attention", "conv", "recurrent", "hybrid", "hybrid_sliding"),
        *("mlp", "moe", "dense", "sparse"),
    }
)
_RANKING_KINDS = frozenset({"indexed_attention", "minimax_m3_sparse"})
"""Layers that keep the best tokens of the whole row: exact while they keep all of them."""
_KEPT_TOKENS = {
    "index_topk": None,
    "indexer_budget": None,
    "keep_window_size": None,
    "index_topk_blocks": "index_block_size",
}
"""How many tokens (or blocks, of the size that a second field names) such layers keep."""
_LENGTH_SCALED_ROPE = ("dynamic", "longrope")
"""Position codes that change for every token of a row once its longest document is longer than the model's own."""


def row_length_fault(config: PretrainedConfig, longest_document: int | None, longest_row: int | None) -> str | None:
    """Why rows of that length (tokens; None for any) could not be exact though a probe passes; None if all is well."""
    kinds = set(getattr(config, "layer_types", None) or ())
    if unknown := kinds - _PLAIN_KINDS - _RANKING_KINDS:
        return f"layers of kind {min(unknown)} may look at more in long rows than a probe can show"
    ranking = kinds & _RANKING_KINDS
    kept = list(_kept_tokens(config)) if ranking or not kinds else []
    if ranking and not kept:
        return f"layers of kind {min(ranking)} rank the tokens of a row, by no limit known here"
    for name, tokens in kept:
        if longest_row is None or longest_row > tokens:
            return (
                f"a layer keeps the best {tokens} tokens of the whole row (`{name}`), "
                f"so rows of more than {tokens} tokens mix documents"
            )
    for rope in _rope_settings(config):
        if rope.get("rope_type") not in _LENGTH_SCALED_ROPE:
            continue
        own = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        if longest_document is None or longest_document > own:
            return (
                f"`{rope['rope_type']}` position codes of all documents in a row change with the longest one, "
                f"if that has more than {own} tokens"
            )
    return None


def _kept_tokens(config: PretrainedConfig) -> Iterator[tuple[str, int]]:
    for name, block in _KEPT_TOKENS.items():
        count = getattr(config, name, None)
        if count:
            yield name, int(count) * (1 if block is None else int(getattr(config, block)))


def _rope_settings(config: PretrainedConfig) -> list[Mapping[str, Any]]:
    """One for the whole model, or one per kind of layer."""
    settings = getattr(config, "rope_parameters", None) or {}
    nested = [entry for entry in settings.values() if isinstance(entry, Mapping)]
    return nested or [settings]
