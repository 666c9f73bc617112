"""Updates of bf16 weights that lose nothing on average: stochastic rounding, or fp32 master weights.

bf16 has 8 significant bits: rounded to nearest, an update below 1/512 of its weight changes nothing, however many steps
repeat it. Both ways below let an optimizer compute in fp32, one tensor at a time, and differ in what happens then.
Stochastic rounding: Gupta et al. 2015, "Deep Learning with Limited Numerical Precision"; Zamirai et al. 2020,
"Revisiting BFloat16 Training". Master weights: Micikevicius et al. 2018, "Mixed Precision Training".
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

Bf16Update = Literal["stochastic_rounding", "fp32_master"]

MASTER = "master"
"""Entry of a parameter's optimizer state: its fp32 weights."""
COUNT = "rounding_step"
"""Entry of a parameter's optimizer state: how often it was updated, which decides the random bits of the next time."""

_CHUNK_CPU = 1 << 16
"""Numbers that are rounded at once, so that they stay in the cache; a multiple of 4."""
_CHUNK_GPU = 1 << 26
"""The same where launches cost more than memory."""
_HIGH_HALF = slice(1, None, 2) if sys.byteorder == "little" else slice(0, None, 2)
_MASK64 = (1 << 64) - 1


class Fp32Updates:
    """Mixed into an optimizer class, in front of it: `step` works on an fp32 stand-in of each bf16 parameter.

    The optimizer's state is fp32 then. It is found under the model's parameters, so that checkpoints, averages and
    schedules see an ordinary optimizer.
    """

    update: Bf16Update
    seed: int
    numbers: dict[nn.Parameter, int]
    """Of the parameters over all groups, which decide their random bits; also where only some are stepped."""
    param_groups: list[dict[str, Any]]
    state: Any

    def prepare(self, update: Bf16Update, seed: int) -> None:
        """Say how results are written back; `seed` decides all random bits."""
        self.update, self.seed = update, seed
        parameters = (parameter for group in self.param_groups for parameter in group["params"])
        self.numbers = {parameter: number for number, parameter in enumerate(parameters)}
        # Adagrad has state before its first step.
        for parameter in self.numbers.keys() & self.state.keys():
            entries = self.state[parameter]
            entries.update({name: value.float() for name, value in entries.items() if value.dtype == torch.bfloat16})

    def step(self, closure: None = None) -> None:
        """One update of every parameter that has a gradient."""
        assert closure is None, "no optimizer here evaluates the loss again"
        groups = self.param_groups
        try:
            for group, parameter, options in _one_by_one(groups):
                self._step_one(parameter, options)
                if parameter is group["params"][-1]:
                    # Counters that the optimizer keeps per group moved once for each parameter, from the same start.
                    group.update(options, params=group["params"])
        finally:
            self.param_groups = groups

    @torch.no_grad()
    def _step_one(self, parameter: nn.Parameter, options: dict[str, Any]) -> None:
        """Let the optimizer itself update this parameter, or a copy of it, in a group of its own."""
        stand_in = parameter
        if parameter.dtype == torch.bfloat16 and parameter.grad is not None:
            entries = self.state.pop(parameter, {})
            kept = {name: entries.pop(name) for name in (MASTER, COUNT) if name in entries}
            stand_in = nn.Parameter(kept.get(MASTER, parameter).float())
            stand_in.grad = parameter.grad.float()
            self.state[stand_in] = entries
        self.param_groups = [{**options, "params": [stand_in]}]
        super().step()  # type: ignore[misc]  # an optimizer comes next in the order of bases
        options.update({name: value for name, value in self.param_groups[0].items() if name != "params"})
        if stand_in is parameter:
            return
        entries = self.state.pop(stand_in)
        if self.update == "fp32_master":
            entries[MASTER] = stand_in.detach()
            parameter.copy_(stand_in)
        else:
            count = kept.get(COUNT, 0)
            entries[COUNT] = count + 1
            round_stochastically(stand_in, out=parameter, seed=mixed_seed(self.seed, count, self.numbers[parameter]))
        self.state[parameter] = entries


def _one_by_one(groups: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], nn.Parameter, dict[str, Any]]]:
    """(group, parameter, a copy of the group's options as they were before the step)."""
    for group in groups:
        before = {name: value for name, value in group.items() if name != "params"}
        for parameter in group["params"]:
            yield group, parameter, dict(before)


def with_fp32_updates(optimizer: type[Optimizer]) -> Any:
    """A subclass of `optimizer`, of the same name, that updates bf16 parameters in fp32. Call its `prepare` once."""
    members = {"__module__": optimizer.__module__, "__doc__": optimizer.__doc__}
    return type(optimizer.__name__, (Fp32Updates, optimizer), members)


@torch.no_grad()
def round_stochastically(value: Tensor, *, out: Tensor, seed: int) -> None:
    """Write fp32 `value` into bf16 `out` of the same shape: one of its two neighbours, right on average.

    The nearer one comes up with the larger probability, and E[out] = value exactly: adding 16 random bits below the 16
    that bf16 keeps carries with probability (distance from the lower neighbour) ÷ (distance between the two). What is
    exact in bf16 stays as it is, as do infinities and NaN. The bits depend on `seed` and the device type alone.
    """
    assert value.dtype == torch.float32, value.dtype
    assert out.dtype == torch.bfloat16, out.dtype
    generator = torch.Generator(device=value.device).manual_seed(seed)
    values = value.contiguous().view(-1)
    target = out.view(-1) if out.is_contiguous() else torch.empty_like(values, dtype=out.dtype)
    chunk = _CHUNK_CPU if value.device.type == "cpu" else _CHUNK_GPU
    for source, rounded in zip(torch.split(values, chunk), torch.split(target, chunk), strict=True):
        bits = source.view(torch.int32) + _sixteen_bits(len(source), generator)
        bits += 0x8000  # the random numbers are signed
        rounded.view(torch.int16).copy_(bits.view(torch.int16)[_HIGH_HALF])
        # The sum may carry out of a NaN.
        rounded.masked_fill_(source.isnan(), torch.nan)
    if not out.is_contiguous():
        out.copy_(target.view(out.shape))


def _sixteen_bits(count: int, generator: torch.Generator) -> Tensor:
    """int16 [count], uniform in -32768..32767; four numbers out of each 64 random bits."""
    words = torch.empty(-(-count // 4), dtype=torch.int64, device=generator.device)
    words.random_(-(1 << 63), None, generator=generator)
    return words.view(torch.int16)[:count]


def mixed_seed(seed: int, step: int, index: int) -> int:
    """A generator's seed out of three numbers, so that neighbours share no bits (SplitMix64; Steele et al. 2014)."""
    value = 0
    for part in (seed, step, index):
        value = (value ^ part) + 0x9E3779B97F4A7C15 & _MASK64
        value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK64
        value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK64
        value ^= value >> 31
    return value >> 1  # generators take signed numbers on some devices
