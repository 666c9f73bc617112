"""Rules that span the keys of streaming."""

from __future__ import annotations

from eft.config.root import Rule, TrainConfig

_LENGTH = "`streaming_token_budget` (such as 2e9, in tokens of capacity) or `max_steps`"


def a_stream_has_a_length(config: TrainConfig) -> tuple[str, str] | None:
    if not config.streaming:
        return None
    if config.streaming_token_budget is None and config.max_steps is None:
        return "streaming", f"`streaming`: a stream has no end, so say how long to train: set {_LENGTH}"
    if config.streaming_token_budget is not None and config.max_steps is not None:
        return (
            "max_steps",
            "`max_steps` and `streaming_token_budget` both say how long to train; keep one of them",
        )
    return None


def a_stream_has_no_epochs(config: TrainConfig) -> tuple[str, str] | None:
    if config.streaming and config.num_epochs != 1.0:
        return "num_epochs", f"`num_epochs`: a stream is not counted in epochs; use {_LENGTH}"
    return None


def a_stream_holds_nothing_out(config: TrainConfig) -> tuple[str, str] | None:
    if config.streaming and config.val_set_size:
        return (
            "val_set_size",
            "`val_set_size`: rows of a stream are not known beforehand, so none can be drawn; name held-out data in "
            "`test_datasets`",
        )
    return None


def a_stream_is_not_known_as_a_whole(config: TrainConfig) -> tuple[str, str] | None:
    if not config.streaming:
        return None
    whole = {
        "dataset_exact_deduplication": config.dataset_exact_deduplication,
        "balance_buffer_steps": config.balance_buffer_steps is not None,
        "preflight": config.preflight is True,
    }
    capped = {
        f"datasets[{number}].{name}": value is not None
        for number, entry in enumerate(config.datasets)
        for name, value in (("max_rows", entry.max_rows), ("max_tokens", entry.max_tokens))
    }
    whole |= {"epoch_tokens": config.epoch_tokens is not None, **capped}
    for name, is_on in whole.items():
        if is_on:
            key = name.partition("[")[0]
            return key, f"`{name}`: needs all samples at once, which a stream has not; remove it, or `streaming`"
    if config.dataloader_num_workers:
        return (
            "dataloader_num_workers",
            "`dataloader_num_workers`: rows of a stream are read and tokenised in the background by "
            "`dataset_processes` processes; remove it",
        )
    return None


STREAMING_RULES: tuple[Rule, ...] = (
    a_stream_has_a_length,
    a_stream_has_no_epochs,
    a_stream_holds_nothing_out,
    a_stream_is_not_known_as_a_whole,
)
