"""The start-up checks: what they find, and that they leave the model and the random generators alone."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from eft.models.attention import PACKED_ATTENTION, install_attention, packing_support
from eft.models.probes import TrainedTensorAudit, boundary_probe, dtype_table, select_logits_kwargs
from tests.tiny_models import tiny_model

# peft 0.21 reads transformers' old name of this property when it wraps a model.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def lora_on_bf16() -> nn.Module:
    """fp32 adapters on frozen bf16 weights (D10)."""
    model = get_peft_model(
        tiny_model("llama", attention_dropout=0.1).to(torch.bfloat16),
        LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1),
        autocast_adapter_dtype=True,
    )
    install_attention(model, PACKED_ATTENTION)
    return model


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gemma2"])
def test_boundary_probe_passes_and_gives_its_numbers(family: str) -> None:
    model = tiny_model(family)
    install_attention(model, PACKED_ATTENTION)
    result = boundary_probe(model, packing_support(model))
    assert (result.promise, result.status) == ("E1", "pass"), result.detail
    assert result.numbers["difference"] <= 1e-5


def test_boundary_probe_leaves_no_trace() -> None:
    model = lora_on_bf16()
    model.get_submodule("base_model.model.model.layers.0").eval()
    modes = [module.training for module in model.modules()]
    random_state = torch.get_rng_state()
    result = boundary_probe(model, packing_support(model))
    assert result.status == "pass", result.detail
    assert result.numbers["leak"] == 0.0
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_boundary_probe_in_half_precision_and_mixed_dtypes() -> None:
    model = tiny_model("qwen3")
    install_attention(model, PACKED_ATTENTION)
    assert boundary_probe(model, packing_support(model), autocast_dtype=torch.bfloat16).status == "pass"
    # Trained fp32 layers above frozen bf16 ones only run under autocast; the probe enters it by itself.
    for name, parameter in model.named_parameters():
        if "layers.1" not in name:
            parameter.requires_grad_(False)
            parameter.data = parameter.data.to(torch.bfloat16)
    result = boundary_probe(model, packing_support(model))
    assert result.status == "pass", result.detail


def test_boundary_probe_is_not_applicable_to_a_refused_model() -> None:
    model = tiny_model("bloom")
    assert boundary_probe(model, packing_support(model)).status == "not applicable"


def test_a_model_that_ignores_its_input_proves_nothing() -> None:
    model = tiny_model("llama", tie_word_embeddings=False)
    nn.init.zeros_(model.get_output_embeddings().weight)
    install_attention(model, PACKED_ATTENTION)
    support = packing_support(model)
    assert support.mode == "refused"
    assert "do not depend on its input" in support.reason


def test_select_logits_kwargs_reads_the_base_model() -> None:
    assert select_logits_kwargs(tiny_model("llama"))
    assert select_logits_kwargs(lora_on_bf16())
    assert not select_logits_kwargs(tiny_model("llama").model), "a bare decoder has no logits"


def test_dtype_table_counts_every_parameter_once() -> None:
    model = lora_on_bf16()
    rows = dtype_table(model)
    assert [(row.trainable, row.dtype) for row in rows] == [(True, "float32"), (False, "bfloat16")]
    trained, frozen = rows
    assert trained.parameters == 2 * (4 * (32 + 32) + 4 * (32 + 16))
    assert trained.bytes == 4 * trained.parameters
    assert frozen.bytes == 2 * frozen.parameters
    assert trained.parameters + frozen.parameters == sum(p.numel() for p in model.parameters())
    tied = tiny_model("llama", tie_word_embeddings=True)
    assert dtype_table(tied)[0].parameters == sum(p.numel() for p in tied.parameters())
    assert str(trained) == f"trained float32: {trained.parameters:,} parameters, 0.0 MiB"


def train(model: nn.Module, steps: int, learning_rate: float = 1e-3) -> None:
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=learning_rate, weight_decay=0.0
    )
    ids = torch.arange(3, 40)[None]
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_audit_passes_after_three_steps_of_lora_and_not_after_one() -> None:
    model = lora_on_bf16()
    audit = TrainedTensorAudit(model)
    audit.start()
    train(model, 1)
    first = audit.check()
    assert first.status == "fail", "A has no gradient while B is zero"
    assert "lora_A" in first.detail
    assert "lora_B" not in first.detail
    train(model, 2)
    assert audit.check().status == "pass"
    assert audit.check().numbers == {"trainable": 8, "frozen": 21, "idle": 0, "moved": 0, "waiting": 0}


@pytest.mark.parametrize("tied", [False, True])
def test_a_single_trained_token_may_wait_for_its_first_row_and_not_longer(tied: bool) -> None:
    def audited(token: int) -> tuple[nn.Module, TrainedTensorAudit]:
        model = get_peft_model(
            tiny_model("llama", tie_word_embeddings=tied),
            LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[token]),
        )
        audit = TrainedTensorAudit(model)
        audit.start()
        return model, audit

    model, audit = audited(50)  # `train` has the tokens 3 to 39
    train(model, 3)
    waits = audit.check()
    # A tied head gives every row a gradient.
    assert (waits.status, waits.numbers["waiting"]) == ("pass", 0 if tied else 1), waits.detail

    model, audit = audited(20)
    train(model, 3)
    came = audit.check()
    assert (came.status, came.numbers["waiting"]) == ("pass", 0), came.detail
    audit.close()
    assert not any(module._forward_pre_hooks for module in model.modules())

    model, audit = audited(20)
    rows = next(parameter for name, parameter in model.named_parameters() if "trainable_tokens_delta" in name)
    rows.register_hook(torch.zeros_like)  # cut off from its gradient
    train(model, 3)
    cut_off = audit.check()
    assert cut_off.status == "fail"
    assert "trainable_tokens_delta" in cut_off.detail


def test_audit_names_idle_and_moved_tensors() -> None:
    model = tiny_model("llama", tie_word_embeddings=False)
    frozen = model.get_parameter("model.norm.weight").requires_grad_(False)
    audit = TrainedTensorAudit(model)
    audit.start()
    train(model, 1)
    assert audit.check().status == "pass"
    with torch.no_grad():
        frozen[3] = torch.nextafter(frozen[3], torch.tensor(9.0))
    moved = audit.check()
    assert moved.status == "fail"
    assert "frozen tensors changed: model.norm.weight" in moved.detail

    model = tiny_model("llama", tie_word_embeddings=False)
    audit = TrainedTensorAudit(model)
    audit.start()
    idle = audit.check()
    assert idle.numbers["idle"] == idle.numbers["trainable"] == 21
    assert "and 13 more" in idle.detail
    train(model, 1, learning_rate=0.0)
    assert audit.check().status == "fail"


def test_audit_sees_a_change_anywhere_in_a_large_tensor_and_a_swap() -> None:
    model = nn.Linear(2048, 2100, bias=False).requires_grad_(False)
    model.lone = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    audit = TrainedTensorAudit(model)
    audit.start()
    for index in (0, 1_234_567, 2048 * 2100 - 1):
        value = model.weight.view(-1)[index].clone()
        model.weight.view(-1)[index] += 1e-3
        assert audit.check().numbers["moved"] == 1, index
        model.weight.view(-1)[index] = value
        assert audit.check().numbers["moved"] == 0
    model.weight.data = model.weight.data.flip(0)
    assert audit.check().numbers["moved"] == 1
    model.weight.data = model.weight.data.flip(0).fill_(torch.nan)
    assert audit.check().numbers["moved"] == 1


def test_audit_of_a_model_without_trainable_tensors_fails() -> None:
    model = nn.Linear(2, 2).requires_grad_(False)
    audit = TrainedTensorAudit(model)
    audit.start()
    assert "nothing is trainable" in audit.check().detail
