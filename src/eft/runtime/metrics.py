"""The run's numbers as they come: one JSON object a line, and token rates without the pauses."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from eft.core.atomic import append_line, write_text
from eft.core.constants import METRICS_FILE


class MetricsWriter:
    """Appends to `metrics.jsonl` in the output folder; each line is in the file when `write` returns."""

    def __init__(self, folder: Path, *, resume_step: int = 0) -> None:
        """Start the file anew, or continue one after `resume_step`: later rows are dropped, they will come again.

        Rows without `step`, and rows that are not one JSON object (the last one of a killed run), are kept and dropped,
        respectively.
        """
        self.path = folder / METRICS_FILE
        kept = [line for line in self._lines() if _is_before(line, resume_step)] if resume_step else []
        write_text(self.path, "".join(f"{line}\n" for line in kept))

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row. Numbers keep every digit; what is not finite becomes null; 0-d tensors become numbers."""
        append_line(self.path, json.dumps(_plain(row), ensure_ascii=False, allow_nan=False))

    def _lines(self) -> list[str]:
        return self.path.read_text(encoding="utf-8").split("\n") if self.path.exists() else []


def _is_before(line: str, step: int) -> bool:
    try:
        row = json.loads(line)
    except ValueError:
        return False
    return isinstance(row, dict) and row.get("step", 0) <= step


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


class Throughput:
    """Token counts of a run and their rates per second of training time: evaluation and saving do not count."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self.tokens = 0
        self.trained_tokens = 0
        self._seconds = 0.0
        self._since = clock()
        self._pauses = 0
        self._last = (0, 0, 0.0)

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

    def state(self) -> dict[str, float]:
        """What a resumed run continues from."""
        return {"tokens": self.tokens, "trained_tokens": self.trained_tokens, "seconds": self.seconds}

    def restore(self, state: Mapping[str, float]) -> None:
        """Continue from `state`; the clock starts now."""
        self.tokens, self.trained_tokens = int(state["tokens"]), int(state["trained_tokens"])
        self._seconds = float(state["seconds"])
        self._since = self._clock()
        self._last = (self.tokens, self.trained_tokens, self._seconds)
