"""Rules that span keys of optimizer, learning rates and weight averages; see `rules`."""

from __future__ import annotations

from eft.config.root import Rule, TrainConfig


def one_embedding_rate(config: TrainConfig) -> tuple[str, str] | None:
    if config.embedding_lr is not None and config.embedding_lr_scale is not None:
        return (
            "embedding_lr_scale",
            "`embedding_lr_scale` and `embedding_lr` both give the rate of embeddings; keep one of them",
        )
    return None


def one_average(config: TrainConfig) -> tuple[str, str] | None:
    if config.weight_average is not None and config.optimizer.startswith("schedule_free_"):
        return (
            "weight_average",
            f"`weight_average`: `optimizer: {config.optimizer}` averages its weights already; keep one of them",
        )
    return None


def decay_belongs_to_ema(config: TrainConfig) -> tuple[str, str] | None:
    if config.weight_average == "mean" and "weight_average_decay" in config.changed_keys():
        return (
            "weight_average_decay",
            "`weight_average_decay`: not used by `weight_average: mean`, whose steps have equal shares; remove it",
        )
    return None


def restarts_leave_room(config: TrainConfig) -> tuple[str, str] | None:
    every = config.jagged_restart_steps
    if every is None:
        return None
    rise, fall = config.jagged_restart_warmup_steps, config.jagged_restart_anneal_steps
    if rise + fall > every:
        return (
            "jagged_restart_steps",
            f"`jagged_restart_steps: {every}` is shorter than its rise of {rise} and fall of {fall} steps; make it "
            "longer, or set `jagged_restart_warmup_steps` and `jagged_restart_anneal_steps`",
        )
    return None


OPTIM_RULES: tuple[Rule, ...] = (one_embedding_rate, one_average, decay_belongs_to_ema, restarts_leave_room)
