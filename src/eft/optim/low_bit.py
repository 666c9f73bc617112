"""AdamW of torchao with moments of 8 or 4 bits, or float8, through tensors that are plain outside of the step.

torchao keeps its moments in tensor subclasses and learning rates in fp32 tensors. Here the state holds the subclasses'
inner tensors and the rate stays Python's float, so that checkpoints store both exactly and the schedule's rates are the
closed form's (E7); only while stepping both are what torchao wants. Li et al. 2023, "Memory Efficient Optimizers with
4-bit States"; Dettmers et al. 2022 for 8 bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
import torchao.optim as low_bit
from torch import Tensor, nn
from torchao.optim.subclass_4bit import OptimState4bit
from torchao.optim.subclass_8bit import OptimState8bit
from torchao.optim.subclass_fp8 import OptimStateFp8

_SMALLEST = 4096
"""Numbers; smaller tensors keep fp32 moments."""
_COMPILED_FROM = 1 << 20
"""Numbers of a tensor from which on compiling its update pays off on a CPU."""
_SIGNED = {"exp_avg": True, "exp_avg_sq": False}


class _LowBit:
    """Mixed in front of torchao's class."""

    holder: ClassVar[type]
    """The tensor subclass of the moments."""
    bits: ClassVar[int]
    codes: ClassVar[torch.dtype] = torch.uint8
    map_bytes: ClassVar[int]
    """Of the table of values that the bits stand for."""
    block_size: int
    param_groups: list[dict[str, Any]]
    state: Any

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Undo that the learning rate becomes a tensor."""
        rate = param_group.get("lr", self.defaults["lr"])  # type: ignore[attr-defined]  # of the base that follows
        super().add_param_group(param_group)  # type: ignore[misc]  # an optimizer follows in the order of bases
        self.param_groups[-1]["lr"] = rate

    def step(self, closure: None = None) -> None:
        """One update of every parameter that has a gradient."""
        assert closure is None, "no optimizer here evaluates the loss again"
        groups = self.param_groups
        try:
            for group in groups:
                rate = torch.tensor(group["lr"], dtype=torch.float32)
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self.param_groups = [{**group, "lr": rate, "params": [parameter]}]
                        self._step_parameter(parameter)
        finally:
            self.param_groups = groups

    def _step_parameter(self, parameter: nn.Parameter) -> None:
        state = self.state[parameter]
        for name in _SIGNED:
            if f"{name}.codes" in state:
                inner = {part: state.pop(f"{name}.{part}") for part in _attributes(self.holder)}
                state[name] = self._held(name, inner, parameter)
        small = parameter.device.type == "cpu" and parameter.numel() < _COMPILED_FROM
        with torch.compiler.set_stance("force_eager") if small else nullcontext():
            super().step()  # type: ignore[misc]  # an optimizer follows in the order of bases
        for name in _SIGNED:
            if isinstance(state[name], self.holder):
                state.update({f"{name}.{part}": value for part, value in _parts(state.pop(name))})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As the base class, which turns every tensor into the parameter's dtype; codes are turned back, exactly."""
        super().load_state_dict(state_dict)  # type: ignore[misc]  # an optimizer follows in the order of bases
        for state in self.state.values():
            for name in _SIGNED:
                if f"{name}.codes" in state:
                    state[f"{name}.codes"] = state[f"{name}.codes"].to(self.codes)

    def _held(self, name: str, inner: dict[str, Tensor], parameter: nn.Parameter) -> Tensor:
        facts = {
            OptimState8bit: (_SIGNED[name], parameter.dtype),
            OptimState4bit: (_SIGNED[name], parameter.shape, parameter.dtype),
            OptimStateFp8: (parameter.dtype,),
        }
        held: Tensor = self.holder(*inner.values(), *facts[self.holder])
        return held

    def state_bytes(self, parameter: nn.Parameter, group: dict[str, Any]) -> int:
        """Bytes of the state of `parameter`, its step count included."""
        numbers = parameter.numel()
        if numbers < _SMALLEST or numbers % self.block_size:
            return 4 + 8 * numbers
        return 4 + 2 * (numbers * self.bits // 8 + 4 * numbers // self.block_size + self.map_bytes)


def _parts(value: Any) -> Iterator[tuple[str, Tensor]]:
    return ((part, getattr(value, part)) for part in _attributes(type(value)))


def _attributes(holder: Any) -> list[str]:
    """Names of the tensors that one is made of."""
    names: list[str] = holder.tensor_attrs
    return names


class TorchaoAdamW8bit(_LowBit, low_bit.AdamW8bit):
    """AdamW with 8-bit moments."""

    holder, bits, map_bytes = OptimState8bit, 8, 1024


class TorchaoAdamW4bit(_LowBit, low_bit.AdamW4bit):
    """AdamW with 4-bit moments."""

    holder, bits, map_bytes = OptimState4bit, 4, 64


class TorchaoAdamWFp8(_LowBit, low_bit.AdamWFp8):
    """AdamW with moments in float8_e4m3fn."""

    holder, bits, map_bytes = OptimStateFp8, 8, 0
    codes = torch.float8_e4m3fn
