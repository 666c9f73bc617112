"""What `load_datasets` gives to `train`: prepared data and what is known about them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from eft.core.records import Message, TokenDataset
from eft.data.gates import GateReport
from eft.data.ledger import Ledger


@dataclass
class DatasetMeta:
    """Prepared data sets and the number of optimizer steps that they give."""

    train_dataset: TokenDataset
    eval_dataset: TokenDataset | dict[str, TokenDataset] | None
    total_num_steps: int
    ledger: Ledger | None = None
    eval_conversations: list[list[Message]] = field(default_factory=list)
    eval_tools: list[list[dict[str, Any]] | None] = field(default_factory=list)
    cache_note: str = ""
    processor: Any = None
    """Of rows with images."""
    keys_read: frozenset[str] = frozenset()
    """Config keys that the preparation read."""
    gates: GateReport | None = None
    """What the gates found; None where they were not asked."""
