"""A run does not start on an attention that lets documents see each other: faults planted through transformers' own
registries, under a name that the config knows, and found by the probe when the trainer is built."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from eft.core.errors import ModelError
from eft.models.document_attention import document_attention, document_mask
from tests.families.oracle import measure
from tests.functional.conftest import MakeTrainer
from tests.tiny_models import tiny_model

LONG_WINDOW = 64
"""Longer than the probe's documents, as in real models."""


@pytest.fixture
def plant() -> Iterator[Callable[..., None]]:
    """Put an attention, and a mask function, in the place of sdpa's; afterwards sdpa is itself again."""

    def replace(attention: Any, mask: Any = document_mask) -> None:
        AttentionInterface.register("sdpa", attention)
        AttentionMaskInterface.register("sdpa", mask)

    yield replace
    replace(sdpa_attention_forward, sdpa_mask)


def ignores_boundaries_in_layer_1(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    if module.layer_idx == 1:
        kwargs["cu_seq_lens_q"] = torch.tensor([0, args[0].shape[2]], dtype=torch.int32)
    return document_attention(module, *args, **kwargs)


def shifts_boundaries(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    if (bounds := kwargs.get("cu_seq_lens_q")) is not None:
        kwargs["cu_seq_lens_q"] = torch.cat([bounds[:1], bounds[1:-1] + 1, bounds[-1:]])
    return document_attention(module, *args, **kwargs)


def forgets_the_window(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return document_attention(module, *args, **{**kwargs, "sliding_window": None})


def last_sees_first(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
    output, weights = document_attention(module, query, key, value, mask, **kwargs)
    bounds = kwargs.get("cu_seq_lens_q")
    if bounds is None or len(bounds) < 3:
        return output, weights
    first, last = int(bounds[1]), int(bounds[-2])
    seen = torch.cat([key[:, :, :first], key[:, :, last:]], 2), torch.cat([value[:, :, :first], value[:, :, last:]], 2)
    length = query.shape[2] - last
    allowed = torch.ones(length, first + length, dtype=torch.bool).tril(first)[None, None]
    leaked, _ = sdpa_attention_forward(module, query[:, :, last:], *seen, allowed, scaling=kwargs["scaling"])
    return torch.cat([output[:, :last], leaked], 1), weights


def drops_its_argument(module: nn.Module, *args: Any, cu_seq_lens_q: Any = None, **kwargs: Any) -> Any:
    return document_attention(module, *args, **kwargs)


def makes_no_masks(*args: Any, **kwargs: Any) -> None:
    """So that no prebuilt mask can take the broken attention's place."""


LEAK, ALONE = "documents see each other", "a packed document differs from the same one alone"
FAULTS: list[tuple[Any, str]] = [
    (ignores_boundaries_in_layer_1, rf"{LEAK} \(leak .*, first in model.layers.1\)"),
    (shifts_boundaries, rf"{LEAK} \(leak .*, first in model.layers.0\)"),
    (last_sees_first, rf"{LEAK} \(leak .*, first in model.layers.0\)"),
    (drops_its_argument, "the document boundaries did not reach LlamaAttention|" + LEAK),
]


@pytest.mark.parametrize(("fault", "reason"), FAULTS)
def test_a_broken_attention_stops_the_build(
    fault: Any, reason: str, plant: Callable[..., None], make_trainer: MakeTrainer
) -> None:
    plant(fault, makes_no_masks)
    with pytest.raises(ModelError, match=f"cannot keep packed documents apart.*boundaries as arguments.*: ({reason})"):
        make_trainer(model=tiny_model("llama"), attn_implementation="sdpa")


@pytest.mark.parametrize(
    ("fault", "family", "settings", "reason"),
    [
        *((fault, "llama", {}, reason) for fault, reason in FAULTS[1:]),
        (forgets_the_window, "mistral", {}, rf"{ALONE} \(.*, first in model.layers.0\)"),
        (
            forgets_the_window,
            "mistral",
            {"sliding_window": LONG_WINDOW},
            "a layer looks back None tokens by its arguments but 64 by its mask",
        ),
    ],
)
def test_a_broken_attention_is_named_and_a_mask_takes_its_place(
    fault: Any,
    family: str,
    settings: dict[str, Any],
    reason: str,
    plant: Callable[..., None],
    make_trainer: MakeTrainer,
) -> None:
    """Where the fault lies in the boundaries alone, and a prebuilt mask is proven to keep documents apart."""
    plant(fault)
    model = tiny_model(family, **settings)
    support = make_trainer(model=model, attn_implementation="sdpa").parts.forward.support
    assert support.mode == "mask"
    assert re.search(f"boundaries as arguments: ({reason})", support.reason), support.reason
    truth = measure(model, tiny_model(family, attn_implementation="eager", **settings), support)
    assert (truth.leak, truth.difference < 1e-5, truth.gradient < 1e-5) == (0.0, True, True)


def lets_the_next_token_through(*args: Any, **kwargs: Any) -> Any:
    mask = sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})
    return mask.roll(1, -1)


def starts_documents_one_late(*args: Any, **kwargs: Any) -> Any:
    mask = sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})
    return mask | mask.roll(1, -2).tril()


@pytest.mark.parametrize("mask", [lets_the_next_token_through, starts_documents_one_late])
def test_a_mask_that_is_off_by_one_stops_the_build(
    mask: Any, plant: Callable[..., None], make_trainer: MakeTrainer
) -> None:
    """Also where documents are kept apart by a prebuilt mask alone."""
    for family in ("llama", "falcon"):
        plant(sdpa_attention_forward, mask)
        with pytest.raises(ModelError, match="cannot keep packed documents apart"):
            make_trainer(model=tiny_model(family), attn_implementation="sdpa")


def test_the_same_copy_without_a_fault_is_built(plant: Callable[..., None], make_trainer: MakeTrainer) -> None:
    plant(lambda *args, **kwargs: document_attention(*args, **kwargs))
    for family in ("llama", "mistral"):
        trainer = make_trainer(model=tiny_model(family), attn_implementation="sdpa")
        assert trainer.parts.forward.support.mode == "native"
