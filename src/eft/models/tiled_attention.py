"""Causal attention of packed documents on a CPU in bfloat16: tiles of queries, every product a large GEMM.

sdpa's own CPU kernel multiplies small blocks and reaches a tenth of the bf16 GEMM rate. Here a tile is 128 queries of
all heads that share a key head, against every key they may see. It is as exact as that kernel: scores, their gradients
and all sums are fp32, and only operands of products are bf16.

Shapes: H query heads, G key/value heads, R = H / G, T tokens of the row, D and E head sizes of keys and of values,
n queries and m keys of a tile. Rows of a tile are its queries, each with its R heads: [G, n·R, ...]. A document's last
tile is filled up with zeros, which no real token sees and whose own gradients are zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_TILE = 128
_STEP = 32
"""A tile has a multiple of so many queries. Else oneDNN makes and keeps 4 MiB of code for each new document length."""
_LOG2_E = math.log2(math.e)
"""Powers of 2 cost a quarter of powers of e."""


def tiled_attention(
    query: Tensor, key: Tensor, value: Tensor, bounds: list[int], *, scaling: float, window: int | None
) -> Tensor:
    """Each document of the row by itself, every token attending to itself and the `window` - 1 before it, or to all.

    query bf16 [1, H, T, D], key bf16 [1, G, T, D], value bf16 [1, G, T, E], bounds: 0, the end of each document, up to
    T → bf16 [1, T, H, E]. Differentiable; nothing of size T² is kept (softmax is recomputed as in FlashAttention, Dao
    et al. 2022, algorithm 4).
    """
    output: Tensor = _TiledAttention.apply(query, key, value, bounds, scaling, window)  # type: ignore[no-untyped-call]  # torch's has no types
    return output


def has_fast_products() -> bool:
    """Whether this machine's bf16 products are fast: oneDNN with 512-bit vectors (AMX, AVX512-BF16)."""
    has_onednn = torch.backends.mkldnn.is_available()
    return bool(has_onednn) and torch.backends.cpu.get_cpu_capability() == "AVX512"


# One operator to torch, so that selective activation checkpointing can keep what it gives.
@torch.library.custom_op(
    "eft::tiled_attention",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor query, Tensor key, Tensor value, int[] bounds, float scaling, int? window) -> (Tensor, Tensor)",
)
def _forward(
    query: Tensor, key: Tensor, value: Tensor, bounds: list[int], scaling: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """Output bf16 [1, T, H, E], and the logarithms of the sums of each softmax, fp32 [G, T, R, 1]."""
    heads, groups, tokens = query.shape[1], key.shape[1], query.shape[2]
    output = query.new_empty(tokens, groups, heads // groups, value.shape[-1])
    log_sums = query.new_empty(groups, tokens, heads // groups, 1, dtype=torch.float32)
    with _bf16_products():
        for low, high in pairwise(bounds):
            keys, values = _rows(key, groups, low, high), _rows(value, groups, low, high)
            for first, start, stop, end in _tiles(low, high, window):
                seen, count = slice(first - low, end - low), stop - start
                queries = _rows(query, groups, start, stop)
                scores = _scores(queries, keys[:, seen], scaling, (first, start, end), window)
                largest = scores.amax(-1, keepdim=True)
                weights = scores.sub_(largest).exp2_()
                sums = weights.sum(-1, keepdim=True)
                torch.div(
                    _by_token(torch.bmm(weights, values[:, seen]), end - start)[:count],
                    _by_token(sums, end - start)[:count],
                    out=output[start:stop],
                )
                log_sums[:, start:stop] = (sums.log2_() + largest).view(groups, end - start, -1, 1)[:, :count]
    return output.view(1, tokens, heads, -1), log_sums


class _TiledAttention(torch.autograd.Function):
    @staticmethod
    # No autocast inside: sums stay fp32.
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.bfloat16)  # type: ignore[untyped-decorator]  # torch's has no types
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, bounds: list[int], scaling: float, window: int | None
    ) -> Tensor:
        output: Tensor
        output, log_sums = _forward(query, key, value, bounds, scaling, window)
        ctx.save_for_backward(query, key, value, log_sums)
        ctx.bounds, ctx.scaling, ctx.window = bounds, scaling, window
        return output

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")  # type: ignore[untyped-decorator]  # torch's has no types
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, log_sums = ctx.saved_tensors
        heads, groups, tokens = query.shape[1], key.shape[1], query.shape[2]
        gradient = gradient.transpose(1, 2)
        d_query = query.new_empty(tokens, groups, heads // groups, query.shape[-1])
        d_key, d_value = (tensor.new_empty(tokens, groups, tensor.shape[-1]) for tensor in (key, value))
        with _bf16_products():
            for low, high in pairwise(ctx.bounds):
                keys, values = _rows(key, groups, low, high), _rows(value, groups, low, high)
                half_keys = keys.bfloat16()
                sum_key, sum_value = torch.zeros_like(keys), torch.zeros_like(values)
                for first, start, stop, end in _tiles(low, high, ctx.window):
                    seen = slice(first - low, end - low)
                    queries, upper = _rows(query, groups, start, stop), _rows(gradient, groups, start, stop)
                    weights = _scores(queries, keys[:, seen], ctx.scaling, (first, start, end), ctx.window)
                    sums = log_sums[:, start:stop].reshape(groups, -1, 1)
                    weights.sub_(F.pad(sums, (0, 0, 0, weights.shape[1] - sums.shape[1]))).exp2_()
                    half = weights.bfloat16()
                    sum_value[:, seen] += torch.bmm(half.transpose(1, 2), upper.bfloat16())
                    # softmax backward, w·(d - Σ w·d): from fp32 weights, not from the output's rounded values.
                    d_scores = torch.bmm(upper, values[:, seen].transpose(1, 2)).mul_(weights)
                    d_scores.addcmul_(weights, d_scores.sum(-1, keepdim=True), value=-1.0)
                    half.copy_(d_scores)
                    sum_key[:, seen] += torch.bmm(half.transpose(1, 2), queries.bfloat16())
                    product = _product(half, half_keys[:, seen], ctx.scaling)
                    d_query[start:stop] = _by_token(product, end - start)[: stop - start]
                torch.mul(sum_key[:, : high - low].transpose(0, 1), ctx.scaling, out=d_key[low:high])
                d_value[low:high] = sum_value[:, : high - low].transpose(0, 1)
        d_query = d_query.view(1, tokens, heads, -1).transpose(1, 2)
        return d_query, d_key[None].transpose(1, 2), d_value[None].transpose(1, 2), None, None, None


def _tiles(low: int, high: int, window: int | None) -> Iterator[tuple[int, int, int, int]]:
    """(first key, first query, end of both, and their end once filled up) of each tile of the document [low, high)."""
    for start in range(low, high, _TILE):
        stop = min(start + _TILE, high)
        yield low if window is None else max(low, start - window + 1), start, stop, start + _filled(stop - start)


def _filled(length: int) -> int:
    return -(-length // _STEP) * _STEP


def _rows(tensor: Tensor, groups: int, start: int, stop: int) -> Tensor:
    """[1, heads, T, D] → float32 [G, n·heads/G, D], contiguous; n ≥ stop - start, zeros at the end."""
    heads, size, length = tensor.shape[1], tensor.shape[-1], stop - start
    rows = tensor.new_empty(groups, _filled(length), heads // groups, size, dtype=torch.float32)
    rows[:, :length] = tensor[0, :, start:stop].reshape(groups, -1, length, size).transpose(1, 2)
    rows[:, length:] = 0
    return rows.view(groups, -1, size)


def _by_token(rows: Tensor, length: int) -> Tensor:
    """[G, length·R, D] → [length, G, R, D], as the row's outputs lie in memory."""
    return rows.view(rows.shape[0], length, -1, rows.shape[-1]).transpose(0, 1)


def _scores(queries: Tensor, keys: Tensor, scaling: float, tile: tuple[int, int, int], window: int | None) -> Tensor:
    """float32 [G, n·R, m]: scaled scores in powers of two, -inf where a query must not look."""
    first, start, stop = tile
    scores = _product(queries, keys.transpose(1, 2), scaling * _LOG2_E)
    by_query = scores.view(scores.shape[0], stop - start, -1, stop - first)
    by_query[..., start - first :] += queries.new_full((stop - start, stop - start), -torch.inf).triu(1)[:, None]
    if window is not None and stop - first > window:
        early = queries.new_full((stop - start, stop - first), -torch.inf).tril(start - window - first)
        by_query += early[:, None]
    return scores


def _product(left: Tensor, right: Tensor, factor: float) -> Tensor:
    """factor · left @ right, multiplied before anything is rounded."""
    return torch.baddbmm(left.new_zeros(()), left, right, beta=0, alpha=factor)


@contextmanager
def _bf16_products() -> Iterator[None]:
    """Products of fp32 tensors take their operands in bf16 (exact for what was bf16 before) and sum in fp32."""
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # a property of the module, made at run time
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before
