"""`split: train[10:200]` of a local data set: which rows are wanted."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from eft.config.data import DatasetConfig
from eft.core.errors import DataError

_SPLIT = re.compile(r"(?P<name>[\w.+-]+)(?:\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?")


def slice_of(spec: DatasetConfig) -> tuple[str, str] | None:
    """The `[start:stop]` of a local split, as written; None when there is none."""
    match = _SPLIT.fullmatch(spec.split)
    if match is None:
        raise DataError(f"{spec.path}: split {spec.split!r} is not understood; expected 'train' or 'train[10:200]'")
    start, stop = match["start"] or "", match["stop"] or ""
    if any(bound.endswith("%") and abs(int(bound[:-1])) > 100 for bound in (start, stop)):
        raise DataError(f"{spec.path}: split {spec.split!r} asks for more than the whole; expected 0% to 100%")
    return (start, stop) if "[" in spec.split else None


def split_name(spec: DatasetConfig) -> str:
    """The split without its slice."""
    slice_of(spec)
    return spec.split.split("[")[0]


def is_hub(spec: DatasetConfig) -> bool:
    """Whether the data set is not local."""
    return not Path(spec.path).expanduser().exists()


def slice_bounds(spec: DatasetConfig, count: Callable[[], int]) -> tuple[int, int | None]:
    """Start and stop of the rows wanted; `count` is asked only where a share or a negative bound needs it."""
    bounds = None if is_hub(spec) else slice_of(spec)  # `datasets` slices hub splits itself
    if bounds is None:
        return 0, None
    if not any("%" in bound or bound.startswith("-") for bound in bounds):
        return int(bounds[0] or 0), int(bounds[1]) if bounds[1] else None
    total = count()
    numbers = [
        round(total * int(bound[:-1]) / 100) if bound.endswith("%") else int(bound) if bound else None
        for bound in bounds
    ]
    start, stop, _ = slice(*numbers).indices(total)
    return start, stop
