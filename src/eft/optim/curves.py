"""Learning-rate curves as closed forms: a factor on each group's own peak, per 0-based optimizer step.

`factor(k, T, W, options)` is the factor that step k (0 ≤ k < T) runs with, T being all steps of the run and W the
warm-up steps. Names that transformers has give transformers' values, bit for bit; `rex`, `one_cycle` and jagged
restarts count the steps the same way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from eft.optim.options import Option


@dataclass(frozen=True)
class ScheduleOptions:
    """Everything a factor may depend on besides the step. Each schedule uses some of it."""

    peak: float = 1.0
    """`learning_rate`; only schedules with an absolute end value look at it."""
    floor: float = 0.0
    """Lowest factor after the peak."""
    constant_share: float | None = None
    """Share of the steps after which the cosine stays at its floor."""
    quadratic_warmup: bool = False
    num_cycles: float = 0.5
    power: float = 1.0
    lr_end: float = 1e-7
    timescale: int | None = None
    num_decay_steps: int = 0
    num_stable_steps: int | None = None
    warmup_type: str = "linear"
    decay_type: str = "cosine"
    div_factor: float = 25.0
    final_div_factor: float = 1e4
    anneal_strategy: str = "cos"
    warmup_lr_rate: float | None = None


@dataclass(frozen=True)
class Restarts:
    """Every `every` steps a fall over `anneal` steps and a rise over `warmup` steps, from and to `low` of the curve."""

    every: int
    warmup: int
    anneal: int
    low: float

    def factor(self, step: int) -> float:
        """What the schedule's own factor is multiplied by at a 0-based step.

        With q = step mod `every`: a rise of (q + 1) / (`warmup` + 1) of the way after each restart, a fall that reaches
        `low` at the cycle's last step. The run's start has the schedule's own warm-up instead of a rise.
        """
        position = step % self.every
        share = 1.0
        if step >= self.every and position < self.warmup:
            share = (position + 1) / (self.warmup + 1)
        elif position >= self.every - self.anneal:
            share = (self.every - 1 - position) / self.anneal
        return share * (1.0 - self.low) + self.low


Factor = Callable[[int, int, int, ScheduleOptions], float]


@dataclass(frozen=True)
class Schedule:
    """One row of the table; calling it gives the factor."""

    factor: Factor
    keys: frozenset[str] = frozenset()
    """Config keys besides `learning_rate` that change the curve; another one set is an error."""
    options: Mapping[str, Option] = field(default_factory=dict)
    """What `lr_scheduler_kwargs` may hold."""
    notes: str = ""

    def __call__(self, step: int, total: int, warmup: int, options: ScheduleOptions) -> float:
        return self.factor(step, total, warmup, options)


def _rise(step: int, warmup: int) -> float:
    return float(step) / float(max(1, warmup))


def _progress(step: int, total: int, warmup: int) -> float:
    return float(step - warmup) / float(max(1, total - warmup))


def _half_cosine(progress: float, num_cycles: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * num_cycles * 2.0 * progress))


def _constant(step: int, total: int, warmup: int, options: ScheduleOptions) -> float:
    return 1.0


def _constant_with_warmup(step: int, total: int, warmup: int, options: ScheduleOptions) -> float:
    return _rise(step, warmup) if step < warmup else 1.0


def _linear(step: int, total: int, warmup: int, options: ScheduleOptions) -> float:
    if step < warmup:
        return _rise(step, warmup)
    return max(0.0, float(total - step) / float(max(1, total - warmup)))


def _cosine(step: int, total: int, warmup: int, options: ScheduleOptions) -> float:
    if step < warmup:
        rise = _rise(step, warmup)
        return rise * rise if options.quadratic_warmup else rise
    if options.constant_share is not None:
        total = int(total * options.constant_share)
        step = max(min(step, total), warmup)
        if total <= warmup:
            return options.floor
    factor = _half_cosine(_progress(step, total, warmup), options.num_cycles)
    return max(0.0, factor * (1 - options.floor) + options.floor)


def _cosine_with_restarts(step: int, total: int, warmup: int, options: ScheduleOptions) -> float:
    if step < warmup:
        return _rise(step, warmup)
    progress = _progress(step, total, warmup)
    if progress >= 1.0:
        return 0.0
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((float(options.num_cycles) * progress) % 1.0))))


def _cosine_warmup_with_min_lr(step: int, total: int, warmup: int, options: ScheduleOptions) -> float:
    if step < warmup:
        if options.warmup_lr_rate is None:
            return (step + 1.0) / max(1.0, float(warmup))
        return options.warmup_lr_rate + (1.0 - options.warmup_lr_rate) * step / max(1.0, warmup - 1.0)
    progress = (step - warmup + 1.0) / max(1.0, float(total - warmup))
    factor = _half_cosine(progress, options.num_cycles)
    return max(0.0, factor * (1 - options.floor) + options.floor)


def _inverse_sqrt(step: int, total: int, warmup: int, options: ScheduleOptions) -> float:
    if step < warmup:
        return _rise(step, warmup)
    timescale = options.timescale or warmup or 10_000
    return 1.0 / math.sqrt((step + timescale - warmup) / timescale)


def _polynomial(step: int, total: int, warmup: int, options: ScheduleOptions) -> float:
    if step < warmup:
        return _rise(step, warmup)
    if step >= total:
        return options.lr_end / options.peak
    remaining = 1 - (step - warmup) / (total - warmup)
    decayed: float = (options.peak - options.lr_end) * remaining**options.power + options.lr_end
    return decayed / options.peak


def _warmup_stable_decay(step: int, total: int, warmup: int, options: ScheduleOptions) -> float:
    decay = options.num_decay_steps
    stable = total - warmup - decay if options.num_stable_steps is None else options.num_stable_steps
    if warmup <= step < warmup + stable:
        return 1.0
    if step < warmup:
        progress = _rise(step, warmup)
        shapes = {"linear": progress, "cosine": 0.5 * (1.0 - math.cos(math.pi * progress))}
        factor = shapes.get(options.warmup_type, 1.0 - math.sqrt(1.0 - progress))
    elif step < warmup + stable + decay:
        progress = float(step - warmup - stable) / float(max(1, decay))
        shapes = {"linear": 1.0 - progress, "cosine": _half_cosine(progress, options.num_cycles)}
        factor = shapes.get(options.decay_type, 1.0 - math.sqrt(progress))
    else:
        return options.floor
    return max(0.0, factor * (1.0 - options.floor) + options.floor)


def _rex(step: int, total: int, warmup: int, options: ScheduleOptions) -> float:
    if step < warmup:
        return _rise(step, warmup)
    remaining = max(0.0, 1.0 - _progress(step, total, warmup))
    return options.floor + (1.0 - options.floor) * remaining / (0.1 + 0.9 * remaining)


def _one_cycle(step: int, total: int, warmup: int, options: ScheduleOptions) -> float:
    start = 1.0 / options.div_factor
    end = start / options.final_div_factor
    turn, last = float(warmup) - 1.0, float(total) - 1.0
    if step <= turn:
        return _anneal(start, 1.0, step / turn if turn > 0 else 1.0, options.anneal_strategy)
    falling = (step - turn) / (last - turn) if last > turn else 1.0
    return _anneal(1.0, end, min(1.0, falling), options.anneal_strategy)


def _anneal(start: float, end: float, share: float, strategy: str) -> float:
    if strategy == "linear":
        return (end - start) * share + start
    return end + (start - end) / 2.0 * (math.cos(math.pi * share) + 1)


_WARMUP = frozenset({"warmup_steps", "warmup_ratio"})
_CYCLES = {"num_cycles": Option("number", "Waves of the cosine; 0.5 falls once.", 0.0)}
_FLOORS = {
    "min_lr": Option("number", "Learning rate at the end.", 0.0),
    "min_lr_rate": Option("number", "The same as a share of the peak.", 0.0, 1.0),
}
_SHAPES = ("linear", "cosine", "1-sqrt")

SCHEDULES: dict[str, Schedule] = {
    "cosine": Schedule(
        _cosine,
        _WARMUP | {"cosine_min_lr_ratio", "cosine_constant_lr_ratio", "lr_quadratic_warmup"},
        _CYCLES,
        "Half a cosine from the peak to 0, or to `cosine_min_lr_ratio`.",
    ),
    "linear": Schedule(_linear, _WARMUP, {}, "A straight line from the peak to 0."),
    "constant": Schedule(_constant, frozenset(), {}, "The peak from the first step on; no warm-up."),
    "constant_with_warmup": Schedule(_constant_with_warmup, _WARMUP, {}, "The peak after the warm-up."),
    "inverse_sqrt": Schedule(
        _inverse_sqrt,
        _WARMUP,
        {"timescale": Option("integer", "Steps over which it falls by √2; default: the warm-up, or 10,000.", 1)},
        "1/√step after the warm-up.",
    ),
    "polynomial": Schedule(
        _polynomial,
        _WARMUP,
        {
            "lr_end": Option("number", "Learning rate at the end.", 0.0),
            "power": Option("number", "Power of the remaining share.", 0.0),
        },
        "A power of the remaining share.",
    ),
    "cosine_with_min_lr": Schedule(
        _cosine,
        _WARMUP | {"cosine_min_lr_ratio"},
        {**_CYCLES, **_FLOORS},
        "`cosine` that ends at `min_lr`, `min_lr_rate` or `cosine_min_lr_ratio`.",
    ),
    "cosine_with_restarts": Schedule(
        _cosine_with_restarts,
        _WARMUP,
        {"num_cycles": Option("integer", "Falls from the peak to 0; 1.", 1)},
        "`num_cycles` halves of a cosine, each from the peak.",
    ),
    "cosine_warmup_with_min_lr": Schedule(
        _cosine_warmup_with_min_lr,
        _WARMUP | {"cosine_min_lr_ratio"},
        {
            **_CYCLES,
            **_FLOORS,
            "warmup_lr_rate": Option("number", "First learning rate as a share of the peak.", 0.0, 1.0),
        },
        "`cosine_with_min_lr` one step ahead: the warm-up starts above 0, the last step has the floor.",
    ),
    "warmup_stable_decay": Schedule(
        _warmup_stable_decay,
        _WARMUP,
        {
            "num_decay_steps": Option("integer", "Steps of the fall at the end.", 1),
            "num_stable_steps": Option("integer", "Steps at the peak; default: all that are left.", 0),
            "warmup_type": Option("choice", "Shape of the rise.", choices=_SHAPES),
            "decay_type": Option("choice", "Shape of the fall.", choices=_SHAPES),
            "min_lr_ratio": Option("number", "First and last factor.", 0.0, 1.0),
            **_CYCLES,
        },
        "Rise, plateau, fall.",
    ),
    "rex": Schedule(
        _rex, _WARMUP | {"cosine_min_lr_ratio"}, {}, "Stays high for long, then falls fast (reflected exponential)."
    ),
    "one_cycle": Schedule(
        _one_cycle,
        _WARMUP,
        {
            "div_factor": Option("number", "Peak divided by the first learning rate.", 1.0),
            "final_div_factor": Option("number", "First learning rate divided by the last.", 1.0),
            "anneal_strategy": Option("choice", "Shape of rise and fall.", choices=("cos", "linear")),
            "pct_start": Option("number", "", use_instead="warmup_ratio"),
            "max_lr": Option("number", "", use_instead="learning_rate"),
        },
        "torch's OneCycleLR values with the warm-up as rising part; each group keeps its peak, momentum stays.",
    ),
}
"""Exactly the names of `config.optim.SchedulerName`."""
