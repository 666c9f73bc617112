"""The CPU's bf16 attention: against fp64, beside transformers' own sdpa, and what it leaves as it found it."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from eft.models import document_attention as documents
from eft.models.tiled_attention import has_fast_products, tiled_attention

HEADS, GROUPS = 6, 2
PRECISION_AT_IMPORT = torch.backends.mkldnn.matmul.fp32_precision


def draw(lengths: list[int], seed: int, sizes: tuple[int, int] = (16, 16), scale: float = 1.0) -> list[Tensor]:
    """Queries, keys, values as a model hands them over ([1, T, heads, size] in memory), and the output's gradient."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(HEADS, sizes[0]), (GROUPS, sizes[0]), (GROUPS, sizes[1])]
    rows = [torch.randn(1, sum(lengths), *shape, generator=generator).mul(scale).bfloat16() for shape in shapes]
    gradient = torch.randn(1, sum(lengths), HEADS, sizes[1], generator=generator).bfloat16()
    return [row.transpose(1, 2) for row in rows] + [gradient]


def bounds_of(lengths: list[int]) -> list[int]:
    return [0, *accumulate(lengths)]


def with_gradients(attend: object, tensors: list[Tensor], dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """Output [1, T, H, E] and the gradients of queries, keys and values."""
    assert callable(attend)
    leaves = [tensor.to(dtype).requires_grad_() for tensor in tensors[:3]]
    output = attend(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, tensors[3].to(dtype))]


def plain(lengths: list[int], scaling: float, window: int | None) -> object:
    """One document at a time by torch's sdpa, as transformers runs it."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        outputs = []
        for low, high in pairwise(bounds_of(lengths)):
            q, k, v = (tensor[:, :, low:high] for tensor in (query, key, value))
            k, v = (tensor.repeat_interleave(HEADS // GROUPS, 1) for tensor in (k, v))
            index = torch.arange(high - low)
            distance = index[:, None] - index
            mask = None if window is None else (distance >= 0) & (distance < window)
            outputs.append(F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scaling))
        return torch.cat(outputs, 2).transpose(1, 2)

    return attend


def assert_as_close_as_sdpa(lengths: list[int], window: int | None, tensors: list[Tensor], scaling: float) -> None:
    exact = with_gradients(plain(lengths, scaling, window), tensors, torch.float64)
    stock = with_gradients(plain(lengths, scaling, window), tensors)
    ours = with_gradients(
        lambda *leaves: tiled_attention(*leaves, bounds_of(lengths), scaling=scaling, window=window), tensors
    )
    for name, reference, theirs, tiled in zip(("output", "query", "key", "value"), exact, stock, ours, strict=True):
        assert tiled.dtype == torch.bfloat16
        # A tenth of the format's spacing: where a gradient is all but zero, both errors are rounding of nothing.
        floor = 0.1 * torch.finfo(torch.bfloat16).eps * max(float(entry.norm()) for entry in exact[1:])
        limit = 1.5 * float((theirs.double() - reference).norm()) + floor
        assert float((tiled.double() - reference).norm()) <= limit, name


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.sampled_from([1, 2, 7, 127, 128, 129, 300]), min_size=1, max_size=4),
    window=st.sampled_from([None, None, 1, 5, 128, 140]),
    sizes=st.sampled_from([(16, 16), (16, 8), (24, 24)]),
    scale=st.sampled_from([0.3, 1.0, 3.0]),
    seed=st.integers(0, 1000),
)
def test_error_against_fp64_is_at_most_sdpas(
    lengths: list[int], window: int | None, sizes: tuple[int, int], scale: float, seed: int
) -> None:
    assert_as_close_as_sdpa(lengths, window, draw(lengths, seed, sizes, scale), scaling=0.3)


def test_rows_are_exact_to_the_last_bit_beside_any_neighbour() -> None:
    """A document's output and gradients are the same bits alone, first or last in a row."""
    lengths = [40, 200, 131]
    tensors = draw(lengths, seed=3)

    def run(order: list[int]) -> dict[int, list[Tensor]]:
        parts = [tensor.split(lengths, dim=1 if index == 3 else 2) for index, tensor in enumerate(tensors)]
        row = [torch.cat([part[i] for i in order], 1 if index == 3 else 2) for index, part in enumerate(parts)]
        chosen = [lengths[i] for i in order]
        found = with_gradients(
            lambda *leaves: tiled_attention(*leaves, bounds_of(chosen), scaling=0.25, window=None), row
        )
        split = [tensor.split(chosen, dim=2 if index else 1) for index, tensor in enumerate(found)]
        return {document: [part[place] for part in split] for place, document in enumerate(order)}

    together, reversed_, alone = run([0, 1, 2]), run([2, 1, 0]), run([1])
    for document in range(3):
        assert all(map(torch.equal, together[document], reversed_[document]))
    assert all(map(torch.equal, together[1], alone[1]))


class _Products(TorchDispatchMode):
    """The shapes of all products."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[Any, ...]] = set()

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if op in (torch.ops.aten.bmm.default, torch.ops.aten.baddbmm.default):
            self.shapes.add((op, *(tuple(operand.shape) for operand in args if isinstance(operand, Tensor))))
        return op(*args, **(kwargs or {}))


def test_lengths_that_differ_a_little_share_their_products() -> None:
    """Each new shape would cost memory for ever: oneDNN keeps code for it."""

    def products(length: int) -> set[tuple[Any, ...]]:
        with _Products() as found:
            with_gradients(
                lambda *leaves: tiled_attention(*leaves, [0, length], scaling=0.25, window=None), draw([length], 1)
            )
        return found.shapes

    first = products(161)
    assert len(first) >= 6
    assert all(products(length) == first for length in (162, 175, 192))
    assert products(193) != first


def test_scores_far_apart_neither_overflow_nor_vanish() -> None:
    lengths = [150]
    tensors = draw(lengths, seed=5, scale=30.0)
    found = with_gradients(lambda *leaves: tiled_attention(*leaves, [0, 150], scaling=1.0, window=None), tensors)
    assert all(bool(tensor.isfinite().all()) for tensor in found)
    exact = with_gradients(plain(lengths, 1.0, None), tensors, torch.float64)
    assert (found[0].double() - exact[0]).norm() <= 0.01 * exact[0].norm()


def test_the_product_setting_is_put_back_and_autocast_changes_nothing() -> None:
    lengths = [30, 100]
    tensors = draw(lengths, seed=7)

    def attend(*leaves: Tensor) -> Tensor:
        return tiled_attention(*leaves, bounds_of(lengths), scaling=0.25, window=None)

    plainly = with_gradients(attend, tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(map(torch.equal, plainly, with_gradients(attend, tensors)))
    with pytest.raises(RuntimeError):
        tiled_attention(*tensors[:3], [0, 131], scaling=0.25, window=None)
    assert torch.backends.mkldnn.matmul.fp32_precision == PRECISION_AT_IMPORT


@pytest.mark.skipif(not has_fast_products(), reason="this machine's bf16 products are slow, so sdpa is used")
def test_it_runs_where_it_may_and_only_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 by input or by autocast; never for fp32, soft-capped scores, sinks or dropout."""
    calls: list[int] = []

    def counting(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        return tiled_attention(*args, **kwargs)

    monkeypatch.setattr(documents, "tiled_attention", counting)
    query = torch.randn(1, 2, 12, 8)
    module = nn.Module()
    module.num_key_value_groups = 1
    bounds = torch.tensor([0, 5, 12], dtype=torch.int32)

    def count(tensor: Tensor, **settings: object) -> int:
        calls.clear()
        documents.document_attention(module, tensor, tensor, tensor, None, cu_seq_lens_q=bounds, **settings)
        return len(calls)

    assert count(query) == 0
    assert count(query.bfloat16()) == 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert count(query) == 1
        assert count(query, dropout=0.1) == count(query, softcap=5.0) == count(query, s_aux=torch.zeros(2)) == 0
