"""Data that are read while the model trains, and never prepared as a whole."""

from __future__ import annotations

from eft.config.section import Section, key


class StreamingConfig(Section):
    """How much of a stream is trained, and how far ahead it is read."""

    streaming: bool = key(
        False,
        "Tokenise rows while training instead of preparing them first: for data that fit no disk. A stream that comes "
        "to its end begins anew.",
        axolotl="Axolotl needs `max_steps` and packs the first data set only.",
    )
    streaming_token_budget: int | None = key(
        None,
        "How long to train on a stream, in tokens of capacity: steps = ceil(budget / (`global_batch_size` × "
        "`sequence_len`)). May be written `2e9`. Excludes `max_steps`.",
        ge=1,
        used_when="streaming",
    )
    streaming_multipack_buffer_size: int = key(
        10_000,
        "Samples that are held at once, to be shuffled and packed together; fewer where they have more than 16 Mi "
        "tokens.",
        ge=1,
        used_when="streaming",
    )
