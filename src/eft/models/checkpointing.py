"""Activation checkpointing: which decoder layers are computed again in the backward pass, and what they keep.

Through transformers' own switch, `activation_checkpointing_enable`, and torch's selective contexts; the recomputation
runs the same kernels on the same inputs with the same random numbers, so the gradients are the same bits.
Selective policies: Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache, partial
from typing import Any

from peft import PeftModel
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from eft.config.memory import KeptOutput, MemoryConfig
from eft.core.errors import ModelError
from eft.models.adapters import enable_gradient_flow

KEPT_OPERATIONS: dict[str, tuple[str, ...]] = {
    "attention": (
        "aten::_scaled_dot_product_*",
        "aten::_flash_attention_forward",
        "aten::_efficient_attention_forward",
        "aten::_cudnn_attention_forward",
        "torch_attn::*",
        "eft::*attention*",
        "*flash_attn*",
        "flex_attention",
    ),
    "matmul": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_grouped_mm", "mkldnn::_linear*"),
}
"""Patterns of the names of torch's operators. Exactly the names of `config.memory.KeptOutput`."""


@dataclass(frozen=True)
class Checkpointing:
    """How activations are recomputed."""

    every: int = 1
    """Every n-th decoder layer is recomputed, from the first on."""
    keep: tuple[KeptOutput, ...] = ()
    """Outputs that are kept all the same."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of `torch.utils.checkpoint.checkpoint`."""

    @property
    def use_reentrant(self) -> bool:
        """Off by default: the reentrant kind cuts gradients where the input of a layer needs none."""
        return bool(self.options.get("use_reentrant", False))


def checkpointing_of(cfg: MemoryConfig) -> Checkpointing | None:
    """What the config asks for; None: activations are kept."""
    if not cfg.gradient_checkpointing:
        return None
    kept = cfg.selective_checkpointing
    keep: tuple[KeptOutput, ...] = tuple(kept) if isinstance(kept, list) else ("attention",) if kept else ()
    return Checkpointing(cfg.gradient_checkpointing_every, keep, dict(cfg.gradient_checkpointing_kwargs or {}))


def set_checkpointing(model: PreTrainedModel | PeftModel, wanted: Checkpointing | None) -> None:
    """Switch `model` to `wanted`, in place of what was set before; None leaves it as it is. Acts in training mode only.

    Raises:
        ModelError: the family has no layers that can be recomputed.
    """
    if wanted is None:
        return
    options = {**wanted.options, "use_reentrant": wanted.use_reentrant}
    if wanted.keep:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy(wanted.keep))
    try:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options, every_n_layers=wanted.every)
    except ValueError as error:
        raise ModelError(f"gradient_checkpointing: {str(error).splitlines()[0]} Remove the key.") from error
    # Upstream makes the embeddings' output ask for a gradient, for the reentrant kind's sake. The other kind needs
    # no such thing, and would drag the backward pass through frozen bottom layers.
    model.disable_input_require_grads()
    enable_gradient_flow(model, use_reentrant=wanted.use_reentrant)


@cache
def _policy(keep: tuple[KeptOutput, ...]) -> Any:
    """A selective policy: the outputs of the operators of `keep` are kept, all else is computed again."""
    patterns = [pattern for name in keep for pattern in KEPT_OPERATIONS[name]]

    @cache
    def is_kept(operator: Any) -> bool:
        name = str(operator.name()).partition(".")[0]  # without the overload
        return any(fnmatchcase(name, pattern) for pattern in patterns)

    def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if is_kept(operator) else CheckpointPolicy.PREFER_RECOMPUTE

    return policy
