"""Optimizer and learning-rate schedule."""

from __future__ import annotations

from typing import Any, Literal

from eft.config.section import Section, key

OptimizerName = Literal[
    "adamw_torch",
    "adamw_torch_fused",
    "adamw_torch_8bit",
    "adamw_torch_4bit",
    "ao_adamw_8bit",
    "ao_adamw_4bit",
    "ao_adamw_fp8",
    "adamw_8bit",
    "adamw_bnb_8bit",
    "paged_adamw_8bit",
    "paged_adamw_32bit",
    "lion_8bit",
    "lion_32bit",
    "paged_lion_8bit",
    "paged_lion_32bit",
    "ademamix_8bit",
    "paged_ademamix_8bit",
    "paged_ademamix_32bit",
    "rmsprop_bnb",
    "rmsprop_bnb_8bit",
    "rmsprop_bnb_32bit",
    "sgd",
    "adagrad",
    "rmsprop",
    "muon",
    "adafactor",
    "lion_pytorch",
    "adopt_adamw",
    "ademamix",
    "stable_adamw",
    "came_pytorch",
    "schedule_free_adamw",
    "schedule_free_sgd",
    "schedule_free_radam",
]
"""`optim.table.OPTIMIZERS` has exactly these names."""

SchedulerName = Literal[
    "cosine",
    "linear",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "polynomial",
    "cosine_with_restarts",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
    "rex",
    "one_cycle",
]
"""`optim.schedulers.SCHEDULES` has exactly these names."""


class LrGroup(Section):
    """Parameters with a learning rate of their own."""

    name: str = key(description="What the tables call the group.", min_length=1)
    modules: list[str] = key(description="A parameter belongs here if one of these is in its name.", min_length=1)
    lr: float = key(description="Peak learning rate.", gt=0.0)


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
    adam_beta3: float = key(0.9999, "Decay of the slow first moment, or of the instability (CAME).", ge=0.0, lt=1.0)
    adam_epsilon: float = key(1e-8, "Added to the denominator.", gt=0.0)
    max_grad_norm: float = key(1.0, "Gradients are scaled down to this global norm; 0 switches clipping off.", ge=0.0)
    lr_groups: list[LrGroup] | None = key(
        None,
        "Learning rates of chosen parameters: entries with `name`, `modules` (parts of parameter names) and `lr`.",
        axolotl="There biases and norms keep the common rate, and `weight_decay` holds for all of a group.",
    )
    embedding_lr: float | None = key(
        None,
        "Learning rate of embeddings and output head.",
        gt=0.0,
        axolotl="There the output head loses its weight decay.",
    )
    embedding_lr_scale: float | None = key(None, "The same as a factor on `learning_rate`.", gt=0.0)
    loraplus_lr_ratio: float | None = key(
        None,
        "LoRA+: the factors B learn at this multiple of the rate of the factors A; its authors take 16.",
        gt=0.0,
        used_when="adapter",
        axolotl="There `embedding_lr` is ignored beside it, and biases learn at the higher rate too.",
    )
    loraplus_lr_embedding: float = key(
        1e-6, "LoRA+: learning rate of an adapted embedding's factors.", gt=0.0, used_when="loraplus_lr_ratio"
    )
    layerwise_lr_decay: float | None = key(
        None, "Each decoder layer learns at this multiple of the rate of the one above it.", gt=0.0, le=1.0
    )
    weight_average: Literal["ema", "mean"] | None = key(
        None,
        "Evaluate and export an average of the weights over the steps: exponential, or with equal shares (SWA).",
    )
    weight_average_decay: float = key(
        0.999,
        "Share of the old average that an exponential one keeps at each step.",
        gt=0.0,
        lt=1.0,
        used_when="weight_average",
    )
    weight_average_start: int = key(0, "Optimizer steps before the average begins.", ge=0, used_when="weight_average")
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
    jagged_restart_steps: int | None = key(
        None,
        "Every so many steps the learning rate falls, and rises again; the schedule goes on underneath.",
        ge=2,
        axolotl="There the curve is one step ahead.",
    )
    jagged_restart_warmup_steps: int = key(
        10, "Steps of the rise after a restart.", ge=0, used_when="jagged_restart_steps"
    )
    jagged_restart_anneal_steps: int = key(
        1, "Steps of the fall before a restart.", ge=1, used_when="jagged_restart_steps"
    )
