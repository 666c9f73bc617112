"""Golden records: what became of one row, compact, with decoded text for the reviewer's eyes.

After an intended change: `python -m tests.golden.records` rewrites all golden files; read their diff.
"""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from eft.core.constants import IGNORE_INDEX
from eft.core.records import TokenSample
from eft.data.tokenize import Outcome, Rejected

FOLDER = Path(__file__).parent
Record = dict[str, Any] | list[dict[str, Any]]


def record(outcome: Outcome, tokenizer: Any) -> Record:
    """`text` and `trained` are decoded; `ids`; `labels` are the positions whose label is the id (others −100), as
    first-last; `weights` (where there are any) of those positions, as value×count."""
    if isinstance(outcome, Rejected):
        return {"refused": outcome.reason}
    if isinstance(outcome, tuple):
        return [_sample(sample, tokenizer) for sample in outcome]
    return _sample(outcome, tokenizer)


def _sample(sample: TokenSample, tokenizer: Any) -> dict[str, Any]:
    ids = sample.input_ids
    is_trained = sample.labels != IGNORE_INDEX
    assert np.array_equal(sample.labels[is_trained], ids[is_trained])
    edges = np.flatnonzero(np.diff(np.concatenate([[False], is_trained, [False]])))
    runs = list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
    found = {
        "text": tokenizer.decode(ids),
        "trained": [tokenizer.decode(ids[first:last]) for first, last in runs],
        "ids": " ".join(map(str, ids.tolist())),
        "labels": " ".join(f"{first}-{last - 1}" for first, last in runs),
    }
    if sample.weights is not None:
        weights = [sample.weights[first:last].tolist() for first, last in runs]
        found["weights"] = " ".join(f"{value:g}×{len(list(run))}" for part in weights for value, run in groupby(part))
    return found


def read(name: str) -> dict[str, Any]:
    """The committed records of a golden file."""
    found: dict[str, Any] = json.loads((FOLDER / name).read_text(encoding="utf-8"))
    return found


def write(name: str, records: dict[str, Any]) -> None:
    text = json.dumps(records, indent=1, ensure_ascii=False)
    (FOLDER / name).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    from tests.golden import test_golden_formats, test_golden_templates

    write(test_golden_formats.GOLDEN, test_golden_formats.all_records())
    write(test_golden_templates.GOLDEN, test_golden_templates.all_records())
