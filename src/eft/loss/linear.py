"""Output head and loss in one: the logits of all trained tokens never exist, only those of a chunk of them.

K trained tokens, H hidden size, V vocabulary entries. Gradients are computed together with the loss, while the chunk's
logits are there, for an upstream gradient of 1; the backward pass multiplies them by the real one. Of the [K, V] logits
and their gradient one chunk is held, in one buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.fsdp import FSDPModule

from eft.loss.objectives import (
    NLL,
    Groups,
    LogitShape,
    Objective,
    add_to_groups,
    arithmetic_dtype,
    row_blocks,
    token_losses,
    weighted_sum,
)

CHUNK_BYTES = 1 << 29
"""Logits of one chunk of rows, in the dtype of the matrix products, where the weight has a gradient.

A chunk costs one pass over that gradient, so few are better. Without it a quarter is as fast.
"""
_FIRST_ROWS = 64
"""Rows of the first chunk where the width of the head's output is not known yet."""
_VOCABULARY_BLOCK = 1 << 11
"""Rows of the weight whose gradient is made at once, so that its copy in another dtype stays small."""


def head_loss(
    hidden: Tensor,
    head: nn.Module,
    targets: Tensor,
    weights: Tensor | None = None,
    *,
    objective: Objective = NLL,
    scale: float = 1.0,
    softcap: float | None = None,
    groups: Groups | None = None,
) -> Tensor:
    """Σ weight · loss of K tokens straight from the hidden states that would enter the output head.

    hidden [K, H] of any floating dtype; head: a module that maps it to z [K, V]; targets int64 [K] in 0..V-1; weights
    float [K] ≥ 0 or None for 1 → a scalar, fp32 (fp64 for fp64 hidden states). The logits are scale · z, or
    softcap · tanh(scale · z / softcap). `groups`: sums that are kept on the way, of which no gradient is taken.

    Gradients reach the hidden states and whatever the head computes with; with K = 0 they are zeros. Under autocast
    the matrix products run in its dtype; the losses are fp32, their sum fp64. An `nn.Linear` is multiplied here; any
    other module (LoRA, say) is called once for each chunk.
    """
    assert hidden.ndim == 2, hidden.shape
    assert targets.shape == hidden.shape[:1], (targets.shape, hidden.shape)
    assert weights is None or weights.shape == targets.shape, weights.shape
    rows = _Rows(targets, weights, objective, LogitShape(scale, softcap), groups)
    linear = plain_linear(head)
    if linear is not None:
        return linear_cross_entropy(hidden, linear.weight, linear.bias, rows)
    # Not `head(...)`: the hooks on it, ours among them, have run for this forward pass.
    if not torch.is_grad_enabled():
        return module_nll(hidden, head.forward, rows)
    return module_cross_entropy(hidden, head.forward, rows)


def plain_linear(head: nn.Module) -> nn.Linear | None:
    """The `nn.Linear` that `head` is, also as peft's trained copy; None where it does anything more."""
    if isinstance(head, ModulesToSaveWrapper):
        active = head.active_adapters
        if head.disable_adapters or len(active) > 1:
            return None
        head = head.modules_to_save[active[0]] if active else head.original_module
    # A subclass, a quantised weight or a replaced forward computes something else. FSDP2's differs in its hooks, which
    # have run: the weight is there as a whole.
    if not isinstance(head, nn.Linear) or "forward" in vars(head):
        return None
    if type(head) is not nn.Linear and type(head).__bases__ != (FSDPModule, nn.Linear):
        return None
    return head if type(head.weight) in (Tensor, nn.Parameter) else None


class _Rows:
    """What belongs to the K tokens beside their hidden states, and the loss of a chunk of them."""

    def __init__(
        self,
        targets: Tensor,
        weights: Tensor | None,
        objective: Objective,
        shape: LogitShape,
        groups: Groups | None = None,
    ) -> None:
        self.targets = targets
        self.weights = weights
        self.objective = objective
        self.shape = shape
        self.groups = groups
        self.total = torch.zeros((), dtype=torch.float64, device=targets.device)

    def add(self, outputs: Tensor, chunk: slice, *, gradient: bool) -> None:
        """Add a chunk's loss to `total`; its head outputs [R, V] become their own gradient if that is asked for."""
        dtype = arithmetic_dtype(outputs.dtype)
        targets = self.targets[chunk]
        weights = None if self.weights is None else self.weights[chunk]
        for rows in row_blocks(outputs):
            chosen = None if weights is None else weights[rows]
            values = outputs[rows].to(dtype)
            losses = token_losses(
                values, targets[rows], chosen, objective=self.objective, shape=self.shape, gradient=gradient
            )
            self.total += weighted_sum(losses, chosen)
            if self.groups is not None:
                start = chunk.start + rows.start
                add_to_groups(self.groups, slice(start, start + len(losses)), losses, chosen)
            if gradient and values.dtype != outputs.dtype:
                outputs[rows] = values


def linear_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: _Rows) -> Tensor:
    """`head_loss` of a linear head: weight [V, H], bias [V] or None."""
    inputs = [hidden, weight] if bias is None else [hidden, weight, bias]
    wanted = [torch.is_grad_enabled() and tensor.requires_grad for tensor in inputs]
    dtype = _product_dtype(weight)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        gradients = _linear_chunks(hidden, weight, bias, dtype, rows, [*wanted, False][:3])
    return _connect(rows.total, inputs, gradients[: len(inputs)], arithmetic_dtype(hidden.dtype))


def _product_dtype(weight: Tensor) -> torch.dtype:
    """What autocast would multiply in; fp64 it leaves alone."""
    device = weight.device.type
    if torch.is_autocast_enabled(device) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return weight.dtype


def _linear_chunks(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, rows: _Rows, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """Adds all losses to `rows`; the gradients of hidden, weight and bias where wanted, each in the input's dtype."""
    of_hidden = torch.empty_like(hidden) if wanted[0] else None
    limit = CHUNK_BYTES if wanted[1] else CHUNK_BYTES // 4
    chunks = list(_chunks(len(hidden), limit // (len(weight) * dtype.itemsize)))
    of_weight = _Accumulated(weight, len(chunks)) if wanted[1] else None
    of_bias = torch.zeros_like(bias, dtype=arithmetic_dtype(dtype)) if bias is not None and wanted[2] else None
    narrow = hidden.to(dtype)
    matrix = weight.to(dtype)
    offset = None if bias is None else bias.to(dtype)
    buffer = matrix.new_empty((chunks[0].stop if chunks else 0, len(weight)))
    for chunk in chunks:
        part = narrow[chunk]
        outputs = buffer[: len(part)]
        if offset is None:
            torch.mm(part, matrix.T, out=outputs)
        else:
            torch.addmm(offset, part, matrix.T, out=outputs)
        rows.add(outputs, chunk, gradient=any(wanted))
        if of_hidden is not None:
            of_hidden[chunk] = outputs @ matrix
        if of_weight is not None:
            of_weight.add(outputs, part)
        if of_bias is not None:
            of_bias += outputs.sum(0, dtype=of_bias.dtype)
    return [
        of_hidden,
        None if of_weight is None else of_weight.finish(),
        None if of_bias is None or bias is None else of_bias.to(bias.dtype),
    ]


def _chunks(rows: int, most: int) -> Iterator[slice]:
    """Slices of about equally many rows, at most `most` or one."""
    count = -(-rows // max(1, most))
    size = -(-rows // count) if count else 0
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size or 1))


class _Accumulated:
    """Σ over chunks of (d loss / d outputs)ᵀ @ hidden, [V, H].

    A chunk's product is rounded to the dtype of the matrix products, on CUDA to fp32; the sum over chunks is fp32.
    """

    def __init__(self, weight: Tensor, num_chunks: int) -> None:
        # One chunk is no sum, and can have the weight's own dtype at once.
        dtype = weight.dtype if num_chunks == 1 else arithmetic_dtype(weight.dtype)
        self._sum = torch.empty_like(weight, dtype=dtype, memory_format=torch.contiguous_format)
        self._dtype = weight.dtype
        self._started = num_chunks == 0
        if num_chunks == 0:
            self._sum.zero_()

    def add(self, gradient: Tensor, hidden: Tensor) -> None:
        """gradient [R, V], hidden [R, H]."""
        for start in range(0, len(self._sum), _VOCABULARY_BLOCK):
            block = slice(start, start + _VOCABULARY_BLOCK)
            into, left = self._sum[block], gradient[:, block].T
            if into.dtype == hidden.dtype:
                torch.addmm(into, left, hidden, beta=int(self._started), out=into)
            elif self._started:
                into += _wide_product(left, hidden)
            else:
                into.copy_(_wide_product(left, hidden))
        self._started = True

    def finish(self) -> Tensor:
        """The sum in the weight's dtype."""
        return self._sum.to(self._dtype)


def _wide_product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, in fp32 where the kernel can leave it unrounded."""
    if left.is_cuda and left.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(left, right, out_dtype=torch.float32)
    return left @ right


def module_nll(hidden: Tensor, head: Callable[[Tensor], Tensor], rows: _Rows) -> Tensor:
    """`head_loss` of any module, without gradients."""
    chunk = slice(0, min(_FIRST_ROWS, len(hidden)))
    while chunk.start < len(hidden):
        outputs = head(hidden[chunk])
        rows.add(outputs.clone(memory_format=torch.contiguous_format), chunk, gradient=False)
        chunk = _following(chunk, outputs, len(hidden))
    return rows.total.to(arithmetic_dtype(hidden.dtype))


def module_cross_entropy(hidden: Tensor, head: Callable[[Tensor], Tensor], rows: _Rows) -> Tensor:
    """`head_loss` of any module: one call for each chunk, and autograd through it alone."""
    source, total = hidden, rows.total
    if not len(hidden):
        # The head runs all the same, on a row of no weight, to find out what it computes with.
        source = hidden.new_zeros(1, hidden.shape[1])
        none = torch.zeros(1, device=hidden.device)
        rows = _Rows(none.long(), none, rows.objective, rows.shape)
    of_hidden = torch.zeros_like(source)
    sums: dict[Tensor, Tensor] = {}
    chunk = slice(0, min(_FIRST_ROWS, len(source)))
    # What a chunk saves is used at once: it must not travel to the host and back where activations are offloaded.
    with saved_tensors_hooks(_as_is, _as_is):
        while chunk.start < len(source):
            part = source[chunk].detach().requires_grad_(hidden.requires_grad)
            outputs = head(part)
            gradient = outputs.detach().clone(memory_format=torch.contiguous_format)
            rows.add(gradient, chunk, gradient=True)
            leaves = _leaves(outputs)
            found = torch.autograd.grad(outputs, leaves, gradient) if leaves else ()
            for leaf, value in zip(leaves, found, strict=True):
                if leaf is part:
                    of_hidden[chunk] = value
                else:
                    _add(sums, leaf, value)
            chunk = _following(chunk, outputs, len(source))
    inputs, gradients = [*sums], [value.to(leaf.dtype) for leaf, value in sums.items()]
    if hidden.requires_grad:
        inputs, gradients = [hidden, *inputs], [of_hidden[: len(hidden)], *gradients]
    return _connect(total, inputs, gradients, arithmetic_dtype(hidden.dtype))


def _following(chunk: slice, outputs: Tensor, rows: int) -> slice:
    """The chunk after `chunk`. How wide its rows are is known from the first one's."""
    most = max(1, CHUNK_BYTES // 4 // (outputs.shape[1] * outputs.element_size()))
    return slice(chunk.stop, min(chunk.stop + most, rows))


def _add(sums: dict[Tensor, Tensor], leaf: Tensor, value: Tensor) -> None:
    if leaf in sums:
        sums[leaf] += value
    else:
        # A copy: autograd may have handed out a view of something that it shares.
        sums[leaf] = value.to(arithmetic_dtype(leaf.dtype), copy=True)


def _leaves(output: Tensor) -> list[Tensor]:
    """The leaf tensors with gradients that `output` was computed from, in the order of a walk through its graph.

    Parameters of `head` would not do: an adapter may compute with a tensor that another module owns.
    """
    found: list[Tensor] = []
    seen: set[Any] = set()
    open_nodes: list[Any] = [output.grad_fn]
    while open_nodes:
        node = open_nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        open_nodes += [following for following, _ in node.next_functions]
    return found


def _as_is(tensor: Tensor) -> Tensor:
    return tensor


def _connect(total: Tensor, inputs: Sequence[Tensor], gradients: Sequence[Tensor | None], dtype: torch.dtype) -> Tensor:
    """`total` in `dtype`, as a function of `inputs` with these gradients."""
    connected: Tensor = _Precomputed.apply(total, dtype, list(gradients), *inputs)  # type: ignore[no-untyped-call]  # torch's has no types
    return connected


class _Precomputed(Function):
    """A scalar whose gradients are known. They are scaled in place, so one backward pass is all there is."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, dtype: torch.dtype, gradients: list[Tensor | None], *_: Tensor) -> Tensor:
        # Not `save_for_backward`: nothing is to copy these to the host or check their version.
        ctx.gradients = gradients
        return total.to(dtype, copy=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("the loss of the output head can be differentiated once; its gradients are spent")
        return (None, None, None, *(None if value is None else value.mul_(upstream) for value in gradients))
