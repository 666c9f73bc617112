"""What the probes record of attention: calls of our function, and the masks that were built."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class AttentionCall:
    """One call of our attention function."""

    module: int
    """`id` of the attention module."""
    bounded: bool
    """Whether document boundaries arrived."""
    span: int | None
    """How far the layer looks back, in tokens: the sliding window or the chunk; None without a limit."""
    mask: int | None
    """Address of the mask's storage, None without a mask."""


@dataclass
class AttentionRecord:
    """What happened inside `record_attention()`."""

    calls: list[AttentionCall] = field(default_factory=list)
    masks: dict[int, int | None] = field(default_factory=dict)
    """Address of each mask that was built → the span it was built for."""
    kept: list[Tensor] = field(default_factory=list)
    """The masks themselves, so that no address is used twice."""


_record: ContextVar[AttentionRecord | None] = ContextVar("eft_attention_record", default=None)


def current_record() -> AttentionRecord | None:
    """The record to write to, None outside `record_attention()`."""
    return _record.get()


@contextmanager
def record_attention() -> Iterator[AttentionRecord]:
    """Record every call of our attention function, for the probes. Masks are then built even where none is needed."""
    record = AttentionRecord()
    token = _record.set(record)
    try:
        yield record
    finally:
        _record.reset(token)
