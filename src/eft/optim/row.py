"""What the table of optimizers says of each, and the constructor arguments that config keys give."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Literal

from eft.config.optim import OptimConfig
from eft.optim.options import Option

Arguments = Callable[[OptimConfig], dict[str, Any]]
"""The constructor arguments that come from config keys."""

StateKind = Literal["fp32", "factored fp32", "8-bit", "4-bit", "fp8", "none"]


@dataclass(frozen=True)
class OptimizerRow:
    """One optimizer."""

    package: str
    """What to import it from pip as."""
    extra: str | None
    """The extra of eft-trainer that brings the package; None: a dependency."""
    module: str
    attribute: str
    arguments: Arguments
    keys: frozenset[str] = frozenset()
    """Of the keys that not every optimizer has, those that this one uses; another one set is an error."""
    options: Mapping[str, Option] = field(default_factory=dict)
    """What `optim_args` may hold."""
    notes: str = ""
    state: StateKind = "fp32"
    """What is kept of large matrices; anything smaller than a block stays fp32."""
    state_bytes: float = 8.0
    """Per parameter of a large matrix."""
    devices: tuple[str, ...] = ("cpu", "cuda")
    """Where its kernels run; anywhere else the optimizer is refused."""
    instead: str = "adamw_torch_fused"
    """What to use where its kernels do not run."""
    on_cpu: str = ""
    """The class for a CPU where it is another one."""
    fsdp2: bool = True
    """Updates every number by itself, or knows shards: right on a part of a matrix too."""
    is_fused: bool = False
    """One kernel per tensor, or for many of them."""
    is_decoupled: bool = True
    """Weight decay is apart from the gradient: each step shrinks by the factor 1 - rate · decay."""
    splits: bool = False
    """Its own rule is for hidden matrices only (`optim.roles`); all else is updated by AdamW."""
    silent: Callable[[OptimConfig], int] = lambda cfg: 0
    """Steps at the start that move no weight, by design."""


def no_arguments(cfg: OptimConfig) -> dict[str, Any]:
    """Nothing."""
    return {}


def betas(cfg: OptimConfig) -> dict[str, Any]:
    """Both decays."""
    return {"betas": (cfg.adam_beta1, cfg.adam_beta2)}


def adam(cfg: OptimConfig) -> dict[str, Any]:
    """Decays and epsilon."""
    return {"betas": (cfg.adam_beta1, cfg.adam_beta2), "eps": cfg.adam_epsilon}


def fused_adam(cfg: OptimConfig) -> dict[str, Any]:
    """The same, in one kernel."""
    return {**adam(cfg), "fused": True}


def decoupled_adam(cfg: OptimConfig) -> dict[str, Any]:
    """The same, with decay apart from the gradient."""
    return {**adam(cfg), "weight_decouple": True}


def three_betas(cfg: OptimConfig) -> dict[str, Any]:
    """Three decays."""
    return {"betas": (cfg.adam_beta1, cfg.adam_beta2, cfg.adam_beta3)}


def ademamix(cfg: OptimConfig) -> dict[str, Any]:
    """Three decays and epsilon."""
    return {**three_betas(cfg), "eps": cfg.adam_epsilon}


def decoupled_ademamix(cfg: OptimConfig) -> dict[str, Any]:
    """The same, with decay apart from the gradient."""
    return {**ademamix(cfg), "weight_decouple": True}


def stable_adam(cfg: OptimConfig) -> dict[str, Any]:
    """Without compensated sums."""
    # Its compensated sums are for weights below fp32, which eft updates in its own way (`bf16_update`).
    return {**adam(cfg), "kahan_sum": False}


def scheduled_adafactor(cfg: OptimConfig) -> dict[str, Any]:
    """Without rates of its own."""
    # Its own relative steps would replace the learning-rate schedule (E7).
    return {"relative_step": False, "warmup_init": False, "scale_parameter": False}


def uncertain_steps(cfg: OptimConfig) -> int:
    """RAdam's steps until its second moment is certain enough (ρ > 4, Liu et al. 2020)."""
    if not (cfg.optim_args or {}).get("silent_sgd_phase", True):
        return 0
    beta = cfg.adam_beta2
    limit = 2 / (1 - beta) - 1
    if limit <= 4:
        return 0  # it never is: nothing would ever move, and the audit shall say so
    return next(k for k in count() if limit - 2 * (k + 1) * beta ** (k + 1) / (1 - beta ** (k + 1)) > 4)
