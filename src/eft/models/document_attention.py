"""Attention of packed rows, document by document, as an attention function that transformers knows by name.

Shapes: B rows (1 for a packed row), H query heads, G key/value heads, T tokens of a row, L tokens of a document,
D head dimension. Queries are [B, H, T, D], keys and values [B, G, T, D]; what is returned is [B, T, H, D].
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from eft.core.errors import ModelError
from eft.models.attention_record import AttentionCall, current_record
from eft.models.flex_documents import document_blocks, flex_documents
from eft.models.tiled_attention import has_fast_products, tiled_attention

PACKED_ATTENTION = "eft"
"""The name under which the attention and its mask function are registered."""

NO_MASK = torch.empty((1, 1, 0, 0), dtype=torch.bool)
"""Passed as `attention_mask` beside boundaries: a mask of four dimensions is ready-made to transformers, which else
looks for documents in `position_ids` and makes the host wait for the device."""

_REFUSED_ARGUMENTS = ("position_bias", "indices", "block_indices")
"""What some families hand to their attention that depends on positions in the whole row."""
_MAX_FLASH_HEAD_DIM = 256
_MIN_FLEX_HEAD_DIM = 16


@dataclass
class _PackedForward:
    """State of the packed forward that is under way."""

    without_mask: bool = False
    """A mask was left out, so every attention layer must receive the boundaries."""
    blocks: dict[tuple[int | None, int | None], Any] = field(default_factory=dict)
    """Block masks of flex attention by (window, chunk), made by the first layer that needs them."""


_packed: ContextVar[_PackedForward | None] = ContextVar("eft_packed_forward", default=None)


@contextmanager
def packed_forward() -> Iterator[None]:
    """While active, models that use our attention build no mask for unpadded rows: `cu_seq_lens_q` say it all.

    Enter it once per forward. A padded batch or a prebuilt mask is used as always.
    """
    token = _packed.set(_PackedForward())
    try:
        yield
    finally:
        _packed.reset(token)


def register() -> None:
    """Make `PACKED_ATTENTION` known to transformers, attention and mask both (alone, padding masks would vanish)."""
    AttentionInterface.register(PACKED_ATTENTION, document_attention)
    AttentionMaskInterface.register(PACKED_ATTENTION, document_mask)


def document_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """transformers' sdpa mask (bool [B, 1, T, T] or None), or None inside `packed_forward()` for an unpadded row."""
    forward = _packed.get()
    if forward is not None and kwargs.get("attention_mask") is None:
        forward.without_mask = True
        return None
    record = current_record()
    if record is None:
        return sdpa_mask(*args, **kwargs)  # type: ignore[no-any-return]
    mask: Tensor | None = sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})
    if mask is None:  # attention in both directions, where nothing is hidden
        return None
    record.kept.append(mask)
    record.masks[mask.untyped_storage().data_ptr()] = kwargs.get("local_size")
    return mask


# The documents' lengths are read on the host, which no graph can hold.
@torch.compiler.disable  # type: ignore[untyped-decorator]  # torch's has no types
def document_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Each document by itself where `cu_seq_lens_q` (int32 [documents + 1]) is given, else transformers' sdpa.

    query [B, H, T, D], key and value [B, G, T, D] → [B, T, H, D]. Raises ModelError where the model asks for something
    that cannot be computed per document.
    """
    chunk = _chunk_of(module)
    forward = _packed.get()
    needs_boundaries = forward is not None and forward.without_mask
    if attention_mask is not None and attention_mask.shape == NO_MASK.shape:
        attention_mask, needs_boundaries = None, True
    if (record := current_record()) is not None:
        address = None if attention_mask is None else attention_mask.untyped_storage().data_ptr()
        span = sliding_window if sliding_window is not None else chunk
        record.calls.append(AttentionCall(id(module), cu_seq_lens_q is not None, span, address))
    if cu_seq_lens_q is None:
        if attention_mask is None and needs_boundaries:
            raise ModelError(
                f"packing: the document boundaries did not reach {type(module).__name__}; "
                "this model does not hand its keyword arguments on to its attention layers"
            )
        if softcap is None and s_aux is None:
            stock: tuple[Tensor, None] = sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
            )
            return stock
        causal = _is_causal(module, is_causal)
        layer = _Layer(module, dropout, scaling, None, None, softcap, s_aux)
        return _eager(layer, query, key, value, attention_mask, causal=causal), None

    if attention_mask is not None and forward is not None:
        raise ModelError(f"packing: {type(module).__name__} makes a mask of its own beside the document boundaries")
    _refuse_what_spans_documents(module, query, key, is_causal, kwargs)
    layer = _Layer(module, dropout, scaling, sliding_window, chunk, softcap, s_aux)
    if layer.runs_on_flash(query, value):
        longest = int(max_length_q) if max_length_q is not None else query.shape[2]
        return _flash(layer, query, key, value, cu_seq_lens_q, longest), None
    if layer.runs_on_flex(query):
        return _flex(layer, query, key, value, cu_seq_lens_q), None
    return _per_document(layer, query, key, value, cu_seq_lens_q.tolist()), None


@dataclass(frozen=True)
class _Layer:
    """What one attention layer asks for beside queries, keys and values."""

    module: nn.Module
    dropout: float
    scaling: float | None
    window: int | None
    chunk: int | None
    softcap: float | None
    sinks: Tensor | None

    def runs_on_flash(self, query: Tensor, value: Tensor) -> bool:
        """Whether a variable-length flash kernel on this machine computes exactly this layer."""
        dtype = _kernel_dtype(query)
        head_dim = query.shape[-1]
        return (
            query.is_cuda
            and dtype in (torch.float16, torch.bfloat16)
            and self.sinks is None
            and head_dim % 8 == 0
            and value.shape[-1] <= head_dim <= _MAX_FLASH_HEAD_DIM
            and torch.cuda.get_device_capability(query.device) >= (8, 0)
            and (not self.needs_flash_package() or find_spec("flash_attn") is not None)
        )

    def runs_on_flex(self, query: Tensor) -> bool:
        """Whether flex attention computes this layer, which no flash kernel here can: soft-capped scores, or sinks."""
        special = self.softcap is not None or self.sinks is not None
        half = _kernel_dtype(query) in (torch.float16, torch.bfloat16)
        return special and half and query.is_cuda and self.dropout == 0 and query.shape[-1] >= _MIN_FLEX_HEAD_DIM

    def runs_in_tiles(self, query: Tensor) -> bool:
        """Whether this layer is plain softmax in bf16 on a CPU that multiplies bf16 fast."""
        plain = self.dropout == 0 and self.softcap is None and self.sinks is None
        on_cpu = query.device.type == "cpu" and has_fast_products()
        return plain and on_cpu and _kernel_dtype(query) == torch.bfloat16

    def needs_flash_package(self) -> bool:
        """torch's own kernel has neither dropout nor soft-capping; the flash-attn package has both."""
        return self.dropout > 0 or self.softcap is not None


def _is_causal(module: nn.Module, is_causal: bool | None) -> bool:
    """The argument where given, else the module's own word, as in transformers' sdpa."""
    return bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal


def _refuse_what_spans_documents(
    module: nn.Module, query: Tensor, key: Tensor, is_causal: bool | None, kwargs: dict[str, Any]
) -> None:
    name = type(module).__name__
    for argument in _REFUSED_ARGUMENTS:
        if kwargs.get(argument) is not None:
            raise ModelError(f"packing: {name} passes `{argument}` to its attention, which spans documents")
    if not _is_causal(module, is_causal):
        raise ModelError(f"packing: {name} attends in both directions; only causal attention can be packed")
    if query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        raise ModelError(
            f"packing: {name} needs one row without a KV cache, but got queries {list(query.shape)} and keys "
            f"{list(key.shape)} (rows, heads, tokens, head size)"
        )


def _per_document(layer: _Layer, query: Tensor, key: Tensor, value: Tensor, bounds: list[int]) -> Tensor:
    """Documents of equal length share one call: their number of calls, not their number, costs time on a CPU."""
    if bounds[-1] != query.shape[2]:
        raise ModelError(
            f"packing: the boundaries end at token {bounds[-1]} of a row of {query.shape[2]} tokens; "
            "padding at the end must be a document of its own"
        )
    if layer.chunk is not None:
        bounds = _split_chunks(bounds, layer.chunk)
    if layer.runs_in_tiles(query):
        scaling = query.shape[-1] ** -0.5 if layer.scaling is None else layer.scaling
        q, k, v = (tensor.bfloat16() for tensor in (query, key, value))
        return tiled_attention(q, k, v, bounds, scaling=scaling, window=layer.window)
    lengths = [end - start for start, end in pairwise(bounds)]
    if len(lengths) == 1:
        return _documents_of_one_length(layer, query, key, value)
    # One split of the whole row: its backward is one concatenation, while a slice per document would each fill a
    # whole row with zeros.
    parts = [torch.split(tensor, lengths, dim=2) for tensor in (query, key, value)]
    groups: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        groups.setdefault(length, []).append(index)
    outputs: list[Tensor] = [query] * len(lengths)
    for members in groups.values():
        q, k, v = (torch.cat([part[i] for i in members]) if len(members) > 1 else part[members[0]] for part in parts)
        for index, output in zip(members, torch.split(_documents_of_one_length(layer, q, k, v), 1), strict=True):
            outputs[index] = output
    return torch.cat(outputs, dim=1)


def _documents_of_one_length(layer: _Layer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """[documents, H, L, D] → [documents, L, H, D], each document attending to itself only."""
    length = query.shape[2]
    mask: Tensor | None = None
    if layer.window is not None and layer.window < length:
        index = torch.arange(length, device=query.device)
        distance = index[:, None] - index[None, :]
        mask = ((distance >= 0) & (distance < layer.window))[None, None]
    if layer.softcap is not None or layer.sinks is not None:
        return _eager(layer, query, key, value, mask, causal=True)
    output: Tensor = sdpa_attention_forward(
        layer.module, query, key, value, mask, layer.dropout, layer.scaling, is_causal=True
    )[0]
    return output


def _eager(layer: _Layer, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, causal: bool) -> Tensor:
    """Attention with soft-capped scores and sinks ([H] extra logits without a value), which sdpa does not have.

    query [B, H, T, D], key and value [B, G, S, D], mask bool (True = attend) or additive [B, 1, T, S], or None →
    [B, T, H, D]. Scores and softmax are fp32 at least.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    scores = query @ key.transpose(2, 3)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    scores = scores * (query.shape[-1] ** -0.5 if layer.scaling is None else layer.scaling)
    if layer.softcap is not None:
        scores = layer.softcap * torch.tanh(scores / layer.softcap)
    if mask is None and causal and query.shape[2] > 1:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        # The lowest number instead of -inf: a padding row that sees nothing must not become NaN.
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    if layer.sinks is not None:
        sinks = layer.sinks.to(scores.dtype).view(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
        scores = torch.cat([scores, sinks], dim=-1)
    probabilities = scores.softmax(dim=-1)[..., : key.shape[2]].to(value.dtype)
    if layer.dropout > 0:
        probabilities = F.dropout(probabilities, p=layer.dropout)
    return (probabilities @ value).transpose(1, 2).contiguous()


def _flash(layer: _Layer, query: Tensor, key: Tensor, value: Tensor, cu_seq_lens: Tensor, longest: int) -> Tensor:
    """All documents in one call of a variable-length kernel (CUDA, half precision)."""
    if layer.chunk is not None and layer.chunk < longest:
        finer = _split_chunks(cu_seq_lens.tolist(), layer.chunk)
        cu_seq_lens = torch.tensor(finer, dtype=torch.int32, device=query.device)
        longest = layer.chunk
    dtype, head_dim, value_dim = _kernel_dtype(query), query.shape[-1], value.shape[-1]
    if value_dim < head_dim:
        value = F.pad(value, (0, head_dim - value_dim))
    # [1, H, T, D] → [T, H, D]. Autocast knows neither kernel, and norms on queries may have left fp32 behind.
    q, k, v = (tensor[0].transpose(0, 1).to(dtype) for tensor in (query, key, value))
    # A window of w tokens is the token itself and w - 1 before it. (-1, 0) is plain causal.
    window = (layer.window - 1 if layer.window is not None and layer.window < longest else -1, 0)
    if layer.needs_flash_package():
        output = _flash_package()(
            q,
            k,
            v,
            cu_seq_lens,
            cu_seq_lens,
            longest,
            longest,
            dropout_p=layer.dropout,
            softmax_scale=layer.scaling,
            causal=True,
            window_size=window,
            softcap=layer.softcap or 0.0,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
    else:
        output = varlen_attn(
            q,
            k,
            v,
            cu_seq_lens,
            cu_seq_lens,
            longest,
            longest,
            scale=layer.scaling,
            window_size=window,
            enable_gqa=q.shape[1] != k.shape[1],
        )
    assert isinstance(output, Tensor)
    return output[..., :value_dim].unsqueeze(0)


def _flex(layer: _Layer, query: Tensor, key: Tensor, value: Tensor, cu_seq_lens: Tensor) -> Tensor:
    """All documents in one call, where scores are soft-capped or have sinks (CUDA, half precision)."""
    forward, kind = _packed.get(), (layer.window, layer.chunk)
    made = {} if forward is None else forward.blocks
    if kind not in made:
        made[kind] = document_blocks(cu_seq_lens, query.shape[2], window=layer.window, chunk=layer.chunk)
    q, k, v = (tensor.to(_kernel_dtype(query)) for tensor in (query, key, value))
    scaling, softcap, sinks = layer.scaling, layer.softcap, layer.sinks
    return flex_documents(q, k, v, made[kind], scaling=scaling, softcap=softcap, sinks=sinks)


@lru_cache(maxsize=1)
def _flash_package() -> Any:
    # Imported on first use only: the package exists on some CUDA machines alone.
    return import_module("flash_attn").flash_attn_varlen_func


def _kernel_dtype(query: Tensor) -> torch.dtype:
    kind = query.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype


def _split_chunks(bounds: list[int], chunk: int) -> list[int]:
    """Chunked attention (Llama 4) never crosses a multiple of `chunk` in a document: such chunks are documents."""
    starts = [start for low, high in pairwise(bounds) for start in range(low, high, chunk)]
    return [*starts, bounds[-1]]


def _chunk_of(module: nn.Module) -> int | None:
    """The chunk size of a layer that its config calls chunked: transformers says so only in the mask it builds."""
    config = getattr(module, "config", None)
    kinds = getattr(config, "layer_types", None)
    index = getattr(module, "layer_idx", None)
    if kinds is None or index is None or kinds[index] != "chunked_attention":
        return None
    chunk = getattr(config, "attention_chunk_size", None)
    return None if chunk is None else int(chunk)
