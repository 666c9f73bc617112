"""Steps whose loss or gradient is not to be believed: what they are, and what is done about them (D16). Pure.

A step is at fault when its loss or the norm of its gradients is not finite, or its loss is above a threshold. What
follows is one of: end the run; leave the step's update out (`skip`); go back to the last checkpoint before it and pass
over its data (`rollback`). A step that is left out or passed over keeps its number and its learning rate, so that the
schedule and every later step stay what the plan says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

Action = Literal["stop", "skip", "rollback"]

SKIPS_IN_A_ROW = 10
"""So many steps in a row that are not finite are no accident: the weights are broken."""
ROLLBACKS = 10
"""So many returns in one process are not worth another."""


@dataclass(frozen=True)
class WatchRules:
    """What is a fault, and what follows."""

    nonfinite: Action | Literal["ignore"] = "ignore"
    spike: Action = "stop"
    threshold: float | None = None
    """A loss above it is a spike; one that is not a number, too, where `nonfinite` is `ignore`."""
    patience: int = 3
    """Spikes in a row until the run stops or goes back."""

    @property
    def is_on(self) -> bool:
        """Whether anything is watched."""
        return self.nonfinite != "ignore" or self.threshold is not None

    @property
    def skips(self) -> bool:
        """Whether updates may be left out."""
        return self.nonfinite == "skip" or (self.threshold is not None and self.spike == "skip")

    def faulty(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Whether this step's update is to be left out: a bool scalar on the device, without waiting for it."""
        if self.nonfinite == "skip":
            fault = ~(torch.isfinite(loss) & torch.isfinite(norm))
        else:
            fault = torch.zeros_like(loss, dtype=torch.bool)
        if self.threshold is not None and self.spike == "skip":
            # NaN compares false with everything, so ask for what is good.
            fault = fault | ~(loss <= self.threshold)
        return fault


@dataclass(frozen=True)
class LeftOut:
    """A step that changed nothing."""

    step: int
    """1-based, as in the metrics."""
    how: Literal["skip", "rollback"]
    why: str


@dataclass(frozen=True)
class Verdict:
    """The run does not go on as it is."""

    action: Literal["stop", "rollback"]
    why: str
    steps: tuple[int, ...]
    """Those at fault, ascending; to be passed over after a rollback."""


@dataclass
class Watchdog:
    """Judges one step after the other, and remembers which were left out."""

    rules: WatchRules = field(default_factory=WatchRules)
    fail: Callable[[str], None] = lambda reason: None
    """Told why, when the run ends because of a fault."""
    left_out: list[LeftOut] = field(default_factory=list)
    in_a_row: list[int] = field(default_factory=list)
    """The steps at fault right before the next one."""
    rollbacks: int = 0

    def judge(self, step: int, loss: float, norm: float) -> Verdict | None:
        """What follows from step `step`; None: the run goes on. `norm` is the loss where there is no norm."""
        action, why = self._fault(step, loss, norm)
        if action is None:
            self.in_a_row = []
            return None
        self.in_a_row.append(step)
        if why.startswith("loss watchdog") and len(self.in_a_row) > 1:
            why += f" for {len(self.in_a_row)} steps in a row"
        is_spike = why.startswith("loss watchdog")
        if action == "skip":
            self.left_out.append(LeftOut(step, "skip", why))
            limit = self.rules.patience if is_spike else SKIPS_IN_A_ROW
            if len(self.in_a_row) < limit:
                return None
            return Verdict("stop", f"{why}; {limit} updates in a row were left out", tuple(self.in_a_row))
        if is_spike and len(self.in_a_row) < self.rules.patience:
            return None
        return Verdict(action, why, tuple(self.in_a_row))

    def _fault(self, step: int, loss: float, norm: float) -> tuple[Action | None, str]:
        rules = self.rules
        if rules.nonfinite != "ignore" and not (math.isfinite(loss) and math.isfinite(norm)):
            numbers = f"loss {loss:.4g}, gradient norm {norm:.4g}"
            return rules.nonfinite, f"step {step:,} is not finite: {numbers}"
        if rules.threshold is not None and not loss <= rules.threshold:
            return rules.spike, f"loss watchdog: loss {loss:.4g} above {rules.threshold:g}"
        return None, ""

    def is_passed_over(self, step: int) -> bool:
        """Whether the data of `step` (1-based) are not to be trained on any more."""
        return any(entry.step == step and entry.how == "rollback" for entry in self.left_out)

    def pass_over(self, verdict: Verdict) -> None:
        """From now on."""
        self.rollbacks += 1
        self.left_out += [LeftOut(step, "rollback", verdict.why) for step in verdict.steps]

    def count(self, after: int, until: int) -> int:
        """How many of the steps `after` < step ≤ `until` were left out."""
        return sum(after < step <= until for step in {entry.step for entry in self.left_out})

    def state(self) -> dict[str, Any]:
        """What `restore` needs; JSON-able."""
        return {"left_out": [asdict(entry) for entry in self.left_out], "in_a_row": list(self.in_a_row)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """As at a checkpoint. What this process has decided to pass over since stays decided."""
        saved = [LeftOut(**entry) for entry in state.get("left_out", [])]
        self.left_out = saved + [own for own in self.left_out if own.how == "rollback" and own not in saved]
        self.in_a_row = list(state.get("in_a_row", []))


class LateNumbers:
    """A few numbers of every step, on their way to the host while the device works on.

    On the CPU they are there at once; from a device they are read when the step after theirs is queued, so that the
    host is never more than one step ahead and the device never waits.
    """

    def __init__(self) -> None:
        self._pending: list[tuple[int, Tensor, Any]] = []
        self._buffers: list[Tensor] = []

    def send(self, step: int, values: Tensor) -> None:
        """`values` fp32 [n], of `step`; they may change afterwards."""
        event = None
        if values.is_cuda:
            if not self._buffers:
                self._buffers = [torch.empty(values.shape, pin_memory=True) for _ in range(2)]
            # At most that of the step before is under way.
            host = self._buffers[step % 2].copy_(values, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        else:
            host = values.clone()
        self._pending.append((step, host, event))

    def receive(self, before: int) -> Iterator[tuple[int, list[float]]]:
        """(step, numbers) of every step below `before`, in order; on the CPU of all that were sent."""
        while self._pending and (self._pending[0][0] < before or self._pending[0][2] is None):
            step, host, event = self._pending.pop(0)
            if event is not None:
                event.synchronize()
            yield step, host.tolist()

    def clear(self) -> None:
        """Forget what is under way."""
        self._pending = []
