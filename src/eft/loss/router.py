"""Load balance of experts, for each document by itself: packing, accumulation and ranks change nothing.

D documents, T tokens of the row, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def load_balance(router_logits: Sequence[Tensor], documents: Tensor, num_documents: int, top_k: int) -> Tensor:
    """E · Σ_e f_e · P_e of each document, fp32 [D] (Fedus et al. 2021, equations 4-6, as transformers has it).

    f_e is how often a token of the document chose expert e among its `top_k`, P_e the mean probability of e; both
    are means over all tokens and layers. An even router gives `top_k`. A document without tokens gives 0.

    Args:
        router_logits: one [T, E] (or [B, L, E]) per layer with experts, any floating dtype; the softmax is fp32.
        documents: int64 [T], the document of each token; `num_documents` for tokens that belong to none.
        num_documents: D.
        top_k: experts per token.
    """
    experts = router_logits[0].shape[-1]
    dtype = torch.promote_types(router_logits[0].dtype, torch.float32)
    # One row more, for the tokens of no document.
    shape = (num_documents + 1, experts)
    chosen = torch.zeros(shape, dtype=dtype, device=documents.device)
    probability = torch.zeros(shape, dtype=dtype, device=documents.device)
    for logits in router_logits:
        flat = logits.reshape(-1, experts).to(documents.device)
        probabilities = torch.softmax(flat, -1, dtype=dtype)
        experts_of_token = probabilities.detach().topk(top_k, -1).indices
        one_hot = torch.zeros_like(probabilities, requires_grad=False).scatter_(1, experts_of_token, 1.0)
        chosen.index_add_(0, documents, one_hot)
        probability = probability.index_add(0, documents, probabilities)
    sizes = torch.bincount(documents, minlength=num_documents + 1).clamp(min=1).to(dtype)[:, None] * len(router_logits)
    return (experts * (chosen / sizes * (probability / sizes)).sum(1))[:num_documents]
