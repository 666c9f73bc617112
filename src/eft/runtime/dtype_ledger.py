"""Which dtype weights, gradients, optimizer state, buffers, sums and products of a training have, and should have.

Looked at after the first step, on the live tensors. Precision lost in silence (fp16 where bf16 was asked for, a bf16
rotary table, state that fell back to fp32) changes no curve that anybody would notice.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from eft.core.records import PromiseResult

TITLE = "weights, gradients, optimizer state, buffers, sums and products have the dtypes that were announced"
_NAMED = 4
_ROTARY = "inv_freq"
_BLOCK = 4096
"""State of smaller tensors stays fp32 where larger ones are quantised."""

STATE_DTYPES: dict[str, frozenset[torch.dtype]] = {
    "fp32": frozenset({torch.float32}),
    "factored fp32": frozenset({torch.float32}),
    "none": frozenset({torch.float32}),
    "8-bit": frozenset({torch.float32, torch.uint8}),
    "4-bit": frozenset({torch.float32, torch.uint8}),
    "fp8": frozenset({torch.float32, torch.float8_e4m3fn}),
}
"""What an optimizer's state may hold, by what its row of the table promises."""


@dataclass(frozen=True)
class Entry:
    """One tensor."""

    part: str
    name: str
    dtype: torch.dtype
    numbers: int


@dataclass(frozen=True)
class Announced:
    """What the config and the machine decided."""

    trained: frozenset[torch.dtype]
    """Of trained weights: fp32; for pure bf16 also bf16."""
    state: str
    """Key of `STATE_DTYPES`."""
    products: torch.dtype
    """Of matrix products: autocast's, or that of the weights."""


def dtype_entries(model: nn.Module, optimizer: Optimizer, loss: Tensor | None = None) -> Iterator[Entry]:
    """Every floating or quantised tensor of a training, once; gradients where there are any at the moment."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for name, weight in model.named_parameters():
        yield Entry("trained weights" if weight.requires_grad else "frozen weights", name, weight.dtype, weight.numel())
        if weight.grad is not None:
            yield Entry("gradients", name, weight.grad.dtype, weight.grad.numel())
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point():
            yield Entry("buffers", name, buffer.dtype, buffer.numel())
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                yield from (
                    Entry("optimizer state", f"{names.get(id(parameter), '?')}/{key}", inner.dtype, inner.numel())
                    for inner in plain_tensors(value)
                )
    if loss is not None:
        yield Entry("loss sum", "loss", loss.dtype, loss.numel())


def plain_tensors(value: Tensor) -> list[Tensor]:
    """The tensors that a wrapper subclass is made of; a plain tensor itself."""
    flatten = getattr(value, "__tensor_flatten__", None)
    if flatten is None or type(value) in (Tensor, nn.Parameter):
        return [value]
    parts, _ = flatten()
    inside = (getattr(value, part) for part in parts)
    # A DTensor's parts name its mesh, too.
    return [inner for part in inside if isinstance(part, Tensor) for inner in plain_tensors(part)]


def check_dtypes(
    model: nn.Module,
    optimizer: Optimizer,
    announced: Announced,
    loss: Tensor | None = None,
    products: Mapping[str, torch.dtype] | None = None,
) -> PromiseResult:
    """The ledger as one line, and every surprise by name; call it after a step, before its gradients are dropped.

    `products`: what modules gave in that step's forward pass, by their names.
    """
    entries = list(dtype_entries(model, optimizer, loss))
    entries += [Entry("products", name, dtype, 1) for name, dtype in (products or {}).items()]
    faults = [*_surprises(model, entries, announced)]
    numbers = {"tensors": float(len(entries)), "surprises": float(len(faults))}
    detail = "; ".join([*faults[:_NAMED], *([f"{len(faults) - _NAMED} more"] if len(faults) > _NAMED else [])])
    line = "; ".join(filter(None, [detail, ledger_line(entries)]))
    return PromiseResult("dtypes", TITLE, "fail" if faults else "pass", line, numbers)


def ledger_line(entries: Iterable[Entry]) -> str:
    """`trained weights float32 (1,234); gradients float32 (1,234); …`: numbers by part and dtype, in that order."""
    sums: dict[str, dict[torch.dtype, int]] = {}
    for entry in entries:
        of_part = sums.setdefault(entry.part, {})
        of_part[entry.dtype] = of_part.get(entry.dtype, 0) + entry.numbers
    return "; ".join(
        f"{part} " + ", ".join(f"{_name(dtype)} ({count:,})" for dtype, count in by_dtype.items())
        for part, by_dtype in sorted(sums.items(), key=lambda item: _ORDER.index(item[0]))
    )


_ORDER = ("trained weights", "frozen weights", "gradients", "optimizer state", "buffers", "loss sum", "products")


def _surprises(model: nn.Module, entries: list[Entry], announced: Announced) -> Iterator[str]:
    sums = {name: parameter.grad_dtype or parameter.dtype for name, parameter in model.named_parameters()}
    allowed = STATE_DTYPES[announced.state]
    for entry in entries:
        expected: Iterable[torch.dtype] | None = None
        if entry.part == "trained weights":
            expected = announced.trained
        elif entry.part == "gradients":
            expected = {sums[entry.name]}
        elif entry.part == "optimizer state":
            expected = allowed
        elif entry.part == "products":
            expected = {announced.products}
        elif entry.part == "loss sum" or (entry.part == "buffers" and entry.name.endswith(_ROTARY)):
            expected = {torch.float32, torch.float64}
        if expected is not None and entry.dtype not in expected:
            words = " or ".join(sorted(_name(dtype) for dtype in expected))
            yield f"{entry.part} of {entry.name}: {_name(entry.dtype)}, announced {words}"
    if allowed > {torch.float32}:
        yield from _unquantised(entries, announced.state)


def _unquantised(entries: list[Entry], state: str) -> Iterator[str]:
    """Large matrices whose state should be quantised, and is not."""
    large = {entry.name for entry in entries if entry.part == "trained weights" and entry.numbers >= _BLOCK}
    kept: dict[str, set[torch.dtype]] = {}
    for entry in entries:
        name, _, _ = entry.name.rpartition("/")
        if entry.part == "optimizer state" and name in large:
            kept.setdefault(name, set()).add(entry.dtype)
    if kept and all(dtypes == {torch.float32} for dtypes in kept.values()):
        yield f"optimizer state of {next(iter(kept))}: float32 only, announced {state}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
