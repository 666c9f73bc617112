"""The whole model's weights, whatever it is wrapped in."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def unwrap(model: nn.Module) -> nn.Module:
    """The model as it was before DDP or `torch.compile` wrapped it; a PeftModel stays one."""
    inner: nn.Module = model
    while True:
        if isinstance(inner, DistributedDataParallel):
            inner = inner.module
        elif (compiled := _compiled(inner)) is not None:
            inner = compiled
        else:
            return inner


def _compiled(model: nn.Module) -> nn.Module | None:
    # torch.compile's wrapper has no public type; this is the one name it is documented to keep the original under.
    original = getattr(model, "_orig_mod", None)
    return original if isinstance(original, nn.Module) else None


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor of the unwrapped model under its own name, sharing memory with it; every rank holds them all."""
    state: dict[str, Tensor] = unwrap(model).state_dict()
    return state
