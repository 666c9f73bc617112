"""The learning rate of every step of a run, from its config.

Groups keep their own learning rates, and momentum is never touched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from eft.config.optim import OptimConfig
from eft.core.errors import ConfigError
from eft.core.records import Derived
from eft.optim.curves import SCHEDULES, Restarts, Schedule, ScheduleOptions
from eft.optim.options import check_options

__all__ = [
    "SCHEDULES",
    "build_scheduler",
    "factor_of",
    "learning_rates",
    "restarts_of",
    "schedule_name",
    "schedule_options",
    "warmup_of",
]

DEFAULT_WARMUP_RATIO = 0.03
DEFAULT_WARMUP_LIMIT = 100
DEFAULT_RESTART_FLOOR = 0.001
SCHEDULE_FREE_SCHEDULES = ("constant", "constant_with_warmup")
"""What a schedule-free optimizer may run with: its averaging replaces the decay."""

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
    if name == "cosine_with_restarts":
        values["num_cycles"] = given.pop("num_cycles", 1)
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
    keys = schedule.keys | ({"cosine_min_lr_ratio"} if cfg.jagged_restart_steps is not None else set())
    for key, value in cfg.changed_keys().items():
        if key in _SHAPING_KEYS - keys and value:
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
    if not floors and name in ("cosine_with_min_lr", "cosine_warmup_with_min_lr"):
        raise ConfigError(f"lr_scheduler: {name} needs its floor; set `cosine_min_lr_ratio`, such as 0.1.")
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

    restarts = restarts_of(cfg)

    def factor(step: int) -> float:
        plain = schedule(step, total_steps, warmup, options)
        return plain if restarts is None else plain * restarts.factor(step)

    return factor


def restarts_of(cfg: OptimConfig) -> Restarts | None:
    """Jagged restarts on top of the schedule; None where there are none."""
    if cfg.jagged_restart_steps is None:
        return None
    low = DEFAULT_RESTART_FLOOR if cfg.cosine_min_lr_ratio is None else cfg.cosine_min_lr_ratio
    return Restarts(cfg.jagged_restart_steps, cfg.jagged_restart_warmup_steps, cfg.jagged_restart_anneal_steps, low)


def learning_rates(cfg: OptimConfig, total_steps: int) -> list[float]:
    """The learning rate of every step, by the closed form (E7): what `build_scheduler` then yields, bit for bit."""
    factor = factor_of(cfg, total_steps)
    return [cfg.learning_rate * factor(step) for step in range(total_steps)]


def build_scheduler(cfg: OptimConfig, optimizer: Optimizer, total_steps: int) -> LambdaLR:
    """The schedule over `optimizer`; every group's own learning rate is its peak. Sets the rate of step 0."""
    return LambdaLR(optimizer, factor_of(cfg, total_steps))
