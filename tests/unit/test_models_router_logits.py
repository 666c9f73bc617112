"""When there is a load-balancing loss, how its parts are found out, and which tokens it counts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from eft.core.errors import ModelError
from eft.core.records import TokenSample
from eft.data.collators import PackedCollator, PaddedCollator
from eft.loss.router import load_balance
from eft.models.attention import BoundarySupport
from eft.models.router_logits import RouterLoss, _documents, find_router_loss
from tests.tiny_models import tiny_model

NATIVE = BoundarySupport("native", "", 0.0, 0.0)
MASK = BoundarySupport("mask", "", 0.0, 0.0, "causal")


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "olmoe", "phimoe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_per_token_are_read_off_the_loss(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family).to(dtype)
    found = find_router_loss(model, load_balance, 0.1, NATIVE)
    assert found is not None
    assert (found.coefficient, found.top_k) == (0.1, 2)


def test_it_is_off_unless_asked_for() -> None:
    assert find_router_loss(tiny_model("qwen3_moe"), load_balance, None, NATIVE) is None
    assert find_router_loss(tiny_model("llama"), load_balance, None, NATIVE) is None
    asking = tiny_model("qwen3_moe", output_router_logits=True, router_aux_loss_coef=0.25)
    found = find_router_loss(asking, load_balance, None, NATIVE)
    assert found is not None
    assert found.coefficient == 0.25
    assert find_router_loss(asking, load_balance, 0.0, NATIVE) is None


def test_what_cannot_be_had_is_named() -> None:
    with pytest.raises(ModelError, match="router_aux_loss_coef: LlamaForCausalLM gives no router logits"):
        find_router_loss(tiny_model("llama"), load_balance, 0.1, NATIVE)
    with pytest.raises(ModelError, match="prebuilt mask"):
        find_router_loss(tiny_model("qwen3_moe"), load_balance, 0.1, MASK)
    with pytest.raises(ModelError, match="no gradient reaches the routers under reentrant"):
        find_router_loss(tiny_model("qwen3_moe"), load_balance, 0.1, NATIVE, reentrant=True)
    with pytest.raises(ModelError, match="compiled layers do not hand out"):
        find_router_loss(tiny_model("qwen3_moe"), load_balance, 0.1, NATIVE, compiled=True)

    def twice(*arguments: Any) -> Any:
        return 2.5 * load_balance(*arguments)

    with pytest.raises(ModelError, match="not the one of Switch"):
        find_router_loss(tiny_model("qwen3_moe"), twice, 0.1, NATIVE)


def sample(length: int) -> TokenSample:
    return TokenSample(np.arange(length), np.arange(length), None)


def test_padding_and_dummies_belong_to_no_document() -> None:
    numbers, sizes = _documents(PackedCollator(pad_to=8)([[sample(2), sample(3)]]))
    assert numbers.tolist() == [0, 0, 1, 1, 1, 3, 3, 3]
    assert sizes.tolist() == [2, 3, 0]
    numbers, sizes = _documents(PackedCollator()([]))
    assert (numbers.tolist(), sizes.tolist()) == ([1, 1], [0])
    numbers, sizes = _documents(PaddedCollator(pad_token_id=0)([[sample(2)], [sample(3)]]))
    assert (numbers.tolist(), sizes.tolist()) == ([0, 0, 2, 1, 1, 1], [2, 3])
    numbers, sizes = _documents(PaddedCollator(pad_token_id=0)([]))
    assert (numbers.tolist(), sizes.tolist()) == ([1, 1], [0])


def test_documents_count_by_their_share_of_the_steps_tokens() -> None:
    batch = {**PackedCollator()([[sample(2), sample(3)]]), "step_weight": 7.0, "step_tokens": 20}
    loss = RouterLoss(lambda *_: torch.tensor([1.0, 10.0]), 0.5, 2)
    assert loss([], batch).item() == pytest.approx(0.5 * (2 * 1.0 + 3 * 10.0) / 20 * 7.0)
    assert loss([], {**batch, "step_tokens": 0}).item() == 0.0
