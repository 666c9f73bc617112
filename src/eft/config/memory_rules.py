"""Rules that span keys of memory and their neighbours; see `rules`."""

from __future__ import annotations

from eft.config.root import Rule, TrainConfig
from eft.core.errors import nearest

CHECKPOINT_OPTIONS = ("use_reentrant", "preserve_rng_state", "determinism_check", "debug", "early_stop")
"""What `gradient_checkpointing_kwargs` may hold; torch would hand anything else to the layer, which ignores it."""

_ELSEWHERE = {
    "every_n_layers": "use the key `gradient_checkpointing_every`",
    "offload": "use the key `activation_offloading`",
    "context_fn": "use the key `selective_checkpointing`",
}


def checkpoint_options_are_known(config: TrainConfig) -> tuple[str, str] | None:
    for name in config.gradient_checkpointing_kwargs or {}:
        if name in CHECKPOINT_OPTIONS or not config.gradient_checkpointing:
            continue
        close = nearest(name, CHECKPOINT_OPTIONS)
        advice = _ELSEWHERE.get(name) or (f"did you mean `{close}`?" if close else "remove it")
        return (
            "gradient_checkpointing_kwargs",
            f"`gradient_checkpointing_kwargs: {name}`: expected one of {', '.join(CHECKPOINT_OPTIONS)}; {advice}",
        )
    return None


def selection_needs_saved_tensors(config: TrainConfig) -> tuple[str, str] | None:
    if config.selective_checkpointing and (config.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
        return (
            "selective_checkpointing",
            "`selective_checkpointing`: not with `use_reentrant: true`, which keeps nothing; remove one of them",
        )
    return None


def updates_in_backward_stand_alone(config: TrainConfig) -> tuple[str, str] | None:
    if not config.optimizer_in_backward:
        return None
    obstacles = {
        f"`max_grad_norm: {config.max_grad_norm:g}` needs the norm of all gradients before any update; set "
        "`max_grad_norm: 0`": config.max_grad_norm > 0,
        "accumulation adds gradients up over micro-batches; set `gradient_accumulation_steps: 1` and a larger "
        "`micro_batch_size`": (config.gradient_accumulation_steps or 1) > 1
        or (config.global_batch_size or 0) > config.micro_batch_size,
        "`fp16` decides about an update by all gradients; use `bf16: true`": config.fp16,
        "`use_reentrant: true` may bring a gradient in two parts; remove it": bool(
            (config.gradient_checkpointing_kwargs or {}).get("use_reentrant")
        ),
    }
    found = [text for text, applies in obstacles.items() if applies]
    return ("optimizer_in_backward", f"`optimizer_in_backward`: {'; '.join(found)}") if found else None


MEMORY_RULES: tuple[Rule, ...] = (
    checkpoint_options_are_known,
    selection_needs_saved_tensors,
    updates_in_backward_stand_alone,
)
