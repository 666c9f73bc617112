"""Learning-rate schedules as closed forms: a factor on each group's own peak, per 0-based optimizer step.

`factor(k, T, W, options)` is the factor that step k (0 ≤ k < T) runs with, T being all steps of the run and W the
warm-up steps. Names that transformers has give transformers' values, bit for bit; `rex` and `one_cycle` count the steps
the same way. Groups keep their own learning rates, and momentum is never touched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from eft.config.optim import OptimConfig
from eft.core.errors import ConfigError
from eft.core.records import Derived
from eft.optim.options import Option, check_options

DEFAULT_WARMUP_RATIO = 0.03
DEFAULT_WARMUP_LIMIT = 100
SCHEDULE_FREE_SCHEDULES = ("constant", "constant_with_warmup")
"""What a schedule-free optimizer may run with: its averaging replaces the decay."""


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
        {
            **_CYCLES,
            "min_lr": Option("number", "Learning rate at the end.", 0.0),
            "min_lr_rate": Option("number", "The same as a share of the peak.", 0.0, 1.0),
        },
        "`cosine` that ends at `min_lr`, `min_lr_rate` or `cosine_min_lr_ratio`.",
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

_SHAPING_KEYS = frozenset().union(*(schedule.keys for schedule in SCHEDULES.values()))


def schedule_name(cfg: OptimConfig) -> Derived:
    """The schedule that runs, and why: a schedule-free optimizer replaces the default one.

    Raises:
        ConfigError: a schedule that decays was chosen for a schedule-free optimizer.
    """
    name, optimizer = cfg.lr_scheduler, cfg.optimizer
    if not optimizer.startswith("schedule_free_") or name in SCHEDULE_FREE_SCHEDULES:
        return Derived(name, "lr_scheduler")
    default = type(cfg).model_fields["lr_scheduler"].default
    if name == default:
        return Derived(
            "constant_with_warmup", f"{optimizer} averages instead of decaying, so not the default {default}"
        )
    raise ConfigError(
        f"lr_scheduler: {optimizer} averages its weights instead of decaying the learning rate; with {name!r} it would "
        f"do both. Use {' or '.join(SCHEDULE_FREE_SCHEDULES)}, or leave the key out."
    )


def warmup_of(cfg: OptimConfig, total_steps: int) -> int:
    """Warm-up steps of a run of `total_steps`: `warmup_steps`, else a share by `warmup_ratio`, else 3 %, at most 100.

    Raises:
        ConfigError: both keys are set.
    """
    steps, ratio = cfg.warmup_steps, cfg.warmup_ratio
    if "warmup_steps" not in SCHEDULES[schedule_name(cfg).value].keys:
        return 0
    if steps is not None and ratio is not None:
        raise ConfigError(f"warmup_ratio: `warmup_steps: {steps}` is set too; keep one of the two.")
    if steps is not None:
        return steps
    if ratio is not None:
        return int(ratio * total_steps)
    return min(int(DEFAULT_WARMUP_RATIO * total_steps), DEFAULT_WARMUP_LIMIT)


def schedule_options(cfg: OptimConfig) -> ScheduleOptions:
    """What the chosen schedule takes from the config.

    Raises:
        ConfigError: a key or an option is set that the schedule does not use, or a needed one is missing.
    """
    name = schedule_name(cfg).value
    schedule = SCHEDULES[name]
    _refuse_unused(cfg, name, schedule)
    given = check_options("lr_scheduler_kwargs", cfg.lr_scheduler_kwargs, schedule.options, f"lr_scheduler {name}")
    values: dict[str, Any] = {"peak": cfg.learning_rate}
    if "cosine_min_lr_ratio" in schedule.keys:
        values["floor"] = _floor(cfg, name, given)
    if "cosine_constant_lr_ratio" in schedule.keys:
        if cfg.cosine_constant_lr_ratio is not None and cfg.cosine_min_lr_ratio is None:
            raise ConfigError("cosine_constant_lr_ratio: set `cosine_min_lr_ratio` too, the floor to stay at.")
        values["constant_share"] = cfg.cosine_constant_lr_ratio
        values["quadratic_warmup"] = cfg.lr_quadratic_warmup
    if name == "warmup_stable_decay":
        if "num_decay_steps" not in given:
            raise ConfigError("lr_scheduler_kwargs: warmup_stable_decay needs `num_decay_steps`, such as 100.")
        values["floor"] = given.pop("min_lr_ratio", 0.0)
    options = ScheduleOptions(**values, **given)
    if name == "polynomial" and options.lr_end >= options.peak:
        raise ConfigError(
            f"lr_scheduler_kwargs.lr_end: {options.lr_end:g} must be below the learning_rate {options.peak:g}."
        )
    return options


def _refuse_unused(cfg: OptimConfig, name: str, schedule: Schedule) -> None:
    for key, value in cfg.changed_keys().items():
        if key in _SHAPING_KEYS - schedule.keys and value:
            users = ", ".join(sorted(other for other, row in SCHEDULES.items() if key in row.keys))
            raise ConfigError(f"{key}: not used by lr_scheduler {name}; remove it, or choose one of: {users}.")


def _floor(cfg: OptimConfig, name: str, given: dict[str, Any]) -> float:
    """The floor as a share of the peak, from the one key that sets it; takes its options out of `given`."""
    floors: dict[str, float] = {}
    if cfg.cosine_min_lr_ratio is not None:
        floors["cosine_min_lr_ratio"] = cfg.cosine_min_lr_ratio
    if "min_lr" in given:
        floors["lr_scheduler_kwargs.min_lr"] = given.pop("min_lr") / cfg.learning_rate
    if "min_lr_rate" in given:
        floors["lr_scheduler_kwargs.min_lr_rate"] = given.pop("min_lr_rate")
    if len(floors) > 1:
        first, second, *_ = floors
        raise ConfigError(f"{second}: {first} sets the same floor; keep one of them.")
    if not floors and name == "cosine_with_min_lr":
        raise ConfigError("lr_scheduler: cosine_with_min_lr needs its floor; set `cosine_min_lr_ratio`, such as 0.1.")
    key, value = next(iter(floors.items()), ("", 0.0))
    if value > 1.0:
        raise ConfigError(f"{key}: the floor is {value:g} times the learning_rate {cfg.learning_rate:g}; at most 1.")
    return value


def _check_fit(name: str, total_steps: int, warmup: int, options: ScheduleOptions) -> None:
    if name != "warmup_stable_decay":
        return
    needed = warmup + (options.num_stable_steps or 0) + options.num_decay_steps
    if needed > total_steps:
        raise ConfigError(
            f"lr_scheduler_kwargs.num_decay_steps: warm-up {warmup} + plateau {options.num_stable_steps or 0} + fall "
            f"{options.num_decay_steps} = {needed} steps, but the run has {total_steps}."
        )


def factor_of(cfg: OptimConfig, total_steps: int) -> Callable[[int], float]:
    """The factor per 0-based step of a run of `total_steps`, as a plain function.

    Raises:
        ConfigError: the schedule's keys or options are wrong, unused, or do not fit into the steps.
    """
    name = schedule_name(cfg).value
    schedule, options, warmup = SCHEDULES[name], schedule_options(cfg), warmup_of(cfg, total_steps)
    _check_fit(name, total_steps, warmup, options)

    def factor(step: int) -> float:
        return schedule(step, total_steps, warmup, options)

    return factor


def learning_rates(cfg: OptimConfig, total_steps: int) -> list[float]:
    """The learning rate of every step, by the closed form (E7): what `build_scheduler` then yields, bit for bit."""
    factor = factor_of(cfg, total_steps)
    return [cfg.learning_rate * factor(step) for step in range(total_steps)]


def build_scheduler(cfg: OptimConfig, optimizer: Optimizer, total_steps: int) -> LambdaLR:
    """The schedule over `optimizer`; every group's own learning rate is its peak. Sets the rate of step 0."""
    return LambdaLR(optimizer, factor_of(cfg, total_steps))
