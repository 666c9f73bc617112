"""All documents of a packed row in one call of torch's flex attention: what flash kernels lack, soft-capped scores and
sinks, without a host sync and without scores in memory. CUDA; on a CPU it runs forward only, for tests.

Shapes: H query heads, G key/value heads, T tokens, D and E head sizes of keys and of values.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention


def document_blocks(cu_seq_lens: Tensor, tokens: int, *, window: int | None, chunk: int | None) -> BlockMask:
    """Which blocks of 128 × 128 scores are needed: causal, within a document, its window, and its chunks.

    cu_seq_lens int32 [documents + 1], on the device of the run; the row has `tokens` tokens. Make one per kind of layer
    and forward: it costs more than a layer's attention.
    """
    index = torch.arange(tokens, device=cu_seq_lens.device)
    document = torch.bucketize(index, cu_seq_lens[1:], right=True)
    position = index - cu_seq_lens[document]

    def allowed(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = (document[query] == document[key]) & (query >= key)
        if window is not None:
            seen = seen & (query - key < window)
        if chunk is not None:
            seen = seen & (position[query] // chunk == position[key] // chunk)
        return seen

    # Compiled it is built block by block; plainly it would hold tokens² flags.
    return create_block_mask(allowed, None, None, tokens, tokens, cu_seq_lens.device, _compile=cu_seq_lens.is_cuda)


def flex_documents(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: BlockMask,
    *,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """query [1, H, T, D], key [1, G, T, D], value [1, G, T, E], sinks [H] → [1, T, H, E], for `document_blocks`."""

    def capped(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)  # type: ignore[operator]  # used only where set

    output, auxiliary = _kernel(query.is_cuda)(
        query,
        key,
        value,
        score_mod=None if softcap is None else capped,
        block_mask=blocks,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
        return_aux=AuxRequest(lse=True),
    )
    if sinks is not None:
        # A sink is one more score without a value: exp(l) / (exp(l) + exp(s)) of the output is left.
        kept = torch.sigmoid(auxiliary.lse - sinks.to(auxiliary.lse.dtype)[:, None])
        output = output * kept[..., None].to(output.dtype)
    result: Tensor = output.transpose(1, 2)
    return result


@lru_cache(maxsize=2)
def _kernel(compiled: bool) -> Any:
    return torch.compile(flex_attention, dynamic=True) if compiled else flex_attention
