"""Where ZeRO keeps the numbers of each tensor: what saving and loading ask of it.

ZeRO lines up the parameters of a group in one flat buffer, and each process updates a run of it. With stages 1 and 2
the weights are whole on every process, and only the optimizer's state lies in that run; with stage 3 each parameter is
cut into equal runs, one per process, and so is its state. The attributes that say so are those of deepspeed 0.19, which
its own universal checkpoints read (`deepspeed.checkpoint`); the tests of resuming fail where they change.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from eft.core.errors import CheckpointError


class Span(NamedTuple):
    """Neighbouring numbers of one tensor that lie here."""

    flat: Tensor
    """The buffer that they lie in."""
    offset: int
    """Of the first one in the buffer."""
    start: int
    """Its index in the flattened whole."""
    length: int

    def of(self, buffer: Tensor) -> Tensor:
        """The numbers, in a buffer laid out like `flat`: memory of it."""
        return buffer.narrow(0, self.offset, self.length)

    @property
    def part(self) -> slice:
        """Which of the flattened whole they are."""
        return slice(self.start, self.start + self.length)


def is_partitioned(tensor: Tensor) -> bool:
    """Whether this is a parameter under stage 3, whose own data are empty between uses."""
    return hasattr(tensor, "ds_tensor")


def whole_parameter(parameter: Any) -> Tensor:
    """All of a parameter under stage 3, gathered from all processes, which must all ask for it."""
    return _gathered(_span_of_weights(parameter), parameter.ds_tensor, parameter.ds_shape)


def _span_of_weights(parameter: Any) -> Span:
    # Every process has a span of the same length; the last ones may end behind the tensor.
    length = parameter.ds_tensor.ds_numel
    start = min(dist.get_rank() * length, parameter.ds_numel)
    return Span(parameter.ds_tensor, 0, start, min(length, parameter.ds_numel - start))


def _span_of_state(parameter: Any, flat: Tensor) -> Span:
    """`flat`: the buffer of the parameter's group, for stages 1 and 2."""
    if is_partitioned(parameter):
        zero, weights = parameter._z3_optimizer, _span_of_weights(parameter)
        group, offset, _ = zero.grad_position[zero.get_param_id(parameter)]
        return Span(zero.fp32_partitioned_groups_flat[group], offset, weights.start, weights.length)
    mapping = parameter._hp_mapping
    if mapping is None:
        return Span(flat, 0, 0, 0)
    here, whole = mapping.hp_fragment_address, mapping.lp_fragment_address
    return Span(flat, here.start, whole.start, whole.numel)


def _gathered(span: Span, buffer: Tensor, shape: torch.Size) -> Tensor:
    whole = torch.zeros(prod(shape), dtype=buffer.dtype, device=buffer.device)
    whole[span.part] = span.of(buffer)
    # As bytes, each of which is zero on all processes but one: even the sign of a zero arrives.
    dist.all_reduce(whole.view(torch.uint8))
    return whole.view(shape)


class ZeroShards:
    """`runtime.sharding.Sharding` under ZeRO. Processes count as in the default group."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank = rank
        self.world_size = world_size
        self._groups: list[list[nn.Parameter]] = []
        self._group_of: dict[int, int] = {}
        """Number of each parameter's group, by the parameter's id."""
        self._optimizer: Optimizer | None = None
        """Whose state is looked at: inside `by_parameter`."""
        self._stand_ins: dict[int, tuple[Tensor, Span, Tensor]] = {}
        """By their ids: a tensor without memory of a state's whole shape, where its numbers lie, in which buffer."""

    def build(self, build: Callable[[nn.Module], Optimizer], model: nn.Module) -> Optimizer:
        """An optimizer of `model`, whose groups are remembered: DeepSpeed will put its flat buffers in their place."""
        optimizer = build(model)
        self._groups = [list(group["params"]) for group in optimizer.param_groups]
        self._group_of = {id(member): number for number, members in enumerate(self._groups) for member in members}
        return optimizer

    def whole_shape(self, name: str, live: Any) -> torch.Size:
        """Of a parameter under stage 3 what it was before."""
        shape: torch.Size = live.ds_shape if is_partitioned(live) else live.shape
        return shape

    def whole(self, name: str, live: Tensor) -> Tensor:
        """Gathered from the runs of all processes."""
        if id(live) in self._stand_ins:
            _, span, buffer = self._stand_ins[id(live)]
            return _gathered(span, buffer, live.shape)
        return whole_parameter(live) if is_partitioned(live) else live

    def part(self, name: str, live: Tensor) -> tuple[slice, ...] | slice:
        """A span of the flattened whole; () for weights under stages 1 and 2."""
        if self._optimizer is not None:
            return self._state_span(live).part
        return _span_of_weights(live).part if is_partitioned(live) else ()

    def local(self, name: str, live: Any) -> Tensor:
        """The memory of that span."""
        memory: Tensor = _span_of_weights(live).of(live.ds_tensor) if is_partitioned(live) else live
        return memory

    def like(self, name: str, parameter: Tensor, part: Tensor) -> Tensor:
        """Put into the buffer of that state, made where there is none yet; what comes back only has a shape."""
        assert self._optimizer is not None
        span, key = self._state_span(parameter), name.rpartition("/")[2]
        state = self._optimizer.state[span.flat]
        if key not in state:
            state[key] = torch.zeros_like(span.flat, requires_grad=False)
        span.of(state[key]).copy_(part)
        return torch.empty(self.whole_shape(name, parameter), dtype=part.dtype, device="meta")

    def loaded(self, model: nn.Module) -> None:
        """The weights of `model` were filled: their fp32 copies follow, which are what is updated."""
        with torch.no_grad():
            for parameter in model.parameters():
                self._follow(parameter)

    def _follow(self, parameter: Any) -> None:
        if not is_partitioned(parameter):
            if getattr(parameter, "_hp_mapping", None) is not None:
                parameter._hp_mapping.update_hp()
            return
        if parameter.requires_grad:
            span = _span_of_state(parameter, parameter)
            span.of(span.flat).copy_(_span_of_weights(parameter).of(parameter.ds_tensor))
        if parameter.ds_status.name == "AVAILABLE":
            parameter.partition()  # small ones stay whole between uses: they are gathered again at the next

    @contextmanager
    def by_parameter(self, optimizer: Optimizer) -> Iterator[Optimizer]:
        """`optimizer` as it would be over the model's own parameters: what is loaded into it reaches the live one."""
        view: Optimizer = object.__new__(type(optimizer))
        view.param_groups = [
            {**group, "params": members} for group, members in zip(optimizer.param_groups, self._groups, strict=True)
        ]
        self._optimizer = optimizer
        self._stand_ins = {}
        view.state = defaultdict(dict, {member: self._state_of(member) for group in self._groups for member in group})
        try:
            yield view
            self._take_over(view, optimizer)
        finally:
            self._optimizer = None

    def _state_span(self, parameter: Any) -> Span:
        assert self._optimizer is not None
        flats = self._optimizer.param_groups[self._group_of[id(parameter)]]["params"]
        return _span_of_state(parameter, flats[0] if flats else parameter)

    def _state_of(self, parameter: nn.Parameter) -> dict[str, Any]:
        """As an optimizer over parameters keeps it: tensors of the parameter's shape are stand-ins."""
        assert self._optimizer is not None
        span = self._state_span(parameter)
        state = {}
        for key, value in self._optimizer.state.get(span.flat, {}).items():
            state[key] = value
            if isinstance(value, Tensor) and value.shape == span.flat.shape:
                shape = self.whole_shape(key, parameter)
                state[key] = torch.empty(shape, dtype=value.dtype, device="meta")
                self._stand_ins[id(state[key])] = (state[key], span, value)
        return state

    def _take_over(self, view: Optimizer, optimizer: Optimizer) -> None:
        """Options of the groups, and what a buffer has once for all its parameters: the count of steps."""
        for group, live in zip(view.param_groups, optimizer.param_groups, strict=True):
            live.update({name: value for name, value in group.items() if name != "params"})
        counted: dict[tuple[int, str], Any] = {}
        for member, state in view.state.items():
            flat = self._state_span(member).flat
            for key, value in state.items():
                if isinstance(value, Tensor) and value.shape == self.whole_shape(key, member):
                    continue
                first = counted.setdefault((id(flat), key), value)
                if first is not value and first != value:
                    raise CheckpointError(
                        f"deepspeed: the checkpoint has {key} {float(first):g} for some parameters and "
                        f"{float(value):g} for others, but ZeRO counts them together; continue without `deepspeed`."
                    )
                optimizer.state[flat][key] = value
