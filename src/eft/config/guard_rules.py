"""Rules that span the guards' keys and their neighbours; see `rules`."""

from __future__ import annotations

from eft.config.root import Rule, TrainConfig


def _wanting(config: TrainConfig, action: str) -> str | None:
    """The key that asks for `action`."""
    if config.nonfinite_action == action:
        return "nonfinite_action"
    if config.loss_watchdog_threshold is not None and config.loss_watchdog_action == action:
        return "loss_watchdog_action"
    return None


def updates_are_left_out_as_a_whole(config: TrainConfig) -> tuple[str, str] | None:
    name = _wanting(config, "skip")
    if name is None or not config.optimizer_in_backward:
        return None
    return (
        name,
        f"`{name}: skip`: `optimizer_in_backward` updates tensor by tensor, before the whole gradient is known; use "
        "`rollback` or `stop`",
    )


def rollback_needs_checkpoints(config: TrainConfig) -> tuple[str, str] | None:
    name = _wanting(config, "rollback")
    if name is None:
        return None
    if config.save_strategy == "no":
        return name, f"`{name}: rollback` goes back to a checkpoint; remove `save_strategy: no`"
    if config.save_only_model:
        return name, f"`{name}: rollback` goes back to a checkpoint with optimizer state; remove `save_only_model`"
    return None


def loss_scaling_leaves_updates_out_itself(config: TrainConfig) -> tuple[str, str] | None:
    for action in ("skip", "rollback"):
        name = _wanting(config, action)
        if name is not None and config.fp16:
            return (
                name,
                f"`{name}: {action}`: with `fp16` the loss scaler meets infinite gradients on purpose, and leaves "
                "their updates out itself; remove it, or use `bf16: true`",
            )
    return None


GUARD_RULES: tuple[Rule, ...] = (
    updates_are_left_out_as_a_whole,
    rollback_needs_checkpoints,
    loss_scaling_leaves_updates_out_itself,
)
