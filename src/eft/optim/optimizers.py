"""The optimizers that a config can name: one table, one function."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from torch import nn
from torch.optim import Optimizer

from eft.config.optim import OptimConfig
from eft.core.errors import ConfigError, ModelError
from eft.optim.averaging import evaluation_state_dict, evaluation_weights, is_schedule_free
from eft.optim.bf16 import Bf16Update, Fp32Updates, with_fp32_updates
from eft.optim.options import Option, check_options
from eft.optim.param_groups import param_groups

__all__ = [
    "OPTIMIZERS",
    "OptimizerRow",
    "build_optimizer",
    "evaluation_state_dict",
    "evaluation_weights",
    "is_schedule_free",
    "silent_steps",
]

Arguments = Callable[[OptimConfig], dict[str, Any]]
"""The constructor arguments that come from config keys."""


@dataclass(frozen=True)
class OptimizerRow:
    """One optimizer: where its class is, what it takes from the config and from `optim_args`."""

    package: str
    """What to import it from pip as; in the `optimizers` extra unless it is a dependency."""
    module: str
    attribute: str
    arguments: Arguments
    keys: frozenset[str] = frozenset()
    """Of the keys that not every optimizer has, those that this one uses; another one set is an error."""
    options: Mapping[str, Option] = field(default_factory=dict)
    """What `optim_args` may hold."""
    notes: str = ""
    silent: Callable[[OptimConfig], int] = lambda cfg: 0
    """Steps at the start that move no weight, by design."""


def _no_arguments(cfg: OptimConfig) -> dict[str, Any]:
    return {}


def _betas(cfg: OptimConfig) -> dict[str, Any]:
    return {"betas": (cfg.adam_beta1, cfg.adam_beta2)}


def _adam(cfg: OptimConfig) -> dict[str, Any]:
    return {"betas": (cfg.adam_beta1, cfg.adam_beta2), "eps": cfg.adam_epsilon}


def _fused_adam(cfg: OptimConfig) -> dict[str, Any]:
    return {**_adam(cfg), "fused": True}


def _adopt(cfg: OptimConfig) -> dict[str, Any]:
    return {**_adam(cfg), "weight_decouple": True}


def _scheduled_adafactor(cfg: OptimConfig) -> dict[str, Any]:
    # Its own relative steps would replace the learning-rate schedule (E7).
    return {"relative_step": False, "warmup_init": False, "scale_parameter": False}


def _uncertain_steps(cfg: OptimConfig) -> int:
    """RAdam's steps until its second moment is certain enough (ρ > 4, Liu et al. 2020)."""
    if not (cfg.optim_args or {}).get("silent_sgd_phase", True):
        return 0
    beta = cfg.adam_beta2
    limit = 2 / (1 - beta) - 1
    if limit <= 4:
        return 0  # it never is: nothing would ever move, and the audit shall say so
    return next(k for k in count() if limit - 2 * (k + 1) * beta ** (k + 1) / (1 - beta ** (k + 1)) > 4)


_BETAS = frozenset({"adam_beta1", "adam_beta2"})
_ADAM = _BETAS | {"adam_epsilon"}
_SPECIFIC_KEYS = _ADAM
"""Keys that only some optimizers use."""

_SET_BY_CONFIG = {
    "lr": Option("number", "", use_instead="learning_rate"),
    "weight_decay": Option("number", "", use_instead="weight_decay"),
    "betas": Option("pair", "", use_instead="adam_beta1` and `adam_beta2"),
    "eps": Option("number", "", use_instead="adam_epsilon"),
}
_FOREACH = {"foreach": Option("switch", "One kernel for many tensors; more memory.")}
_AVERAGING = {
    **_FOREACH,
    "r": Option("number", "Power of the step in the average's weights.", 0.0),
    "weight_lr_power": Option("number", "Power of the learning rate in the average's weights.", 0.0),
    "warmup_steps": Option("integer", "", use_instead="warmup_steps"),
}

OPTIMIZERS: dict[str, OptimizerRow] = {
    "adamw_torch": OptimizerRow(
        "torch",
        "torch.optim",
        "AdamW",
        _adam,
        _ADAM,
        {**_SET_BY_CONFIG, **_FOREACH, "amsgrad": Option("switch", "Divide by the largest second moment so far.")},
        "AdamW, one kernel per operation.",
    ),
    "adamw_torch_fused": OptimizerRow(
        "torch",
        "torch.optim",
        "AdamW",
        _fused_adam,
        _ADAM,
        {**_SET_BY_CONFIG, "amsgrad": Option("switch", "Divide by the largest second moment so far.")},
        "AdamW in one kernel; the fastest.",
    ),
    "sgd": OptimizerRow(
        "torch",
        "torch.optim",
        "SGD",
        _no_arguments,
        frozenset(),
        {
            **_SET_BY_CONFIG,
            **_FOREACH,
            "momentum": Option("number", "Share of the last update that is kept.", 0.0),
            "dampening": Option("number", "Share of the gradient that momentum leaves out.", 0.0),
            "nesterov": Option("switch", "Nesterov's momentum."),
        },
        "Weight decay is added to the gradient; with momentum that is not the decoupled form.",
    ),
    "adafactor": OptimizerRow(
        "transformers",
        "transformers.optimization",
        "Adafactor",
        _scheduled_adafactor,
        frozenset(),
        {
            **{key: option for key, option in _SET_BY_CONFIG.items() if key not in ("eps", "betas")},
            "eps": Option("pair", "Added to the squared gradient; smallest scale of a parameter.", None),
            "clip_threshold": Option("number", "Largest root mean square of an update.", 0.0),
            "decay_rate": Option("number", "Power of the step in the second-moment decay."),
            "beta1": Option("number", "First-moment decay; none by default.", 0.0),
            "scale_parameter": Option("switch", "Scale the learning rate by the parameter's root mean square."),
        },
        "Second moments factored into rows and columns; follows the learning-rate schedule.",
    ),
    "lion_pytorch": OptimizerRow(
        "pytorch_optimizer",
        "pytorch_optimizer.optimizer.lion",
        "Lion",
        _betas,
        _BETAS,
        {
            **{key: option for key, option in _SET_BY_CONFIG.items() if key != "eps"},
            **_FOREACH,
            "weight_decouple": Option("switch", "Decay apart from the gradient (default true)."),
            "cautious": Option("switch", "Update only where it agrees with the gradient's sign."),
        },
        "Sign of the momentum; wants 3 to 10 times less learning rate than AdamW. Its authors use adam_beta2 0.99.",
    ),
    "adopt_adamw": OptimizerRow(
        "pytorch_optimizer",
        "pytorch_optimizer.optimizer.adopt",
        "ADOPT",
        _adopt,
        _ADAM,
        {
            **_SET_BY_CONFIG,
            **_FOREACH,
            "cautious": Option("switch", "Update only where it agrees with the gradient's sign."),
        },
        "Adam that divides by the previous second moment; the first step only measures it. "
        "Its authors use adam_beta2 0.9999 and adam_epsilon 1e-6.",
    ),
    "schedule_free_adamw": OptimizerRow(
        "schedulefree",
        "eft.optim.schedule_free",
        "ScheduleFreeAdamW",
        _adam,
        _ADAM,
        {**_SET_BY_CONFIG, **_AVERAGING},
        "AdamW with averaging instead of a decaying learning rate.",
    ),
    "schedule_free_sgd": OptimizerRow(
        "schedulefree",
        "eft.optim.schedule_free",
        "ScheduleFreeSGD",
        _no_arguments,
        frozenset(),
        {
            **{key: option for key, option in _SET_BY_CONFIG.items() if key not in ("eps", "betas")},
            **_AVERAGING,
            "momentum": Option("number", "Where between iterate and average gradients are taken.", 0.0),
        },
        "SGD with averaging instead of a decaying learning rate.",
    ),
    "schedule_free_radam": OptimizerRow(
        "schedulefree",
        "eft.optim.schedule_free",
        "ScheduleFreeRAdam",
        _adam,
        _ADAM,
        {
            **_SET_BY_CONFIG,
            **_AVERAGING,
            "silent_sgd_phase": Option("switch", "No update while the second moment is still too uncertain."),
        },
        "RAdam with averaging; its first steps do not move the weights.",
        _uncertain_steps,
    ),
}
"""Exactly the names of `config.optim.OptimizerName`."""


def build_optimizer(
    cfg: OptimConfig, model: nn.Module, *, bf16_update: Bf16Update | None = None, seed: int = 0
) -> Optimizer:
    """The optimizer that `cfg` names over the trainable parameters of `model`, in the groups of `param_groups`.

    Args:
        bf16_update: how updates reach bf16 parameters (`optim.bf16`); None where none is trained in bf16.
        seed: of the random bits of stochastic rounding.

    Raises:
        ConfigError: an option or key that this optimizer does not use, or a missing package.
        ModelError: no trainable parameter, or parameters that this optimizer cannot update.
    """
    row = OPTIMIZERS[cfg.optimizer]
    owner = f"optimizer {cfg.optimizer}"
    _refuse_unused(cfg, row)
    options = check_options("optim_args", cfg.optim_args, row.options, owner)
    factory = _load(row, cfg.optimizer)
    if is_averaging(row) and "adam_beta1" in row.keys and cfg.adam_beta1 == 0.0:
        raise ConfigError(f"adam_beta1: {owner} needs more than 0; at 0 the average cannot be told from the iterate.")
    groups = param_groups(model, cfg)
    arguments = {"lr": cfg.learning_rate, **row.arguments(cfg), **options}
    if bf16_update is not None:
        factory = with_fp32_updates(factory)
    try:
        optimizer = factory(groups, **arguments)
    except ValueError as error:
        # The library checks ranges and combinations (Nesterov without momentum) itself.
        raise ConfigError(f"optim_args: {owner} refuses {options or 'its settings'}: {error}") from error
    except RuntimeError as error:
        raise ModelError(f"optimizer: {cfg.optimizer} cannot update this model's parameters: {error}") from error
    if bf16_update is not None:
        assert isinstance(optimizer, Fp32Updates)
        optimizer.prepare(bf16_update, seed)
    return optimizer


def silent_steps(cfg: OptimConfig) -> int:
    """Steps at the start of a run in which this optimizer moves no weight, by design."""
    return OPTIMIZERS[cfg.optimizer].silent(cfg)


def is_averaging(row: OptimizerRow) -> bool:
    """Whether a row's optimizer is schedule-free."""
    return row.package == "schedulefree"


def _refuse_unused(cfg: OptimConfig, row: OptimizerRow) -> None:
    for key in cfg.changed_keys():
        if key in _SPECIFIC_KEYS - row.keys:
            users = ", ".join(sorted(name for name, other in OPTIMIZERS.items() if key in other.keys))
            raise ConfigError(f"{key}: not used by optimizer {cfg.optimizer}; remove it, or choose one of: {users}.")


def _load(row: OptimizerRow, name: str) -> type[Optimizer]:
    try:
        module = importlib.import_module(row.module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != row.package:
            raise
        raise ConfigError(
            f"optimizer: {name} needs the package {row.package}; pip install 'eft-trainer[optimizers]'."
        ) from error
    factory: type[Optimizer] = getattr(module, row.attribute)
    return factory
