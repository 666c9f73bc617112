"""The pages about optimizers and schedules are those of the tables."""

from __future__ import annotations

from pathlib import Path

import pytest

from eft.optim.optimizers import OPTIMIZERS
from eft.optim.reference import optimizers_markdown, schedules_markdown
from eft.optim.schedulers import SCHEDULES

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize(
    ("page", "text"), [("optimizers.md", optimizers_markdown()), ("schedules.md", schedules_markdown())]
)
def test_the_committed_page_is_the_generated_one(page: str, text: str) -> None:
    assert (DOCS / page).read_text() == text, "run `eft config docs`"


def test_every_name_has_a_row() -> None:
    optimizers, schedules = optimizers_markdown(), schedules_markdown()
    assert all(f"\n| `{name}` |" in optimizers for name in OPTIMIZERS)
    assert all(f"\n| `{name}` |" in schedules for name in SCHEDULES)
