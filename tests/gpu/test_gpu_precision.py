"""On an accelerator: stochastic rounding is right on average there too, compiled layers give the same step, and experts
follow autocast.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from eft.config.kernels import KernelConfig
from eft.models.attention import boundary_inputs, install_attention, packed_forward, packing_support
from eft.models.compile import compile_layers
from eft.optim.bf16 import round_stochastically
from tests.tiny_models import VOCAB_SIZE, tiny_model
from tests.unit.test_models_experts import FAMILIES, check_follows_autocast

pytestmark = pytest.mark.gpu

LENGTHS = [(40, 25, 63), (128,), (5, 5, 90)]


def test_rounding_is_right_on_average() -> None:
    shares = torch.arange(0, 9, device="cuda") / 8
    values = (1 + shares * 2.0**-7).repeat(40_000, 1)
    draws = torch.empty_like(values, dtype=torch.bfloat16)
    round_stochastically(values, out=draws, seed=3)
    error = (draws.double().mean(0) - values[0].double()).abs()
    spread = 2.0**-7 * (shares * (1 - shares) / 40_000).sqrt()
    assert bool((error <= 4 * spread.double()).all())
    again = torch.empty_like(draws)
    round_stochastically(values, out=again, seed=3)
    assert torch.equal(again, draws)


def packed_row(lengths: tuple[int, ...]) -> dict[str, Any]:
    total = sum(lengths)
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).cuda()
    return {
        "input_ids": torch.randint(3, VOCAB_SIZE, (1, total), generator=torch.Generator().manual_seed(total)).cuda(),
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None].cuda(),
        **dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), bounds),
        **dict.fromkeys(("max_length_q", "max_length_k"), max(lengths)),
    }


@pytest.mark.parametrize("recomputed", [False, True])
def test_compiled_layers_give_the_same_gradients(recomputed: bool) -> None:
    model = tiny_model("llama", hidden_size=64, head_dim=16).cuda()
    install_attention(model, "eft")
    support = packing_support(model)
    if recomputed:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})

    def gradients(row: dict[str, Any]) -> torch.Tensor:
        model.zero_grad()
        with packed_forward():
            logits = model(**boundary_inputs(support, model, row), use_cache=False).logits
        logits.float().logsumexp(-1).mean().backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])

    rows = [packed_row(lengths) for lengths in LENGTHS]
    plain = [gradients(row) for row in rows]
    compile_layers(model, KernelConfig(torch_compile=True), recomputed=recomputed)
    for row, expected in zip(rows, plain, strict=True):
        assert float((gradients(row) - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_follow_autocast(family: str) -> None:
    check_follows_autocast(tiny_model(family).cuda())
