"""Activation offloading: the copy is what the backward pass reads, and the numbers do not change."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from eft.runtime.offload import _to_device, _to_host, activation_offloading
from tests.tiny_models import tiny_model


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def step(model: Any, around: Any, before_backward: Callable[[], None] = lambda: None) -> tuple[Any, Tensor]:
    """One forward pass inside `around`, one backward pass outside it; dropout seeded."""
    model.zero_grad()
    torch.manual_seed(1)
    ids = torch.arange(24).reshape(2, 12) % 100
    with around as counters:
        loss = model(input_ids=ids, labels=ids).loss
    value = loss.detach().clone()
    before_backward()
    loss.backward()
    return counters, value


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_bit_equal(family: str, checkpointing: bool) -> None:
    model = tiny_model(family).train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    _, plain_loss = step(model, contextlib.nullcontext())
    plain = gradients(model)
    counters, loss = step(model, activation_offloading(True, parameters=model.parameters(), exercise=True))
    offloaded = gradients(model)
    assert torch.equal(loss, plain_loss)
    assert plain.keys() == offloaded.keys()
    assert all(torch.equal(plain[name], offloaded[name]) for name in plain)
    assert counters.tensors > 0
    assert counters.num_bytes > 0


class Recorder(nn.Module):
    """A small network that hands out the very tensors that autograd saves."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))  # tanh saves its output, which `second` saves too
        self.seen = [x, hidden]
        out: Tensor = self.second(hidden)
        return out.square().sum()


def test_backward_does_not_read_the_original_storage() -> None:
    model, x = Recorder(), torch.randn(5, 8)

    def run(around: Any, poison: bool) -> dict[str, Tensor]:
        model.zero_grad()
        with around:
            loss = model(x.clone())
        if poison:
            for tensor in model.seen:
                tensor.data.fill_(float("nan"))
        loss.backward()
        return gradients(model)

    plain = run(contextlib.nullcontext(), poison=False)
    poisoned = run(contextlib.nullcontext(), poison=True)
    offloaded = run(activation_offloading(True, parameters=model.parameters(), exercise=True), poison=True)
    assert any(value.isnan().any() for value in poisoned.values())  # the poison does reach the plain pass
    assert all(torch.equal(plain[name], offloaded[name]) for name in plain)


def test_parameters_and_their_views_stay() -> None:
    model, x = Recorder(), torch.randn(5, 8, requires_grad=True)
    with activation_offloading(True, parameters=model.parameters(), exercise=True) as counters:
        model(x).backward()
    everything = model, x
    with activation_offloading(True, exercise=True) as moved_too:
        everything[0](everything[1]).backward()
    assert counters.kept >= 1
    assert moved_too.kept == 0
    assert moved_too.tensors == counters.tensors + counters.kept


def test_off_and_on_the_cpu_nothing_moves() -> None:
    model, x = Recorder(), torch.randn(5, 8)
    for context in (
        activation_offloading(False, exercise=True),
        activation_offloading(True, torch.device("cpu")),
    ):
        with context as counters:
            model(x).backward()
        assert (counters.tensors, counters.kept) == (0, 0)


@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    permute=st.randoms(use_true_random=False),
    cut=st.booleans(),
    expand=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool]),
)
def test_values_shape_and_strides_survive(
    shape: list[int], permute: Any, cut: bool, expand: bool, dtype: torch.dtype
) -> None:
    tensor = torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)
    order = list(range(tensor.ndim))
    permute.shuffle(order)
    tensor = tensor.permute(order)
    if cut and tensor.size(-1) > 1:
        tensor = tensor[..., 1:]
    if expand:
        tensor = tensor.unsqueeze(0).expand(3, *tensor.shape)
    back = _to_device(_to_host(tensor))
    assert torch.equal(back, tensor)
    assert back.dtype == tensor.dtype
    assert back.stride() == tensor.stride()
    assert back.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda_the_peak_falls_and_the_gradients_stay() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(layer for _ in range(8) for layer in (nn.Linear(512, 512), nn.GELU()))).cuda()
    x = torch.randn(4096, 512, device="cuda")
    results = []
    for enabled in (False, True):
        model.zero_grad()
        torch.cuda.reset_peak_memory_stats()
        with activation_offloading(enabled, torch.device("cuda"), parameters=model.parameters()):
            loss = model(x).square().mean()
        loss.backward()
        results.append((torch.cuda.max_memory_allocated(), gradients(model)))
    (plain_peak, plain), (peak, offloaded) = results
    assert all(torch.equal(plain[name], offloaded[name]) for name in plain)
    assert peak < 0.7 * plain_peak
