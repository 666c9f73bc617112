"""What the probe finds out about output heads, what it leaves behind, and that the hooks sleep."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from eft.loss.linear import head_loss
from eft.models.loss_head import LossHead, find_loss_head, loss_request
from tests.tiny_models import FAMILIES, VOCAB_SIZE, tiny_model

IDS = torch.arange(12).reshape(2, 6) % VOCAB_SIZE
POSITIONS = torch.tensor([0, 2, 3, 10])
TARGETS = torch.tensor([5, 6, 7, 8])
# peft 0.21 reads transformers' old name of this property when it wraps a model.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def found(model: nn.Module, **options: Any) -> LossHead:
    head, reason = find_loss_head(model, head_loss, **options)
    assert head is not None, reason
    return head


def loss_of(model: nn.Module, head: LossHead) -> Tensor:
    with loss_request(head, head_loss, POSITIONS, TARGETS, None):
        loss: Tensor = model(input_ids=IDS, use_cache=False).loss
    return loss


def plain_loss_of(model: nn.Module) -> Tensor:
    logits = model(input_ids=IDS, use_cache=False).logits.flatten(0, 1)[POSITIONS]
    return F.cross_entropy(logits, TARGETS, reduction="sum")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_its_loss_without_logits(family: str) -> None:
    model = tiny_model(family)
    head = found(model)
    loss, expected = loss_of(model, head), plain_loss_of(model)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    measured = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    plain = torch.autograd.grad(expected, list(model.parameters()), allow_unused=True)
    for ours, theirs in zip(measured, plain, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            assert (ours - theirs).norm() <= 1e-5 * max(float(theirs.norm()), 1e-3)


@pytest.mark.parametrize(
    ("family", "settings", "expected"),
    [
        ("llama", {}, LossHead()),
        ("granite", {"logits_scaling": 6.0}, LossHead(scale=1 / 6.0)),
        ("cohere2", {"logit_scale": 0.0625}, LossHead(scale=0.0625)),
        ("gemma2", {"final_logit_softcapping": 30.0}, LossHead(softcap=30.0)),
        ("gemma3_text", {"final_logit_softcapping": 7.3}, LossHead(softcap=7.3)),
    ],
)
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_the_recipe_is_read_off_the_numbers(
    family: str, settings: dict[str, Any], expected: LossHead, autocast: torch.dtype | None
) -> None:
    model = tiny_model(family, **settings)
    assert found(model, autocast_dtype=autocast) == expected
    assert found(model.to(torch.bfloat16)) == expected


class _Shifted(LlamaForCausalLM):  # type: ignore[misc]  # untyped class
    """Something done to the logits that is no scale and no soft cap."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + torch.arange(output.logits.shape[-1])
        return output


class _Around(LlamaForCausalLM):  # type: ignore[misc]  # untyped class
    """A head that is never called as a module."""

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        output = self.model(input_ids=input_ids, use_cache=False)
        output.logits = F.linear(output.last_hidden_state, self.lm_head.weight)
        return output


class _Turned(LlamaForCausalLM):  # type: ignore[misc]  # untyped class
    """A head that gets positions in another order than the batch has them."""

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        output = self.model(input_ids=input_ids, use_cache=False)
        output.logits = self.lm_head(output.last_hidden_state.transpose(0, 1)).transpose(0, 1)
        return output


@pytest.mark.parametrize("kind", [_Shifted, _Around, _Turned])
def test_a_head_that_is_not_understood_keeps_its_logits(kind: Any) -> None:
    config = tiny_model("llama").config
    head, why = find_loss_head(kind(config), head_loss)
    assert head is None
    assert "no scaled or soft-capped" in why


def test_a_wrong_loss_is_noticed() -> None:
    def without_weights(hidden: Tensor, head: nn.Module, targets: Tensor, *_: Any, **options: Any) -> Tensor:
        return head_loss(hidden, head, targets, None, **options)

    head, why = find_loss_head(tiny_model("llama"), without_weights)
    assert head is None
    assert "off by" in why


def lora_on_bf16() -> nn.Module:
    return get_peft_model(
        tiny_model("llama", attention_dropout=0.1).to(torch.bfloat16),
        LoraConfig(r=4, target_modules=["q_proj", "lm_head"], lora_dropout=0.1),
    )


def test_the_probe_leaves_no_trace() -> None:
    model = lora_on_bf16()
    model.get_submodule("base_model.model.model.layers.0").eval()
    modes = [module.training for module in model.modules()]
    random_state = torch.get_rng_state()
    found(model)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_hooks_sleep_unless_a_loss_is_asked_for() -> None:
    model, untouched = tiny_model("gemma2"), tiny_model("gemma2")
    found(model)
    output = model(input_ids=IDS, use_cache=False)
    assert output.loss is None
    assert torch.equal(output.logits, untouched(input_ids=IDS, use_cache=False).logits)
    assert model.state_dict().keys() == untouched.state_dict().keys()
    generated = model.eval().generate(IDS, max_new_tokens=3, do_sample=False)
    assert torch.equal(generated, untouched.eval().generate(IDS, max_new_tokens=3, do_sample=False))


def test_a_second_build_and_a_copy_compute_the_same_once() -> None:
    model = tiny_model("llama")
    head = found(model)
    assert found(model) == head
    assert len(model.get_output_embeddings()._forward_hooks) == 1
    copied = copy.deepcopy(model)
    assert found(copied) == head
    assert loss_of(copied, head).item() == loss_of(model, head).item()


def test_through_a_peft_wrapper_under_autocast() -> None:
    """The wrapper calls the base model's forward past its hooks, so that the loss is handed over by the wrapper."""
    model = lora_on_bf16().eval()
    head = found(model, autocast_dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        loss, expected = loss_of(model, head), plain_loss_of(model).float()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-2)
