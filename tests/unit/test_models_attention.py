"""E1 on tiny models of many families: packed rows, stock behaviour without boundaries, and how leaks are found."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from eft.core.errors import ModelError
from eft.loss.head import trainable_token_loss
from eft.models import attention
from eft.models import document_attention as attention_kernels
from eft.models.attention import (
    PACKED_ATTENTION,
    BoundarySupport,
    base_of,
    boundary_inputs,
    install_attention,
    packed_forward,
    packing_support,
)
from eft.models.attention_record import AttentionCall, record_attention
from eft.models.document_attention import document_attention
from eft.models.probes import boundary_probe
from tests.tiny_models import VOCAB_SIZE, WINDOW, tiny_model

# peft 0.21 reads transformers' old name of this property when it wraps a model.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

NATIVE_FAMILIES = [
    "llama", "qwen2", "qwen3", "qwen3_moe", "mistral", "mixtral", "deepseek_v3", "gemma2", "gemma3_text", "phi3",
    "olmo2", "gpt_neox", "smollm3", "granite", "cohere2", "gpt_oss", "llama4_text",
]  # fmt: skip
WITH_EXPERTS = {"qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss"}
LENGTHS = (5, 1, 9, 5, 12)
"""Equal and unequal documents, one of a single token, some longer than the window."""
BLIND = "test_ignores_boundaries"
BLIND_IN_LAYER_1 = "test_ignores_boundaries_in_layer_1"


def documents(lengths: tuple[int, ...] = LENGTHS, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB_SIZE, (length,), generator=generator) for length in lengths]


def packed_batch(ids: list[Tensor]) -> dict[str, Any]:
    """The collator's batch for documents end to end; the last position of each document has no target."""
    lengths = [len(document) for document in ids]
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    targets = torch.cat([torch.cat([document[1:], torch.tensor([-100])]) for document in ids])
    return {
        "input_ids": torch.cat(ids)[None],
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "shift_labels": targets[None],
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
        "seq_idx": torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).int()[None],
    }


def packed_logits(model: nn.Module, support: BoundarySupport, ids: list[Tensor]) -> Tensor:
    inputs = boundary_inputs(support, model, packed_batch(ids))
    with packed_forward():
        return model(**inputs, use_cache=False).logits[0]


def summed_loss(logits: Tensor, targets: Tensor) -> Tensor:
    trained = targets != -100
    return trainable_token_loss(logits[trained], targets[trained])


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_gradients_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """E2: ‖Δ‖ ≤ 1e-5 · max(‖g_t‖, 1e-3 ‖g‖) for every tensor."""
    assert ours.keys() == theirs.keys()
    total = torch.stack([gradient.norm() for gradient in theirs.values()]).norm()
    for name, gradient in theirs.items():
        limit = 1e-5 * max(gradient.norm(), 1e-3 * total)
        assert (ours[name] - gradient).norm() <= limit, name


@pytest.mark.parametrize("family", NATIVE_FAMILIES)
def test_packed_row_equals_documents_alone(family: str) -> None:
    """E1 against the family's stock attention, one document at a time: logits, leak, gradients."""
    ids = documents()
    stock = tiny_model(family)
    model = tiny_model(family)
    install_attention(model, PACKED_ATTENTION)
    support = packing_support(model)
    assert support.mode == "native", support.reason

    alone = [stock(input_ids=document[None], use_cache=False).logits[0] for document in ids]
    packed = packed_logits(model, support, ids)
    scale = torch.cat(alone).abs().max()
    assert (packed - torch.cat(alone)).abs().max() <= 1e-5 * scale

    targets = packed_batch(ids)["shift_labels"][0]
    loss = summed_loss(packed, targets)
    parts = [summed_loss(logits, part) for logits, part in zip(alone, targets.split(LENGTHS), strict=True)]
    loss.backward()
    torch.stack(parts).sum().backward()
    assert loss.item() == pytest.approx(sum(part.item() for part in parts), rel=1e-6)
    assert_gradients_equal(gradients(model), gradients(stock))

    perturbed = [(document + 1) % VOCAB_SIZE if i == 2 else document for i, document in enumerate(ids)]
    change = (packed_logits(model, support, perturbed) - packed).detach().abs().split(LENGTHS)
    assert change[2].max() > 0.01 * scale
    leak = max(float(part.max()) for i, part in enumerate(change) if i != 2)
    assert leak <= (1e-6 * scale if family in WITH_EXPERTS else 0.0)


@pytest.mark.parametrize("family", NATIVE_FAMILIES)
def test_without_boundaries_it_is_stock(family: str) -> None:
    """Left-padded batches and generation with a KV cache give what the family's stock attention gives."""
    ids = torch.stack([documents((14,))[0], documents((14,), seed=2)[0]])
    padding = torch.ones_like(ids)
    padding[0, :6] = 0
    ids[0, :6] = 0
    stock, model = tiny_model(family).eval(), tiny_model(family).eval()
    install_attention(model, PACKED_ATTENTION)
    positions = (padding.cumsum(-1) - 1).clamp_min(0)
    batch = {"input_ids": ids, "attention_mask": padding, "position_ids": positions}
    with torch.no_grad():
        expected = stock(**batch).logits[padding.bool()]
        assert torch.allclose(model(**batch).logits[padding.bool()], expected, atol=1e-5 * expected.abs().max())
        with packed_forward():  # a padded batch keeps its mask there too
            assert torch.allclose(model(**batch).logits[padding.bool()], expected, atol=1e-5 * expected.abs().max())
    arguments = {"input_ids": ids, "attention_mask": padding, "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(**arguments), stock.generate(**arguments))


def test_stock_sdpa_is_called_bit_for_bit() -> None:
    ids = documents((20,))[0][None]
    stock, model = tiny_model("llama").eval(), tiny_model("llama", attn_implementation="sdpa").eval()
    install_attention(model, PACKED_ATTENTION)
    assert torch.equal(model(input_ids=ids).logits, stock(input_ids=ids).logits)


def test_families_without_registered_attention_use_a_prebuilt_mask_or_are_refused() -> None:
    falcon = tiny_model("falcon")
    install_attention(falcon, PACKED_ATTENTION)
    support = packing_support(falcon)
    assert (support.mode, support.leak) == ("mask", 0.0)
    ids = documents()
    alone = torch.cat([falcon(input_ids=document[None], use_cache=False).logits[0] for document in ids])
    assert (packed_logits(falcon, support, ids) - alone).abs().max() <= 1e-5 * alone.abs().max()
    for family in ("bloom", "mamba2"):
        model = tiny_model(family)
        install_attention(model, PACKED_ATTENTION)
        support = packing_support(model)
        assert support.mode == "refused"
        assert "documents see each other" in support.reason
        with pytest.raises(ModelError, match="cannot be packed"):
            boundary_inputs(support, model, packed_batch(documents()))


def test_masks_per_layer_type_where_the_model_ignores_positions() -> None:
    """gpt-oss builds its masks without position ids: with its stock attention only prebuilt masks are right."""
    model = tiny_model("gpt_oss", attn_implementation="eager")
    support = packing_support(model)
    assert (support.mode, support.mask_form) == ("mask", "by_layer_type")
    ids = documents()
    alone = torch.cat([model(input_ids=document[None], use_cache=False).logits[0] for document in ids])
    assert (packed_logits(model, support, ids) - alone).abs().max() <= 1e-5 * alone.abs().max()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_stock_implementations_pass_by_position_ids(implementation: str) -> None:
    model = tiny_model("mistral", attn_implementation=implementation)
    support = packing_support(model)
    assert (support.mode, support.leak) == ("native", 0.0)


def _blind(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
    kwargs = {name: kwargs[name] for name in ("dropout", "scaling")}
    return sdpa_attention_forward(module, query, key, value, None, **kwargs)


def _blind_in_layer_1(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return (_blind if module.layer_idx == 1 else document_attention)(module, *args, **kwargs)


@pytest.fixture(scope="module", autouse=True)
def _broken_attentions() -> None:
    AttentionInterface.register(BLIND, _blind)
    AttentionInterface.register(BLIND_IN_LAYER_1, _blind_in_layer_1)
    for name in (BLIND, BLIND_IN_LAYER_1):
        AttentionMaskInterface.register(name, lambda *args, **kwargs: None)


@pytest.mark.parametrize("implementation", [BLIND, BLIND_IN_LAYER_1])
def test_attention_that_ignores_boundaries_is_caught(implementation: str) -> None:
    model = tiny_model("llama")
    install_attention(model, implementation)
    support = packing_support(model)
    assert support.mode == "refused"
    assert support.leak > 1e-3
    result = boundary_probe(model, BoundarySupport("native", "assumed", 0.0, 0.0))
    assert result.status == "fail"
    assert "documents see each other" in result.detail


def test_layer_that_skips_our_function_or_misstates_its_window_is_refused() -> None:
    """What logits of tiny documents cannot show: too few calls, and a window longer than the probe's documents."""
    model = tiny_model("mistral")
    install_attention(model, PACKED_ATTENTION)
    measured = attention.measure_boundaries(model, BoundarySupport("native", "", 0.0, 0.0))
    assert attention._call_fault(model.config, measured) is None
    assert {call.span for call in measured.alone.calls} == {WINDOW} == set(measured.alone.masks.values())
    kept = measured.packed.calls[1:]
    measured.packed.calls[:] = kept[:1]
    assert "1 of 2 attention layers" in str(attention._call_fault(model.config, measured))
    measured.packed.calls[:] = kept * 2
    honest = measured.alone.calls[0]
    measured.alone.calls[0] = AttentionCall(honest.module, honest.bounded, None, honest.mask)
    assert "looks back None tokens" in str(attention._call_fault(model.config, measured))
    measured.alone.calls[:] = [AttentionCall(honest.module, honest.bounded, None, None)]
    assert "no layer names it" in str(attention._call_fault(model.config, measured))


def test_real_windows_are_longer_than_the_probe() -> None:
    """OLMoE hands its layers a window that its masks do not have, Phi-MoE the other way round: only masks are right."""
    for family, form in (("olmoe", "causal"), ("phimoe", "by_config")):
        model = tiny_model(family, sliding_window=64)
        install_attention(model, PACKED_ATTENTION)
        support = packing_support(model)
        assert (support.mode, support.mask_form) == ("mask", form), support.reason
        assert "64" in support.reason
        plain = tiny_model(family, sliding_window=None)
        install_attention(plain, PACKED_ATTENTION)
        assert packing_support(plain).mode == "native"
    falcon = tiny_model("falcon")
    falcon.config.sliding_window = 64
    assert packing_support(falcon).mask_form == "by_config"
    unrecorded = attention.measure_boundaries(falcon, BoundarySupport("mask", "", 0.0, 0.0, "causal"))
    assert "look-back of 64 tokens" in str(attention._mask_fault(falcon.config, "causal", unrecorded))
    assert attention._mask_fault(falcon.config, "by_config", unrecorded) is None


@pytest.mark.parametrize(
    ("family", "reason"),
    [("stablelm", "boundaries did not reach StableLmAttention"), ("doge", "DogeAttention makes a mask of its own")],
)
def test_layers_that_cannot_use_boundaries_get_a_prebuilt_mask(family: str, reason: str) -> None:
    model = tiny_model(family)
    install_attention(model, PACKED_ATTENTION)
    support = packing_support(model, longest_row=512)
    assert (support.mode, support.leak) == ("mask", 0.0)
    assert reason in support.reason


def test_foreign_peft_model() -> None:
    """D6: an eager Llama wrapped by peft elsewhere."""
    foreign = get_peft_model(
        tiny_model("llama", attn_implementation="eager"),
        LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
    )
    ids = documents()
    alone = torch.cat([foreign(input_ids=document[None]).logits[0] for document in ids])
    install_attention(foreign, PACKED_ATTENTION)
    assert base_of(foreign).config._attn_implementation == PACKED_ATTENTION
    support = packing_support(foreign)
    assert (support.mode, support.leak) == ("native", 0.0)
    packed = packed_logits(foreign, support, ids)
    assert (packed - alone).abs().max() <= 1e-5 * alone.abs().max()
    positions = torch.tensor([0, 5, 20])
    inputs = boundary_inputs(support, foreign, packed_batch(ids))
    with packed_forward():
        kept = foreign(**inputs, use_cache=False, logits_to_keep=positions).logits[0]
    assert torch.allclose(kept, packed[positions], atol=1e-6)


def test_no_mask_is_built_inside_packed_forward() -> None:
    model = tiny_model("gemma3_text")
    install_attention(model, PACKED_ATTENTION)
    support = packing_support(model)
    assert support.passes_no_mask
    for each in (support, replace(support, passes_no_mask=False)):
        inputs = boundary_inputs(each, model, packed_batch(documents()))
        with record_attention() as record, packed_forward():
            model(**inputs, use_cache=False)
        assert not record.masks
        assert [call.bounded for call in record.calls] == [True, True]
    with record_attention() as record:
        model(input_ids=inputs["input_ids"], use_cache=False)
    assert sorted(record.masks.values(), key=str) == [WINDOW, None]


def test_gradient_checkpointing_keeps_boundaries() -> None:
    ids = documents()
    targets = packed_batch(ids)["shift_labels"][0]
    found = []
    for checkpointing in (False, True):
        model = tiny_model("gemma3_text")
        install_attention(model, PACKED_ATTENTION)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        summed_loss(packed_logits(model, BoundarySupport("native", "", 0.0, 0.0), ids), targets).backward()
        found.append(gradients(model))
    assert_gradients_equal(*found)


def test_misuse_is_named() -> None:
    model = tiny_model("llama")
    install_attention(model, PACKED_ATTENTION)
    batch = packed_batch(documents())
    inputs = boundary_inputs(BoundarySupport("native", "", 0.0, 0.0), model, batch)
    with packed_forward(), pytest.raises(ModelError, match="boundaries did not reach"):
        model(input_ids=batch["input_ids"], use_cache=False)
    with pytest.raises(ModelError, match="boundaries did not reach"):
        model(input_ids=batch["input_ids"], attention_mask=attention.NO_MASK, use_cache=False)
    short = {**inputs, "cu_seq_lens_q": batch["cu_seq_lens_q"][:-1]}
    with packed_forward(), pytest.raises(ModelError, match="boundaries end at token 20 of a row of 32"):
        model(**short, use_cache=False)
    with pytest.raises(ModelError, match="one row without a KV cache"):
        model(**{**inputs, "input_ids": inputs["input_ids"].expand(2, -1)}, use_cache=False)
    with pytest.raises(ModelError, match="flash_attention_2 cannot be used"):
        install_attention(model, "flash_attention_2")
    query = torch.zeros(1, 2, 4, 8)
    bounds = torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(ModelError, match="position_bias"):
        document_attention(nn.Module(), query, query, query, None, cu_seq_lens_q=bounds, position_bias=query)
    with pytest.raises(ModelError, match="both directions"):
        document_attention(nn.Module(), query, query, query, None, cu_seq_lens_q=bounds, is_causal=False)
    with pytest.raises(ModelError, match="no transformers model"):
        install_attention(nn.Linear(2, 2), PACKED_ATTENTION)


def test_a_saved_config_does_not_name_our_attention(tmp_path: Any) -> None:
    model = tiny_model("llama")
    install_attention(model, PACKED_ATTENTION)
    model.save_pretrained(tmp_path)
    assert PACKED_ATTENTION not in str((tmp_path / "config.json").read_text())
    assert isinstance(type(model).from_pretrained(tmp_path), PreTrainedModel)


class _FakeLayer(nn.Module):
    """What an attention module tells about itself."""

    def __init__(self, groups: int, chunk: int | None) -> None:
        super().__init__()
        self.num_key_value_groups = groups
        self.is_causal = True
        if chunk is not None:
            self.layer_idx = 0
            self.config = type("Config", (), {"layer_types": ["chunked_attention"], "attention_chunk_size": chunk})()


def _reference(
    query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, scaling: float, softcap: Any, sinks: Any
) -> Any:
    """Attention written out over the whole row with the full [T, T] mask."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key) * scaling
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    weights = scores.masked_fill(~allowed, -torch.inf).exp()
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + sinks.exp().view(1, -1, 1, 1)
    return torch.einsum("bhqk,bhkd->bqhd", weights / total, value)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    span=st.sampled_from([("window", None), ("window", 1), ("window", 3), ("chunk", 1), ("chunk", 4)]),
    groups=st.sampled_from([1, 2]),
    softcap=st.sampled_from([None, 2.0]),
    sinks=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_row_equals_the_written_out_mask(
    lengths: list[int], span: tuple[str, int | None], groups: int, softcap: float | None, sinks: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens, (kind, size) = sum(lengths), span

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    query, key, value = draw(1, 2 * groups, tokens, 8), draw(1, 2, tokens, 8), draw(1, 2, tokens, 8)
    sink_values = draw(2 * groups) if sinks else None
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    position = torch.cat([torch.arange(length) for length in lengths])
    allowed = (document[:, None] == document[None, :]) & (position[:, None] >= position[None, :])
    if size is not None and kind == "window":
        allowed &= position[:, None] - position[None, :] < size
    elif size is not None:
        allowed &= position[:, None] // size == position[None, :] // size
    output, _ = document_attention(
        _FakeLayer(groups, size if kind == "chunk" else None),
        query,
        key,
        value,
        None,
        scaling=0.3,
        sliding_window=size if kind == "window" else None,
        softcap=softcap,
        s_aux=sink_values,
        cu_seq_lens_q=torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
        max_length_q=max(lengths),
    )
    expected = _reference(query, key, value, allowed, 0.3, softcap, sink_values)
    assert torch.allclose(output, expected, rtol=1e-9, atol=1e-9)


def test_dropout_is_applied_per_document() -> None:
    query = torch.randn(1, 2, 12, 8)
    bounds = torch.tensor([0, 5, 12], dtype=torch.int32)
    for softcap in (None, 30.0):
        arguments: dict[str, Any] = {"cu_seq_lens_q": bounds, "softcap": softcap}
        layer = _FakeLayer(1, None)
        plain, _ = document_attention(layer, query, query, query, None, dropout=0.0, **arguments)
        dropped, _ = document_attention(layer, query, query, query, None, dropout=0.5, **arguments)
        assert not torch.allclose(plain, dropped)


def test_flash_call_has_the_kernels_signature() -> None:
    """Without a GPU: torch's variable-length kernel accepts our call, shapes come back right, also for values of
    another head size and for chunks."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        query, key = torch.empty(1, 4, 24, 64, dtype=torch.bfloat16), torch.empty(1, 2, 24, 64, dtype=torch.bfloat16)
        value = torch.empty(1, 2, 24, 32, dtype=torch.bfloat16)
        layer = attention_kernels._Layer(nn.Module(), 0.0, None, 8, None, None, None)
        bounds = torch.empty(4, dtype=torch.int32)
        output = attention_kernels._flash(layer, query, key, value, bounds, 24)
    assert output.shape == (1, 24, 4, 32)
    assert attention_kernels._split_chunks([0, 3, 11], 4) == [0, 3, 7, 11]


@pytest.mark.parametrize("family", ["falcon", "stablelm"])
def test_a_row_of_one_document_has_a_prebuilt_mask_too(family: str) -> None:
    """transformers makes none where the kernel can be causal by itself; a micro-batch may hold one document."""
    model = tiny_model(family)
    install_attention(model, PACKED_ATTENTION)
    support = packing_support(model)
    assert support.mode == "mask"
    mask = attention.packed_mask(model, torch.arange(5)[None], support.mask_form)
    found = list(mask.values()) if isinstance(mask, dict) else [mask]
    for entry in found:
        allowed = entry[0, 0] if entry.dtype == torch.bool else entry[0, 0] == 0
        assert torch.equal(allowed, torch.ones(5, 5, dtype=torch.bool).tril())
