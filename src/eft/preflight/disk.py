"""Whether the checkpoints of a run have room on the disk, and what to change where they have not. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class DiskNeed:
    """What a run is going to write."""

    weights: int
    """Bytes of the weights in a checkpoint; the final export takes at most as much."""
    optimizer: int
    """Bytes of the optimizer's state in a checkpoint; 0 with `save_only_model`."""
    saves: int
    """Checkpoints still to be written."""
    present: int
    """Checkpoints that are there already."""
    limit: int | None
    """`save_total_limit`."""
    keeps_best: bool
    """The best checkpoint stays beside those of the limit."""

    @property
    def at_once(self) -> int:
        """Most checkpoints that will lie there beside the present ones; a new one is whole before an old one goes."""
        if self.limit is None or self.saves == 0:
            return self.saves
        return max(1, min(self.saves, self.limit + 1 + self.keeps_best - self.present))

    @property
    def each(self) -> int:
        """Bytes of one checkpoint."""
        return self.weights + self.optimizer

    @property
    def total(self) -> int:
        """Bytes of all of them and of the export."""
        return self.at_once * self.each + self.weights


def disk_advice(need: DiskNeed, free: int) -> dict[str, Any] | None:
    """The least change of keys with which `need` fits into `free` bytes; None: no key helps.

    First fewer checkpoints, then checkpoints that cannot be resumed, then none.
    """
    model_only = replace(need, optimizer=0)
    for candidate, keys in ((need, {}), (model_only, {"save_only_model": True})):
        if candidate.total <= free:
            return keys
        for limit in range(need.at_once - 1, 0, -1):
            if replace(candidate, limit=limit).total <= free:
                return {**keys, "save_total_limit": limit}
    return {"save_strategy": "no"} if need.weights <= free else None
