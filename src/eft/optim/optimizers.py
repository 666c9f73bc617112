"""The optimizer of a config over the trained parameters of a model."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

from torch import nn
from torch.optim import Optimizer

from eft.config.optim import OptimConfig
from eft.core.errors import ConfigError, ModelError
from eft.optim.averaging import (
    WeightAverage,
    evaluation_state_dict,
    evaluation_weights,
    is_averaged,
    is_schedule_free,
    with_weight_average,
)
from eft.optim.bf16 import Bf16Update, Fp32Updates, with_fp32_updates
from eft.optim.muon import muon_part
from eft.optim.options import check_options
from eft.optim.param_groups import Part, param_groups
from eft.optim.roles import Member
from eft.optim.row import OptimizerRow
from eft.optim.table import OPTIMIZERS, SPECIFIC_KEYS

__all__ = [
    "OPTIMIZERS",
    "OptimizerRow",
    "build_optimizer",
    "check_optimizer",
    "evaluation_state_dict",
    "evaluation_weights",
    "is_averaged",
    "is_averaging",
    "is_schedule_free",
    "optimizer_groups",
    "silent_steps",
]

_ROLE_OPTIONS = ("head", "adapter_factors")
"""Options that say which parameters are updated by which rule; the optimizer itself does not know them."""


def build_optimizer(
    cfg: OptimConfig, model: nn.Module, *, bf16_update: Bf16Update | None = None, seed: int = 0
) -> Optimizer:
    """The optimizer that `cfg` names over the trainable parameters of `model`, in the groups of `param_groups`.

    Args:
        bf16_update: how updates reach bf16 parameters (`optim.bf16`); None where none is trained in bf16.
        seed: of the random bits of stochastic rounding.

    Raises:
        ConfigError: an option or key that this optimizer does not use, a missing package, or a device that it has no
            kernels for.
        ModelError: no trainable parameter, or parameters that this optimizer cannot update.
    """
    row = OPTIMIZERS[cfg.optimizer]
    owner = f"optimizer {cfg.optimizer}"
    device = next((parameter.device.type for parameter in model.parameters() if parameter.requires_grad), "meta")
    check_optimizer(cfg, device)
    options = check_options("optim_args", cfg.optim_args, row.options, owner)
    factory = _load_class(row, device)
    groups = optimizer_groups(cfg, model)
    own = {name: value for name, value in options.items() if not (row.splits and name in _ROLE_OPTIONS)}
    if bf16_update is not None:
        factory = with_fp32_updates(factory)
    if cfg.weight_average is not None:
        factory = with_weight_average(factory)
    try:
        optimizer = factory(groups, **{"lr": cfg.learning_rate, **row.arguments(cfg), **own})
    except ValueError as error:
        # The library checks ranges and combinations (Nesterov without momentum) itself.
        raise ConfigError(f"optim_args: {owner} refuses {options or 'its settings'}: {error}") from error
    except RuntimeError as error:
        raise ModelError(f"optimizer: {cfg.optimizer} cannot update this model's parameters: {error}") from error
    if isinstance(optimizer, Fp32Updates):
        assert bf16_update is not None
        optimizer.prepare(bf16_update, seed)
    if isinstance(optimizer, WeightAverage):
        assert cfg.weight_average is not None
        optimizer.average_by(cfg.weight_average, cfg.weight_average_decay, cfg.weight_average_start)
    return optimizer


def check_optimizer(cfg: OptimConfig, device_type: str) -> None:
    """Raise ConfigError where this optimizer cannot be built on `cpu`, `cuda` or (without data) `meta`.

    A key or option that it does not use, a missing package, a device that it has no kernels for.
    """
    row = OPTIMIZERS[cfg.optimizer]
    owner = f"optimizer {cfg.optimizer}"
    for key in cfg.changed_keys():
        if key in SPECIFIC_KEYS - row.keys:
            users = ", ".join(sorted(name for name, other in OPTIMIZERS.items() if key in other.keys))
            raise ConfigError(f"{key}: not used by {owner}; remove it, or choose one of: {users}.")
    check_options("optim_args", cfg.optim_args, row.options, owner)
    if is_averaging(row) and "adam_beta1" in row.keys and cfg.adam_beta1 == 0.0:
        raise ConfigError(f"adam_beta1: {owner} needs more than 0; at 0 the average cannot be told from the iterate.")
    if device_type not in (*row.devices, "meta"):
        raise ConfigError(
            f"optimizer: {cfg.optimizer} runs on {' and '.join(row.devices)} only, but the weights are on "
            f"{device_type}; use {row.instead}."
        )
    if find_spec(row.package) is None:
        raise ConfigError(
            f"optimizer: {cfg.optimizer} needs the package {row.package}; pip install 'eft-trainer[{row.extra}]'."
        )


def optimizer_groups(cfg: OptimConfig, model: nn.Module) -> list[dict[str, Any]]:
    """The groups over which `build_optimizer` builds.

    Raises:
        ConfigError, ModelError: as `param_groups` does.
    """
    part_of: Callable[[Member], Part] = lambda member: ("", {})  # noqa: E731  # the default of `param_groups`
    if OPTIMIZERS[cfg.optimizer].splits:
        options = cfg.optim_args or {}
        part_of = partial(muon_part, **{name: options[name] for name in _ROLE_OPTIONS if name in options})
    return param_groups(model, cfg, part_of)


def silent_steps(cfg: OptimConfig) -> int:
    """Steps at the start of a run in which this optimizer moves no weight, by design."""
    return OPTIMIZERS[cfg.optimizer].silent(cfg)


def is_averaging(row: OptimizerRow) -> bool:
    """Whether a row's optimizer is schedule-free."""
    return row.package == "schedulefree"


def _load_class(row: OptimizerRow, device_type: str) -> type[Optimizer]:
    name = row.on_cpu if row.on_cpu and device_type == "cpu" else row.attribute
    factory: type[Optimizer] = getattr(importlib.import_module(row.module), name)
    return factory
