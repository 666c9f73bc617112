"""Optimizer and learning-rate schedule."""

from __future__ import annotations

from typing import Any, Literal

from eft.config.section import Section, key

OptimizerName = Literal[
    "adamw_torch",
    "adamw_torch_fused",
    "sgd",
    "adafactor",
    "lion_pytorch",
    "adopt_adamw",
    "schedule_free_adamw",
    "schedule_free_sgd",
    "schedule_free_radam",
]
"""`optim.optimizers.OPTIMIZERS` has exactly these names."""

SchedulerName = Literal[
    "cosine",
    "linear",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "polynomial",
    "cosine_with_min_lr",
    "warmup_stable_decay",
    "rex",
    "one_cycle",
]
"""`optim.schedulers.SCHEDULES` has exactly these names."""


class OptimConfig(Section):
    """The update rule."""

    learning_rate: float = key(description="Peak learning rate.", gt=0.0)
    optimizer: OptimizerName = key("adamw_torch_fused", "Update rule.")
    optim_args: dict[str, Any] | None = key(None, "Further options of the optimizer, by its own names and types.")
    weight_decay: float = key(
        0.0, "Decoupled weight decay of matrices; norms, biases and embeddings have none.", ge=0.0
    )
    adam_beta1: float = key(0.9, "First-moment decay.", ge=0.0, lt=1.0)
    adam_beta2: float = key(0.999, "Second-moment decay.", ge=0.0, lt=1.0)
    adam_epsilon: float = key(1e-8, "Added to the denominator.", gt=0.0)
    max_grad_norm: float = key(1.0, "Gradients are scaled down to this global norm; 0 switches clipping off.", ge=0.0)
    lr_scheduler: SchedulerName = key("cosine", "Shape of the learning rate over the steps.")
    lr_scheduler_kwargs: dict[str, Any] | None = key(None, "Further options of the schedule, by its own names.")
    warmup_steps: int | None = key(None, "Steps over which the learning rate rises from 0.", ge=0)
    warmup_ratio: float | None = key(
        None, "The same as a share of all steps; default 0.03, at most 100 steps.", ge=0.0, lt=1.0
    )
    cosine_min_lr_ratio: float | None = key(
        None, "Floor of the cosine or rex curve, as a share of the peak.", ge=0.0, le=1.0
    )
    cosine_constant_lr_ratio: float | None = key(
        None,
        "Share of the steps after which the cosine stays at its floor.",
        gt=0.0,
        le=1.0,
        used_when="cosine_min_lr_ratio",
    )
    lr_quadratic_warmup: bool = key(False, "Warm up with the square of the progress (cosine only).")
