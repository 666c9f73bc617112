"""E3: a run that was stopped and continued is the run that was not, on the user's own model, data and config."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from eft.core.hashing import hash_bytes
from eft.core.records import PromiseResult, TokenSample
from eft.trainer.trainer import EftTrainer
from eft.verify.state import fingerprints

LOSS_BAND = 0.02
"""Relative difference of losses on a device whose kernels do not repeat their last bits."""
_LOGGED = ("step", "learning_rate", "loss", "grad_norm")


class Fed:
    """A collator that notes what goes into the model: one fingerprint per micro-batch."""

    def __init__(self, collator: Any) -> None:
        self.collator = collator
        self.micro_batches: list[str] = []

    def __call__(self, bins: Sequence[Sequence[TokenSample]]) -> Any:
        """Note, then collate."""
        parts = [np.ascontiguousarray(sample.input_ids).tobytes() for samples in bins for sample in samples]
        self.micro_batches.append(hash_bytes(*parts))
        return self.collator(bins)


def record_fed(trainer: EftTrainer) -> Fed:
    """Let the trainer collate through a `Fed`."""
    packing: Any = trainer.parts.packing
    fed = Fed(packing.collator)
    trainer.parts.packing = replace(packing, collator=fed)
    return fed


@dataclass(frozen=True)
class Trace:
    """What two equal runs agree in."""

    fed: list[str]
    """Of each micro-batch of training."""
    rows: list[dict[str, float]]
    """One per logged step."""
    state: dict[str, str]
    """Fingerprints at the end."""

    @classmethod
    def of(cls, trainer: EftTrainer, fed: Fed) -> Trace:
        """Of a trainer that has just trained, without evaluating more often than before."""
        rows = [row for row in trainer.state.log_history if "loss" in row]
        kept = [{name: row[name] for name in _LOGGED if name in row} for row in rows]
        return cls(fed.micro_batches, kept, fingerprints(trainer))


def compare_traces(straight: Trace, resumed: Trace, *, stopped_after: int, to_the_bit: bool) -> PromiseResult:
    """E3: the steps after `stopped_after`, and everything at the end. `resumed` holds its own micro-batches alone.

    `to_the_bit` False: micro-batches, learning rates and generators are equal, losses within LOSS_BAND.
    """
    title = f"stopped after step {stopped_after} and continued in a fresh state = never stopped"
    wrong: list[str] = []
    if resumed.fed != straight.fed[len(straight.fed) - len(resumed.fed) :] or not resumed.fed:
        wrong.append("other micro-batches")
    wrong += _other_rows(straight.rows, resumed.rows, to_the_bit)
    names = sorted(straight.state.keys() | resumed.state.keys())
    compared = [name for name in names if to_the_bit or name.startswith(("generator", "learning", "schedule"))]
    changed = [name for name in compared if straight.state.get(name) != resumed.state.get(name)]
    if changed:
        wrong.append(f"{len(changed)} of {len(compared)} states: {', '.join(changed[:3])}")
    numbers = {
        "steps": float(len(straight.rows) - stopped_after),
        "micro_batches": float(len(resumed.fed)),
        "states": float(len(compared)),
        "changed": float(len(changed)),
    }
    if wrong:
        return PromiseResult("E3", title, "fail", "; ".join(wrong), numbers)
    how = "bit-equal" if to_the_bit else f"equal, losses within {LOSS_BAND:g} (kernels here are not deterministic)"
    detail = f"{len(resumed.fed)} micro-batches, learning rates, losses, {len(compared)} tensors and states {how}"
    return PromiseResult("E3", title, "pass", detail, numbers)


def _other_rows(straight: list[dict[str, float]], resumed: list[dict[str, float]], to_the_bit: bool) -> list[str]:
    """Logged numbers that differ, in words; a row before the stop came out of the checkpoint."""
    if len(straight) != len(resumed):
        return [f"{len(resumed)} logged steps, not {len(straight)}"]
    found = []
    for before, after in zip(straight, resumed, strict=True):
        for name, value in before.items():
            loose = not to_the_bit and name in ("loss", "grad_norm")
            limit = LOSS_BAND * abs(value) if loose else 0.0
            if not abs(after[name] - value) <= limit:
                found.append(f"{name} of step {int(before['step'])}: {after[name]:.9g}, not {value:.9g}")
    return found[:2]
