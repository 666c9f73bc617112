"""Which parameters share a learning rate and a weight decay: every trained one in exactly one group.

Matrices decay; norms, biases and embeddings do not. The learning rate of a parameter is, in this order,

1. the rate of the `lr_groups` entry whose text is in its name, as it stands;
2. for embeddings and the output head `embedding_lr`, for an adapter's embedding factors under LoRA+
   `loraplus_lr_embedding`, as they stand;
3. `learning_rate`, times `embedding_lr_scale` for embeddings and head, times `loraplus_lr_ratio` for LoRA's B, times
   `layerwise_lr_decay` once for every decoder layer above it.

LoRA+: Hayou et al. 2024, "LoRA+: Efficient Low Rank Adaptation of Large Models". Layer-wise decay: Howard and Ruder
2018, §3.2; Clark et al. 2020 (ELECTRA), appendix A.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from eft.config.optim import LrGroup, OptimConfig
from eft.core.errors import ConfigError, ModelError, nearest
from eft.optim.roles import Member, num_layers, trained_members

DECAYED = "matrices"
PLAIN = "norms, biases, embeddings"

Part = tuple[str, dict[str, Any]]
"""Which update rule a parameter gets, where an optimizer has several: a word for the table, entries of the group."""


def param_groups(
    model: nn.Module, cfg: OptimConfig, part_of: Callable[[Member], Part] = lambda member: ("", {})
) -> list[dict[str, Any]]:
    """The optimizer's groups: `{"name", "params", "lr", "weight_decay"}`, every trainable parameter in exactly one.

    Groups at `learning_rate` come first, those that decay before those that do not; parameters are in the model's
    order. The groups do not depend on the value of `weight_decay`, so that a checkpoint's groups fit a run with
    another one.

    Args:
        part_of: splits the groups further, by update rule.

    Raises:
        ModelError: nothing is trainable, or a key that sets rates finds nothing to set.
        ConfigError: two entries of `lr_groups` want the same parameter, or none is left for `learning_rate`.
    """
    members = trained_members(model)
    if not members:
        raise ModelError("No parameter of the model is trainable; check `adapter` and `unfrozen_parameters`.")
    rates = _Rates(cfg, members, num_layers(model))
    groups: dict[Any, dict[str, Any]] = {}
    for member in members:
        rate, label = rates.of(member)
        part, extra = part_of(member)
        words = [DECAYED if member.decays else PLAIN, *([label] if label else []), *([part] if part else [])]
        key = (label != "", not member.decays, *words[1:], rate)
        decay = cfg.weight_decay if member.decays else 0.0
        group = groups.setdefault(
            key, {"name": " · ".join(words), "params": [], "lr": rate, "weight_decay": decay, **extra}
        )
        group["params"].append(member.parameter)
    if all(key[0] for key in groups):
        raise ConfigError(
            "learning_rate: no trained parameter uses it, since `lr_groups` or `embedding_lr` give every one another "
            "rate; make one of these the learning_rate, and leave it out there."
        )
    return [groups[key] for key in sorted(groups, key=lambda key: key[:2])]


class _Rates:
    """The learning rate of each parameter, and why."""

    def __init__(self, cfg: OptimConfig, members: list[Member], layers: int) -> None:
        self.base = cfg.learning_rate
        self.named = cfg.lr_groups or []
        self.embedding = cfg.embedding_lr
        self.embedding_scale = cfg.embedding_lr_scale
        self.ratio = cfg.loraplus_lr_ratio
        self.embedding_factors = cfg.loraplus_lr_embedding if self.ratio is not None else None
        self.decay = cfg.layerwise_lr_decay
        self.layers = layers
        self._check(members)

    def of(self, member: Member) -> tuple[float, str]:
        """(rate, label); the label is empty for `learning_rate` itself."""
        entry = self._named(member)
        if entry is not None:
            return entry.lr, entry.name
        if member.is_embedding_factor and self.embedding_factors is not None:
            return self.embedding_factors, "LoRA embeddings"
        is_embedding = member.role in ("embedding", "head")
        if is_embedding and self.embedding is not None:
            return self.embedding, "embeddings and head"
        factor, labels = 1.0, []
        if is_embedding and self.embedding_scale is not None:
            factor *= self.embedding_scale
            labels.append("embeddings and head")
        if member.is_second_factor and self.ratio is not None:
            factor *= self.ratio
            labels.append("LoRA B")
        below = self._layers_above(member)
        if self.decay is not None and below:
            factor *= self.decay**below
            labels.append("below the layers" if member.depth is None else f"layer {member.depth}")
        return self.base * factor, ", ".join(labels)

    def _layers_above(self, member: Member) -> int:
        if member.depth is not None:
            return self.layers - 1 - member.depth
        return self.layers if member.role == "embedding" else 0

    def _named(self, member: Member) -> LrGroup | None:
        found = [entry for entry in self.named if any(text in member.name for text in entry.modules)]
        if len(found) > 1:
            raise ConfigError(
                f"lr_groups: {member.name} is in {found[0].name!r} and in {found[1].name!r}; a parameter has one "
                "learning rate, so make their `modules` longer."
            )
        return found[0] if found else None

    def _check(self, members: list[Member]) -> None:
        for entry in self.named:
            for text in entry.modules:
                if not any(text in member.name for member in members):
                    parts = sorted({part for member in members for part in member.name.split(".")})
                    close = nearest(text, parts)
                    raise ModelError(
                        f"lr_groups: {text!r} of {entry.name!r} is in the name of no trained parameter"
                        + (f"; did you mean {close!r}?" if close else ".")
                    )
        needed = {
            "embedding_lr": (self.embedding, any(m.role in ("embedding", "head") for m in members)),
            "embedding_lr_scale": (self.embedding_scale, any(m.role in ("embedding", "head") for m in members)),
            "loraplus_lr_ratio": (self.ratio, any(m.is_second_factor for m in members)),
            "layerwise_lr_decay": (self.decay, any(m.depth is not None for m in members)),
        }
        what = {
            "embedding_lr": "embedding or output head",
            "embedding_lr_scale": "embedding or output head",
            "loraplus_lr_ratio": "LoRA factor",
            "layerwise_lr_decay": "decoder layer",
        }
        for key, (value, is_there) in needed.items():
            if value is not None and not is_there:
                raise ModelError(f"{key}: no {what[key]} is trained, so it would have no effect; remove it.")


def decayed_names(model: nn.Module) -> frozenset[str]:
    """Names of the trainable parameters that decay."""
    return frozenset(member.name for member in trained_members(model) if member.decays)


def group_lines(groups: list[dict[str, Any]]) -> list[str]:
    """One line per group for the start table."""
    return [
        f"{group['name']}: {len(group['params'])} tensors, {sum(p.numel() for p in group['params']):,} parameters, "
        f"learning rate {group.get('initial_lr', group['lr']):g}, weight decay {group['weight_decay']:g}"
        for group in groups
    ]
