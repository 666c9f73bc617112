"""Schedule-free optimizers (package `schedulefree`) that stay at the training iterate; see `averaging`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import schedulefree

from eft.optim.averaging import TrainingIterate


def _start_training(optimizer: Any) -> None:
    # What the library's `train()` does before the first step: at that point x = y = z.
    for group in optimizer.param_groups:
        group["train_mode"] = True


class ScheduleFreeAdamW(TrainingIterate, schedulefree.AdamWScheduleFree):  # type: ignore[misc]  # untyped base
    """AdamW with averaging."""

    def __init__(self, params: Iterable[Any], **options: Any) -> None:
        super().__init__(params, **options)
        _start_training(self)


class ScheduleFreeSGD(TrainingIterate, schedulefree.SGDScheduleFree):  # type: ignore[misc]  # untyped base
    """SGD with averaging in place of momentum."""

    def __init__(self, params: Iterable[Any], **options: Any) -> None:
        super().__init__(params, **options)
        _start_training(self)


class ScheduleFreeRAdam(TrainingIterate, schedulefree.RAdamScheduleFree):  # type: ignore[misc]  # untyped base
    """RAdam with averaging."""

    def __init__(self, params: Iterable[Any], **options: Any) -> None:
        super().__init__(params, **options)
        _start_training(self)
