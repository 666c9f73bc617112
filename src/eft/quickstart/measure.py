"""What the quickstart's model can do: answers of the right form, and right answers."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Score:
    """Counts over the held-out rows."""

    rows: int
    well_formed: int
    """Answers that are one JSON object with a text `name` and an object `arguments`, and nothing else."""
    exact: int
    """Well-formed, the right function, every argument accepted, none missing, none too many."""

    @property
    def form_share(self) -> float:
        """Share of well-formed answers."""
        return self.well_formed / self.rows

    @property
    def exact_share(self) -> float:
        """Share of right answers."""
        return self.exact / self.rows


def score(answers: Sequence[str], rows: Sequence[dict[str, Any]]) -> Score:
    """Judge one answer per row (`name`, `accepted` as `material.Call.row` writes them)."""
    calls = [parse_call(answer) for answer in answers]
    exact = sum(is_right(call, row) for call, row in zip(calls, rows, strict=True) if call is not None)
    return Score(len(rows), sum(call is not None for call in calls), exact)


def parse_call(answer: str) -> dict[str, Any] | None:
    """The call, or None where the answer is anything else."""
    try:
        call = json.loads(answer.strip())
    except json.JSONDecodeError:
        return None
    if not isinstance(call, dict) or set(call) != {"name", "arguments"}:
        return None
    if not isinstance(call["name"], str) or not isinstance(call["arguments"], dict):
        return None
    return call


def is_right(call: dict[str, Any], row: dict[str, Any]) -> bool:
    """Whether the call is one that the row accepts."""
    accepted: dict[str, list[Any]] = row["accepted"]
    arguments = call["arguments"]
    if call["name"] != row["name"] or not set(arguments) <= set(accepted):
        return False
    for name, values in accepted.items():
        if name not in arguments:
            if values and "" not in values:
                return False
        elif not any(_same(arguments[name], value) for value in values):
            return False
    return True


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927)."""
    z = 1.959963984540054
    share = successes / trials
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return max(0.0, centre - half), min(1.0, centre + half)


def _same(given: Any, wanted: Any) -> bool:
    if isinstance(given, bool) or isinstance(wanted, bool):
        return given is wanted
    if isinstance(given, str) and isinstance(wanted, str):
        return " ".join(given.lower().split()) == " ".join(wanted.lower().split())
    return bool(given == wanted)
