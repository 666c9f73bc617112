"""Rules that span the packing keys."""

from __future__ import annotations

from eft.config.root import Rule, TrainConfig


def one_way_to_pack(config: TrainConfig) -> tuple[str, str] | None:
    if config.sample_packing_sequentially and config.sample_packing_strategy != "auto":
        return (
            "sample_packing_strategy",
            f"`sample_packing_strategy: {config.sample_packing_strategy}` and `sample_packing_sequentially` are two "
            "ways to fill bins; keep one of them",
        )
    return None


def order_is_kept(config: TrainConfig) -> tuple[str, str] | None:
    if not config.curriculum_sampling:
        return None
    if config.sample_packing_strategy in ("stream", "dense"):
        return (
            "sample_packing_strategy",
            f"`sample_packing_strategy: {config.sample_packing_strategy}` does not keep the order that "
            "`curriculum_sampling` asks for; use `sample_packing_sequentially: true`, or remove one of them",
        )
    if config.balance_buffer_steps is not None:
        return (
            "balance_buffer_steps",
            "`balance_buffer_steps` sorts bins by cost, `curriculum_sampling` keeps the order of the samples; remove "
            "one of them",
        )
    return None


PACKING_RULES: tuple[Rule, ...] = (one_way_to_pack, order_is_kept)
