"""The loss where the output head runs: inside the model's own forward pass, without its logits (D5).

Three hooks, asleep unless a loss is asked for, and the model is called as always, through whatever wraps it: autocast
is on, sharded weights are gathered. Before the head: its input is taken, and it gets no rows to multiply. After it: the
loss is computed from that input and the head. After the model: the loss is put into its output, where DDP and FSDP
expect the tensor that is differentiated.

Between the head and the logits some families scale or soft-cap. No list says which: numbers are planted as the head's
output, and the logits that come out tell. A model where they do not keeps its logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eft.models.attention import base_of, probing

_PROBE_SHAPE = (2, 5)
_PROBE_POSITIONS = (0, 3, 4, 8)
_PROBE_SEED = 20_240_817
_LARGEST = 1e4
"""Planted numbers reach far beyond any soft cap."""
_RECIPE_TOLERANCE = 1e-5
_LOSS_EPS = 64
"""Loss of the probe against that of the whole logits, in spacings of the precision, as a share of the largest logit."""


class HeadLoss(Protocol):
    """`loss.linear.head_loss`, its objective given."""

    def __call__(
        self,
        hidden: Tensor,
        head: nn.Module,
        targets: Tensor,
        weights: Tensor | None = None,
        *,
        scale: float = 1.0,
        softcap: float | None = None,
        groups: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor: ...


@dataclass(frozen=True)
class LossHead:
    """What is known about a model's output head: logits are scale · z, or softcap · tanh(scale · z / softcap)."""

    scale: float = 1.0
    softcap: float | None = None

    def __str__(self) -> str:
        capped = "" if self.softcap is None else f", soft cap {self.softcap:g}"
        return f"scale {self.scale:g}{capped}"


@dataclass
class _Request:
    """A loss that is wanted from the next forward pass."""

    positions: Tensor
    """int64 [K], indices into the flattened batch."""
    compute: Callable[[Tensor, nn.Module], Tensor]
    """(hidden states [K, H], head) to the loss."""
    hidden: Tensor | None = None
    is_taken: bool = False
    loss: Tensor | None = None
    is_tied_to_logits: bool = False


_request: ContextVar[_Request | None] = ContextVar("loss_request", default=None)
_planted: ContextVar[Callable[[Tensor], Tensor] | None] = ContextVar("planted_head_output", default=None)
_hooked: WeakSet[nn.Module] = WeakSet()


@contextmanager
def loss_request(
    head: LossHead,
    loss: HeadLoss,
    positions: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    groups: tuple[Tensor, Tensor] | None = None,
) -> Iterator[None]:
    """Inside it the model's forward gives Σ weight · loss of the trained tokens as `output.loss`, and empty logits.

    positions int64 [K], indices into the flattened batch; targets int64 [K]; weights [K] or None; `groups`
    as in `loss.linear.head_loss`. The model must have been through `find_loss_head`.
    """
    arithmetic = partial(loss, scale=head.scale, softcap=head.softcap, groups=groups)

    def compute(hidden: Tensor, module: nn.Module) -> Tensor:
        return arithmetic(hidden, module, targets, weights)

    token = _request.set(_Request(positions, compute))
    try:
        yield
    finally:
        _request.reset(token)


def find_loss_head(
    model: nn.Module, loss: HeadLoss, *, autocast_dtype: torch.dtype | None = None
) -> tuple[LossHead | None, str]:
    """Install the hooks on `model` (peft-wrapped or not) and find out what its logits are made of.

    Three tiny forward passes: the plain logits, planted head outputs, and a loss through the hooks. Modes, gradients
    and random generators stay as they are. `loss` must be the plain NLL.

    Returns:
        The head, or None where the loss must be computed from logits; and how it was found, or why not.
    """
    module = base_of(model).get_output_embeddings()
    if module is None:
        return None, "the model names no output head"
    _install(model, module)
    # A foreign forward may do anything with an empty or a planted tensor; the text is the reason we give.
    try:
        with probing(model, autocast_dtype) as precision:
            head = _read_recipe(model)
            if head is None:
                return None, "its logits are no scaled or soft-capped output of the head"
            fault = _loss_fault(model, head, loss, precision)
    except Exception as error:
        return None, f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    return (None, fault) if fault else (head, str(head))


def _install(model: nn.Module, head: nn.Module) -> None:
    """Hooks once per module: a model may be built upon several times."""
    if head not in _hooked:
        head.register_forward_pre_hook(_before_head)
        head.register_forward_hook(_after_head)
        _hooked.add(head)
    if model not in _hooked:
        model.register_forward_hook(_after_model)
        _hooked.add(model)


def _before_head(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    request = _request.get()
    # A copied model has its hooks twice: the first one counts.
    if request is None or request.is_taken:
        return None
    hidden = args[0]
    request.is_taken = True
    request.hidden = hidden.reshape(-1, hidden.shape[-1]).index_select(0, request.positions)
    return (hidden[..., :0, :], *args[1:])


def _after_head(head: nn.Module, _: tuple[Any, ...], output: Tensor) -> Tensor | None:
    request, plant = _request.get(), _planted.get()
    if request is not None and request.hidden is not None:
        request.loss = request.compute(request.hidden, head)
        # ZeRO-3 gathers a layer for the backward pass where a gradient reaches what the layer has given.
        request.is_tied_to_logits = any(hasattr(parameter, "ds_tensor") for parameter in head.parameters())
        request.hidden = None
    return None if plant is None else plant(output)


def _after_model(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    request = _request.get()
    if request is not None:
        output.loss = request.loss
        if request.is_tied_to_logits:
            output.loss = output.loss + output.logits.sum()  # of none: 0


def _read_recipe(model: nn.Module) -> LossHead | None:
    """Plant numbers between 1e-3 and 1e4 of both signs as the head's output, and read the logits that they become."""
    planted: list[Tensor] = []

    def plant(output: Tensor) -> Tensor:
        if any(output is values for values in planted):
            return output  # the hooks of a copied model run twice
        count = output.numel()
        sizes = torch.logspace(-3, math.log10(_LARGEST), count, dtype=torch.float64)
        values = torch.where(torch.arange(count) % 2 == 0, sizes, -sizes).to(output.device).reshape(output.shape)
        planted.append(values)
        return values

    token = _planted.set(plant)
    try:
        logits = model(input_ids=_probe_ids(model), use_cache=False).logits
    finally:
        _planted.reset(token)
    if len(planted) != 1 or logits.shape != planted[0].shape:
        return None
    values, logits = planted[0].double().flatten(), logits.double().flatten()
    smallest = values.abs().argmin()
    scale = _round_number(float(logits[smallest] / values[smallest]))
    highest = float(logits.abs().max())
    is_capped = not highest >= 0.5 * abs(scale) * _LARGEST
    head = LossHead(scale, _round_number(highest) if is_capped else None)
    expected = scale * values
    if head.softcap is not None:
        expected = head.softcap * torch.tanh(expected / head.softcap)
    # Written so that NaN fails.
    fits = ((logits - expected).abs() <= _RECIPE_TOLERANCE * expected.abs()).all()
    return head if fits and head.softcap != 0 else None


def _round_number(value: float) -> float:
    """What a config would say: seven digits, or the inverse of such a number (models divide as well as multiply)."""
    for candidate in (float(f"{value:.6g}"), 1 / float(f"{1 / value:.6g}") if value else 0.0):
        if math.isclose(candidate, value, rel_tol=1e-7):
            return candidate
    return value


def _loss_fault(model: nn.Module, head: LossHead, loss: HeadLoss, precision: torch.dtype) -> str | None:
    """What is wrong with the loss through the hooks, against torch's own over the plain logits; None if nothing is."""
    ids = _probe_ids(model)
    positions = torch.tensor(_PROBE_POSITIONS, device=ids.device)
    logits = model(input_ids=ids, use_cache=False).logits.flatten(0, 1).double()
    # Unlike targets, so that a mixed-up order would show.
    targets = logits.argsort(1)[torch.arange(len(logits)), torch.arange(len(logits)) * 7 % logits.shape[1]][positions]
    weights = torch.arange(1, len(positions) + 1, dtype=torch.float32, device=ids.device)
    with loss_request(head, loss, positions, targets, weights):
        measured = model(input_ids=ids, use_cache=False).loss
    if measured is None:
        return "its forward does not call the output head as a module"
    expected = (F.cross_entropy(logits[positions], targets, reduction="none") * weights).sum()
    limit = _LOSS_EPS * torch.finfo(precision).eps * float(weights.sum()) * max(1.0, float(logits.abs().max()))
    gap = abs(float(measured) - float(expected))
    return None if gap <= limit else f"a loss through the head is off by {gap:.1e} (limit {limit:.0e})"


def _probe_ids(model: nn.Module) -> Tensor:
    """int64 [2, 5]."""
    base = base_of(model)
    vocabulary = int(base.config.get_text_config().vocab_size)
    # A generator of its own: the run's dropout masks must not depend on whether a probe ran.
    generator = torch.Generator().manual_seed(_PROBE_SEED)
    ids = torch.randint(0, vocabulary, _PROBE_SHAPE, generator=generator)
    return ids.to(base.get_input_embeddings().weight.device)
