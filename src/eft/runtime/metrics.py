"""The run's numbers as they come: one JSON object a line, and token rates without the pauses."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eft.core.atomic import append_line, write_text
from eft.core.constants import METRICS_FILE
from eft.runtime.disk import clear_disk_errors


class MetricsWriter:
    """Appends to `metrics.jsonl` in the output folder; each line is in the file when `write` returns."""

    def __init__(self, folder: Path, *, resume_step: int = 0, keep_evaluation: bool = True) -> None:
        """Start the file anew, or continue one after `resume_step`: later rows are dropped, they will come again.

        So are held-out losses of that very step unless `keep_evaluation`: its evaluation was not finished. Rows
        without `step` are kept; rows that are not one JSON object (the last one of a killed run) are dropped.

        Raises:
            OutputError: the file cannot be written; so does `write`.
        """
        self.path = folder / METRICS_FILE
        rows = [row for row in map(_read, self._lines()) if row is not None] if resume_step else []
        self.lost_steps = max((0, *(row.get("step", 0) - resume_step for row in rows)))
        """Steps after `resume_step` that had been logged."""
        kept = [row for row in rows if _is_before(row, resume_step, keep_evaluation)]
        with clear_disk_errors(self.path.parent):
            write_text(self.path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row. Numbers keep every digit; what is not finite becomes null; 0-d tensors become numbers."""
        with clear_disk_errors(self.path.parent):
            append_line(self.path, json.dumps(_plain(row), ensure_ascii=False, allow_nan=False))

    def _lines(self) -> list[str]:
        return self.path.read_text(encoding="utf-8").split("\n") if self.path.exists() else []


def _read(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _is_before(row: dict[str, Any], step: int, keep_evaluation: bool) -> bool:
    at = row.get("step", 0)
    if at == step and not keep_evaluation and any(name.startswith("eval_") for name in row):
        return False
    return bool(at <= step)


def _plain(value: Any) -> Any:
    """`value` with only what JSON has; numpy and torch scalars through `item()`."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "item"):
        return _plain(value.item())
    return str(value)


class GroupLosses:
    """Σ weight · loss and Σ weight of several groups of tokens. The losses stay on the device until they are read."""

    def __init__(self, names: tuple[str, ...], device: torch.device) -> None:
        self.names = names
        self.totals = torch.zeros(len(names), dtype=torch.float64, device=device)
        self._weights = [0.0] * len(names)

    def count(self, weights: Sequence[float]) -> None:
        """Add the Σ weight of each group of a micro-batch, whose losses are added to `totals`."""
        self._weights = [old + new for old, new in zip(self._weights, weights, strict=True)]

    def read(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, tuple[float, float]]:
        """(mean loss, share of the weight) of each group that has any; `reduce` sums over processes."""
        weights = torch.tensor(self._weights, dtype=torch.float64, device=self.totals.device)
        losses, weights = reduce(torch.stack([self.totals, weights])).tolist()
        whole = sum(weights)
        return {
            name: (loss / weight, weight / whole)
            for name, loss, weight in zip(self.names, losses, weights, strict=True)
            if weight
        }

    def state(self) -> dict[str, Any]:
        """What `restored` goes on from; waits for the device."""
        return {"names": list(self.names), "totals": self.totals.tolist(), "weights": self._weights}

    @classmethod
    def restored(cls, state: Mapping[str, Any], device: torch.device) -> GroupLosses:
        """The sums as they were."""
        losses = cls(tuple(state["names"]), device)
        losses.totals += torch.tensor(state["totals"], dtype=torch.float64, device=device)
        losses.count(state["weights"])
        return losses


class Throughput:
    """Token counts of a run and their rates per second of training time: evaluation and saving do not count.

    And, of runs over several data sets, the losses of each since they were last read.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self.tokens = 0
        self.trained_tokens = 0
        self._seconds = 0.0
        self._since = clock()
        self._pauses = 0
        self._last = (0, 0, 0.0)
        self._groups: GroupLosses | None = None
        self._restored_groups: Mapping[str, Any] | None = None

    def group_totals(self, names: tuple[str, ...], weights: Sequence[float], device: torch.device) -> Tensor:
        """float64 [groups]: where a micro-batch adds each one's Σ weight · loss; `weights`: its Σ weight of each."""
        if self._groups is None:
            saved = self._restored_groups
            self._groups = GroupLosses(names, device) if saved is None else GroupLosses.restored(saved, device)
        self._groups.count(weights)
        return self._groups.totals

    def group_losses(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """`loss/<data set>`, the mean since the last call, and `share/<data set>`, its part of all trained weight."""
        if self._groups is None:
            return {}
        found = self._groups.read(reduce)
        self._groups = GroupLosses(self._groups.names, self._groups.totals.device)
        losses = {f"loss/{name}": loss for name, (loss, _) in found.items()}
        return losses | {f"share/{name}": share for name, (_, share) in found.items()}

    @property
    def seconds(self) -> float:
        """Training time so far, over all parts of a resumed run."""
        return self._seconds if self._pauses else self._seconds + self._clock() - self._since

    def count(self, tokens: int, trained: int) -> None:
        """Add the real tokens (no padding) and the trained ones of some micro-batches."""
        self.tokens += tokens
        self.trained_tokens += trained

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The clock stands still inside; may be nested."""
        if self._pauses == 0:
            self._seconds += self._clock() - self._since
        self._pauses += 1
        try:
            yield
        finally:
            self._pauses -= 1
            if self._pauses == 0:
                self._since = self._clock()

    def rates(self) -> dict[str, float]:
        """Rates since the last call, and the totals: `tokens_per_second`, `trained_tokens_per_second`, `tokens`,
        `trained_tokens`, `time` (seconds of training)."""
        now = (self.tokens, self.trained_tokens, self.seconds)
        elapsed = now[2] - self._last[2]
        tokens, trained = now[0] - self._last[0], now[1] - self._last[1]
        self._last = now
        return {
            "tokens_per_second": tokens / elapsed if elapsed > 0 else 0.0,
            "trained_tokens_per_second": trained / elapsed if elapsed > 0 else 0.0,
            "tokens": now[0],
            "trained_tokens": now[1],
            "time": now[2],
        }

    def state(self) -> dict[str, Any]:
        """What a resumed run continues from."""
        groups = self._restored_groups if self._groups is None else self._groups.state()
        counts = {"tokens": self.tokens, "trained_tokens": self.trained_tokens, "seconds": self.seconds}
        return counts if groups is None else {**counts, "groups": groups}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`; the clock starts now."""
        self._groups, self._restored_groups = None, state.get("groups")
        self.tokens, self.trained_tokens = int(state["tokens"]), int(state["trained_tokens"])
        self._seconds = float(state["seconds"])
        self._since = self._clock()
        self._last = (self.tokens, self.trained_tokens, self._seconds)
