"""Activation checkpointing: which layers run twice, what they keep, and that the gradients do not change."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, get_args

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from eft.config.memory import KeptOutput, MemoryConfig
from eft.core.errors import ModelError
from eft.models.attention import PACKED_ATTENTION, install_attention, packed_forward
from eft.models.checkpointing import KEPT_OPERATIONS, Checkpointing, checkpointing_of, set_checkpointing
from eft.models.tiled_attention import has_fast_products
from tests.tiny_models import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

IDS = torch.arange(24).reshape(2, 12) % 100


class Operators(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[function.name()] += 1
        return function(*args, **(kwargs or {}))


def backward(model: Any) -> tuple[dict[str, Tensor], Counter[str]]:
    """Gradients, and the operators of the backward pass, in which the recomputation runs."""
    model.zero_grad()
    torch.manual_seed(1)
    loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    with Operators() as operators:
        loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, operators.counts


@contextmanager
def forward_calls(model: nn.Module) -> Iterator[list[int]]:
    """How often the MLP of each layer was entered: a recomputation stops as soon as it has what it needs."""
    layers: Any = model.get_submodule("model.layers")
    calls = [0] * len(layers)

    def counter(number: int) -> Any:
        def count(module: Any, inputs: Any) -> None:
            calls[number] += 1

        return count

    handles = [layer.mlp.register_forward_pre_hook(counter(number)) for number, layer in enumerate(layers)]
    yield calls
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (None, [1, 1, 1, 1]),
        (Checkpointing(), [2, 2, 2, 2]),
        (Checkpointing(every=2), [2, 1, 2, 1]),
        (Checkpointing(every=3), [2, 1, 1, 2]),
        (Checkpointing(options={"use_reentrant": True}), [2, 2, 2, 2]),
    ],
)
def test_which_layers_run_twice(wanted: Checkpointing | None, expected: list[int]) -> None:
    model = tiny_model("llama", num_hidden_layers=4)
    plain, _ = backward(model)
    set_checkpointing(model, wanted)
    with forward_calls(model) as calls:
        gradients, _ = backward(model)
    assert calls == expected
    assert all(torch.equal(gradients[name], plain[name]) for name in plain)
    with forward_calls(model) as calls, torch.no_grad():
        model.eval()(input_ids=IDS)
    assert calls == [1, 1, 1, 1]


ATTENTION, PRODUCT = "aten::_scaled_dot_product_flash_attention_for_cpu", "aten::mm"


@pytest.mark.parametrize(
    ("keep", "attention", "products"),
    [((), True, True), (("attention",), False, True), (("attention", "matmul"), False, False)],
)
def test_what_is_kept_is_not_computed_again(keep: Any, attention: bool, products: bool) -> None:
    model = tiny_model("llama")
    plain, before = backward(model)
    set_checkpointing(model, Checkpointing(keep=keep))
    gradients, counts = backward(model)
    assert (counts[ATTENTION] > before[ATTENTION]) == attention
    assert (counts[PRODUCT] > before[PRODUCT]) == products
    assert counts["aten::silu"] > 0, "cheap operations are computed again"
    assert all(torch.equal(gradients[name], plain[name]) for name in plain)


@pytest.mark.skipif(not has_fast_products(), reason="this CPU's bf16 attention is torch's own, one operator anyway")
def test_our_own_attention_is_kept_too() -> None:
    """In bf16 on a CPU it is made of products, none of which may be kept: they are overwritten."""
    model = tiny_model("llama")
    install_attention(model, PACKED_ATTENTION)
    keep: tuple[KeptOutput, ...] = ("attention", "matmul")
    with torch.autocast("cpu", torch.bfloat16):
        packed = {"input_ids": IDS[:1], "position_ids": torch.arange(12)[None], "labels": IDS[:1], "use_cache": False}
        bounds = torch.tensor([0, 12], dtype=torch.int32)
        packed |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 12, "max_length_k": 12}
        plain, counts = [], []
        for wanted in (None, Checkpointing(), Checkpointing(keep=keep)):
            set_checkpointing(model, wanted)
            model.zero_grad()
            with packed_forward():
                loss = model(**packed).loss
            with Operators() as operators:
                loss.backward()
            counts.append(operators.counts["eft::tiled_attention"])
            plain.append([parameter.grad.clone() for parameter in model.parameters()])
    assert counts == [0, 2, 0]
    for gradients in plain[1:]:
        assert all(torch.equal(left, right) for left, right in zip(gradients, plain[0], strict=True))


def test_dropout_is_repeated() -> None:
    torch.manual_seed(0)
    model = get_peft_model(tiny_model("llama"), LoraConfig(r=4, lora_dropout=0.5, target_modules=["q_proj", "up_proj"]))
    plain, _ = backward(model)
    for wanted in (Checkpointing(), Checkpointing(keep=("attention", "matmul")), Checkpointing(every=2)):
        set_checkpointing(model, wanted)
        gradients, _ = backward(model)
        assert all(torch.equal(gradients[name], plain[name]) for name in plain)
    set_checkpointing(model, Checkpointing(options={"preserve_rng_state": False}))
    gradients, _ = backward(model)
    assert not all(torch.equal(gradients[name], plain[name]) for name in plain), "the test can tell"


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_frozen_bottom_layers_have_no_backward_pass(use_reentrant: bool) -> None:
    """The reentrant kind needs an input that asks for a gradient; the other must not be made to drag one along."""
    model = tiny_model("llama", num_hidden_layers=4)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.3" in name)
    plain, _ = backward(model)
    set_checkpointing(model, Checkpointing(options={"use_reentrant": use_reentrant}))
    with forward_calls(model) as calls:
        gradients, _ = backward(model)
    assert calls == ([2, 2, 2, 2] if use_reentrant else [1, 1, 1, 2])
    assert all(torch.equal(gradients[name], plain[name]) for name in plain)


def test_a_setting_replaces_the_one_before_and_none_leaves_it() -> None:
    model = tiny_model("llama")
    set_checkpointing(model, Checkpointing())
    set_checkpointing(model, Checkpointing(every=2))
    set_checkpointing(model, None)
    with forward_calls(model) as calls:
        backward(model)
    assert calls == [2, 1]


def test_a_family_without_such_layers_is_refused_by_key() -> None:
    model = tiny_model("llama")
    model.supports_gradient_checkpointing = False
    with pytest.raises(ModelError, match=r"^gradient_checkpointing: LlamaForCausalLM .* Remove the key"):
        set_checkpointing(model, Checkpointing())


def test_the_config_says_how() -> None:
    assert checkpointing_of(MemoryConfig()) is None
    assert checkpointing_of(MemoryConfig(gradient_checkpointing=True)) == Checkpointing()
    keys: dict[str, Any] = {"gradient_checkpointing": True, "gradient_checkpointing_every": 3}
    assert checkpointing_of(MemoryConfig(**keys, selective_checkpointing=True)) == Checkpointing(3, ("attention",))
    options = {"preserve_rng_state": False}
    config = MemoryConfig(**keys, selective_checkpointing=["matmul"], gradient_checkpointing_kwargs=options)
    assert checkpointing_of(config) == Checkpointing(3, ("matmul",), options)


def test_the_table_has_the_names_of_the_config() -> None:
    assert set(get_args(KeptOutput)) == set(KEPT_OPERATIONS)
