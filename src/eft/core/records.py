"""Small records that travel between rooms."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypedDict

import numpy as np
import numpy.typing as npt

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]
Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]


class Message(TypedDict, total=False):
    """One turn of a conversation, in the OpenAI form."""

    role: str
    content: str
    tool_calls: list[dict[str, Any]]
    name: str
    reasoning_content: str
    tool_call_id: str


@dataclass(frozen=True)
class Segment:
    """A piece of text that is trained or is context, for formats that are not conversations."""

    text: str
    train: bool
    num_eos: int = 0
    """EOS tokens that follow the text, trained where the text is; one that the text itself ends with counts."""


@dataclass(slots=True)
class TokenSample:
    """One data-set row after tokenisation.

    `input_ids`, `labels` int32 [length]; a label equals its input id where trained, else IGNORE_INDEX. `weights`
    float32 [length] ≥ 0, or None for 1.0 on every trained position.
    """

    input_ids: Int32Array
    labels: Int32Array
    weights: Float32Array | None = None


class TokenDataset(Protocol):
    """What the plan and the loader need of a data set. Implemented by `data.store.TokenStore`."""

    lengths: Int32Array
    """Tokens per sample, int32 [samples]."""
    weight_sums: Float64Array
    """Σ weight over the trainable tokens (label ≠ IGNORE_INDEX at position ≥ 1) per sample, float64 [samples]."""
    trainable_counts: Int32Array
    """Trainable tokens per sample, int32 [samples]."""
    fingerprint: str
    """Changes when any id, label or weight changes."""

    def __len__(self) -> int: ...

    def sample(self, index: int) -> TokenSample:
        """The sample as views of the memory-mapped store (no copy where there is none to make)."""
        ...


@dataclass(frozen=True)
class Derived:
    """A value that eft worked out, with the rule that gave it."""

    value: Any
    origin: str


@dataclass
class PromiseResult:
    """One line of `eft verify` or of a start-up check."""

    promise: str
    """`E1` … `E8`, or the name of a start-up check."""
    title: str
    status: Literal["pass", "fail", "not applicable"]
    detail: str
    numbers: dict[str, float] = field(default_factory=dict)


TokenKind = Literal["trained", "context", "special", "trained special", "header"]
"""How text is shown: `special` are the tokenizer's own marks, `header` what opens a turn."""


@dataclass(frozen=True)
class ShownRow:
    """A sample as text, for a terminal or a page."""

    title: str
    """Where it comes from, and how much of it is trained: `data.jsonl row 17: 120 tokens, 40 trained`."""
    pieces: list[tuple[str, TokenKind]]
    """The decoded text in order, cut where the kind changes."""
    note: str = ""
    """What is wrong with it."""
