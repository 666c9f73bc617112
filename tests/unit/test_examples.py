"""Every example that we ship is a valid config whose rows exist."""

from __future__ import annotations

from pathlib import Path

import pytest

from eft.config.load import load_config
from eft.data.formats import resolve_format
from eft.data.sources import iter_rows

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 6


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_is_valid(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = load_config(path).config
    for spec in config.datasets:
        if spec.path.startswith("quickstart-out/"):
            continue  # laid out by `eft quickstart`; tests/unit/test_quickstart.py reads that
        rows = list(iter_rows(spec))
        assert rows
        for row in rows:
            resolve_format(spec)(row, spec)
