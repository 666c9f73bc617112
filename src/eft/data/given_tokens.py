"""Samples that were tokenised elsewhere: ids, labels and weights of a row, checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from eft.core.constants import IGNORE_INDEX
from eft.core.errors import DataError
from eft.core.records import TokenSample

_HIGHEST_ID = np.iinfo(np.int32).max


def given_sample(where: str, row: Mapping[str, Any]) -> TokenSample:
    """`input_ids`, `labels` and, where present, `weights` of a row, each a flat list or array.

    A label is the input id at its own position, or IGNORE_INDEX. Whether the ids are in a vocabulary is the caller's to
    ask.

    Raises:
        DataError: starts with `where`. No labels (training on everything must be said), labels that are neither, a
            padded row, weights below 0, anything that is no list of numbers.
    """
    ids = _integers(where, row, "input_ids")
    if row.get("labels") is None:
        raise DataError(
            f"{where}: no 'labels' (the row has {_names(row)}); eft trains on rows with input_ids and labels, where a "
            f"label is the input id to train or {IGNORE_INDEX} for context. To train on every token, give the "
            "input_ids as labels, too"
        )
    labels = _integers(where, row, "labels")
    if len(labels) != len(ids):
        raise DataError(f"{where}: {len(labels)} labels for {len(ids)} input_ids; expected as many")
    wrong = np.flatnonzero((labels != IGNORE_INDEX) & (labels != ids))
    if len(wrong):
        at = int(wrong[0])
        raise DataError(
            f"{where}: labels[{at}] is {labels[at]} where input_ids[{at}] is {ids[at]}; expected the same id or "
            f"{IGNORE_INDEX} (labels are not shifted: the loss does that)"
        )
    if len(ids) and ids.min() < 0:
        raise DataError(f"{where}: input_ids[{int(ids.argmin())}] is {ids.min()}; ids are 0 or more")
    mask = _array(row["attention_mask"]) if row.get("attention_mask") is not None else np.ones(1, dtype=bool)
    if mask is None or mask.dtype.kind not in "biuf":
        raise DataError(f"{where}: field 'attention_mask' is not a flat list of 0 and 1")
    if not np.all(mask):
        raise DataError(f"{where}: is padded (zeros in attention_mask); give unpadded rows, eft pads where it must")
    return TokenSample(ids, labels, _weights(where, row, len(ids)))


def _integers(where: str, row: Mapping[str, Any], name: str) -> npt.NDArray[np.int32]:
    if row.get(name) is None:
        problem = f"field {name!r} is null" if name in row else f"no field {name!r}"
        raise DataError(f"{where}: {problem}, expected a list of token ids; the row has {_names(row)}")
    values = _array(row[name])
    if values is None or values.ndim != 1 or (values.dtype.kind not in "iu" and len(values)):
        raise DataError(f"{where}: field {name!r} is not a flat list of integers (token ids)")
    if len(values) and (values.max() > _HIGHEST_ID or values.min() < -_HIGHEST_ID):
        raise DataError(f"{where}: field {name!r} has ids outside 32 bits")
    return values.astype(np.int32)


def _weights(where: str, row: Mapping[str, Any], length: int) -> npt.NDArray[np.float32] | None:
    if row.get("weights") is None:
        return None
    values = _array(row["weights"])
    if values is None or values.shape != (length,) or values.dtype.kind not in "fiu" or np.any(values < 0):
        raise DataError(f"{where}: field 'weights' must be {length} numbers of 0 or more, one per id")
    if not np.all(np.isfinite(values)):
        raise DataError(f"{where}: field 'weights' has values that are not finite")
    return values.astype(np.float32)


def _names(row: Mapping[str, Any]) -> str:
    return ", ".join(map(str, row)) or "no fields"


def _array(value: Any) -> npt.NDArray[Any] | None:
    try:
        return np.asarray(value)
    except (ValueError, TypeError, OverflowError):
        return None  # lists of different lengths, or of what is no number
