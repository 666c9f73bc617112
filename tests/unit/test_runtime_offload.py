"""Activation offloading: the copy is what the backward pass reads, each tensor travels once, the numbers stay."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from eft.runtime import offload
from eft.runtime.offload import CudaCopies, OffloadCounters, PlainCopies, activation_offloading
from tests.tiny_models import tiny_model

CPU = torch.device("cpu")


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
    assert counters.fetched == counters.tensors, "each comes back once"


def test_with_recomputation_the_layers_inputs_travel() -> None:
    model = tiny_model("llama", num_hidden_layers=4).train()
    plain, _ = step(model, activation_offloading(True, parameters=model.parameters(), exercise=True))
    model.activation_checkpointing_enable({"use_reentrant": False})
    recomputed, _ = step(model, activation_offloading(True, parameters=model.parameters(), exercise=True))
    hidden = 24 * 32 * 4
    assert 4 * hidden <= recomputed.num_bytes < plain.num_bytes / 3


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


def test_what_is_saved_twice_travels_once() -> None:
    model, x = Recorder(), torch.randn(5, 8)
    with activation_offloading(True, parameters=model.parameters(), exercise=True) as counters:
        loss = model(x)
    assert (counters.tensors, counters.shared) == (3, 1)  # x, hidden (twice), the output that is squared
    loss.backward()
    assert counters.fetched == 3


def test_a_tensor_written_to_in_between_is_another() -> None:
    """What was saved before the write keeps its old values, as autograd's version counter would demand."""
    first, second = torch.ones(4, requires_grad=True), torch.ones(4, requires_grad=True)
    values = torch.arange(1.0, 5.0)
    with activation_offloading(True, exercise=True) as counters:
        loss = (first * values).sum()
        values.mul_(10.0)
        loss = loss + (second * values).sum()
    assert (counters.tensors, counters.shared) == (2, 0)
    loss.backward()
    assert torch.equal(first.grad, torch.arange(1.0, 5.0))  # type: ignore[arg-type]  # there is a gradient
    assert torch.equal(second.grad, 10 * torch.arange(1.0, 5.0))  # type: ignore[arg-type]  # there is a gradient


def test_memory_that_is_used_again_is_not_taken_for_the_tensor_before() -> None:
    """An allocator hands a freed tensor's address to the next one of its size."""
    weight, results = torch.ones(64, 64, requires_grad=True), []
    memory = bytearray(weight.nbytes)  # an allocator would use an address again when it likes
    with activation_offloading(True, parameters=[weight], exercise=True) as counters:
        for number in range(20):
            x = torch.frombuffer(memory, dtype=torch.float32).view(64, 64).fill_(float(number))
            results.append((x @ weight).sum())
            del x
    assert counters.tensors == 20
    torch.stack(results).sum().backward()
    expected = torch.full((64, 64), 64.0 * sum(range(20)))
    assert torch.equal(weight.grad, expected)  # type: ignore[arg-type]  # there is a gradient


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


def test_the_host_takes_no_more_than_its_share() -> None:
    model, x = Recorder(), torch.randn(5, 8)
    around = activation_offloading(True, parameters=model.parameters(), host_limit=5 * 16 * 4, exercise=True)
    with around as counters:
        loss = model(x)
    assert counters.num_bytes <= 5 * 16 * 4
    assert counters.kept > 0
    loss.backward()


def test_off_and_on_the_cpu_nothing_moves() -> None:
    model, x = Recorder(), torch.randn(5, 8)
    for context in (
        activation_offloading(False, exercise=True),
        activation_offloading(True, CPU),
    ):
        with context as counters:
            model(x).backward()
        assert (counters.tensors, counters.kept) == (0, 0)


def test_nothing_outlives_the_backward_pass() -> None:
    model, x = Recorder(), torch.randn(5, 8)
    gc.collect()
    gc.disable()
    try:
        for _ in range(2):
            with activation_offloading(True, parameters=model.parameters(), exercise=True):
                loss = model(x)
            loss.backward()
            del loss
        assert not [found for found in gc.get_objects() if type(found) is offload._Saved]
    finally:
        gc.enable()


class LateCopies(PlainCopies):
    """Copies as on a stream of their own: nothing arrives before someone waits for it, and all is written down.

    Of a tensor that was given back before that, only rubbish arrives.
    """

    def __init__(self) -> None:
        self.log: list[tuple[str, int]] = []
        self.numbers: dict[int, int] = {}
        self.pending: dict[int, tuple[Tensor, weakref.ref[Tensor]]] = {}

    def out(self, tensor: Tensor) -> tuple[Tensor, Any]:
        host = torch.full_like(tensor, torch.nan)
        number = len(self.numbers)
        self.numbers[host.data_ptr()] = number
        return host, self._begin("out", number, host, tensor)

    def back(self, host: Tensor, device: torch.device) -> tuple[Tensor, Any]:
        number = self.numbers[host.data_ptr()]
        for token, (target, _) in list(self.pending.items()):
            if target is host:  # one stream: a copy waits for those before it
                self._finish(token)
        fresh = torch.full_like(host, torch.nan)
        return fresh, self._begin("back", number, fresh, host)

    def wait(self, token: Any) -> None:
        self._finish(token)

    def _begin(self, way: str, number: int, target: Tensor, source: Tensor) -> int:
        self.log.append((way, number))
        token = len(self.log)
        self.pending[token] = (target, weakref.ref(source))
        return token

    def _finish(self, token: int) -> None:
        if token in self.pending:
            target, reference = self.pending.pop(token)
            source = reference()
            target.copy_(torch.full_like(target, torch.nan) if source is None else source)


class Chain(nn.Module):
    """`count` times a tanh: each saves its output."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.count):
            x = torch.tanh(x)
        return x


@pytest.mark.parametrize("window", [0, 1, 2, 3, 100])
def test_copies_overlap_and_nothing_is_read_too_early(window: int) -> None:
    """`window` tensors may be in flight. What was saved last never leaves; the next ones are fetched ahead."""
    count = 8
    x = torch.linspace(-2.0, 2.0, 16, requires_grad=True)
    Chain(count)(x).sum().backward()
    assert x.grad is not None
    expected, x.grad = x.grad, None
    copies, counters = LateCopies(), OffloadCounters()
    run = offload._Pass(copies, counters, window * 16 * 4, None)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: run.save(tensor.detach()), offload._unpack):
        y = Chain(count)(x).sum()
    run.end_forward()
    assert copies.log == [("out", number) for number in range(count)]
    y.backward()
    assert torch.equal(x.grad, expected)
    back = [number for way, number in copies.log[count:]]
    stayed = min(window, count)
    assert counters.stayed == stayed
    assert back == list(range(count - stayed))[::-1], "each once, the last saved first"
    assert counters.fetched == count - stayed


def test_at_most_the_window_is_fetched_ahead() -> None:
    count, window = 8, 2
    x = torch.linspace(-2.0, 2.0, 16, requires_grad=True)
    copies = LateCopies()
    run = offload._Pass(copies, OffloadCounters(), window * 16 * 4, None)
    waiting: list[int] = []

    def unpack(saved: Any) -> Tensor:
        tensor = offload._unpack(saved)
        waiting.append(sum(copies.log[token - 1][0] == "back" for token in copies.pending))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: run.save(tensor.detach()), unpack):
        y = Chain(count)(x).sum()
    y.backward()
    # The two saved last never left. Then two are under way while one is read, until none is left to fetch.
    assert waiting == [1, 2, 2, 2, 2, 2, 1, 0]


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
    run = offload._Pass(PlainCopies(), OffloadCounters(), 0, None)
    back = offload._unpack(run.save(tensor))
    assert torch.equal(back, tensor)
    assert back.dtype == tensor.dtype
    assert back.stride() == tensor.stride()
    assert back.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr()


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


def blocks() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(layer for _ in range(8) for layer in (nn.Linear(512, 512), nn.GELU()))).cuda()


@pytest.mark.gpu
@needs_cuda
def test_on_cuda_the_peak_falls_and_the_gradients_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "WINDOW_BYTES", 1 << 24)
    model = blocks()
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


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("window", [0, 1 << 23, 1 << 26])
def test_on_cuda_no_copy_races_with_the_computation(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """100 steps whose freed activations are overwritten at once, with a copy stream that is kept busy."""
    monkeypatch.setattr(offload, "WINDOW_BYTES", window)
    model = blocks()
    torch.manual_seed(1)
    rows = [torch.randn(4096, 512, device="cuda") for _ in range(4)]
    plain = []
    for x in rows:
        model.zero_grad()
        model(x).square().mean().backward()
        plain.append(gradients(model))
    stream = offload._cuda_copies(torch.device("cuda"))._stream
    ballast = torch.empty(1 << 26, dtype=torch.uint8, pin_memory=True)
    for number in range(100):
        model.zero_grad()
        with torch.cuda.stream(stream):  # copies of ours queue behind this one
            ballast.to("cuda", non_blocking=True)
        with activation_offloading(True, torch.device("cuda"), parameters=model.parameters()):
            loss = model(rows[number % 4]).square().mean()
        for _ in range(8):
            torch.full((4096, 512), torch.nan, device="cuda")  # takes whatever memory was given back
        loss.backward()
        measured = gradients(model)
        assert all(torch.equal(measured[name], plain[number % 4][name]) for name in measured), number


@pytest.mark.gpu
@needs_cuda
def test_on_cuda_the_copies_take_less_time_beside_the_computation() -> None:
    model = blocks()
    x = torch.randn(16384, 512, device="cuda")

    def seconds(around: Callable[[], Any]) -> float:
        times = []
        for _ in range(5):
            model.zero_grad()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            with around():
                loss = model(x).square().mean()
            loss.backward()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        return sorted(times)[2]

    overlapped = seconds(lambda: activation_offloading(True, torch.device("cuda"), parameters=model.parameters()))
    in_order = seconds(lambda: torch.autograd.graph.save_on_cpu(pin_memory=True))
    assert overlapped < in_order


@pytest.mark.gpu
@needs_cuda
def test_on_cuda_expanded_and_strided_tensors_survive() -> None:
    copies = CudaCopies(torch.device("cuda"))
    run = offload._Pass(copies, OffloadCounters(), 0, None)
    for tensor in (torch.randn(64, 1, device="cuda").expand(64, 128), torch.randn(64, 128, device="cuda").T[1:, ::2]):
        back = offload._unpack(run.save(tensor))
        assert torch.equal(back, tensor)
        assert back.stride() == tensor.stride()
