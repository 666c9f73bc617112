"""One group of processes per world size and module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.distributed.ranks import Ranks, ranks
from tests.functional.conftest import (  # noqa: F401  # fixtures
    make_config,
    make_trainer,
    model_folder,
    prepared_path,
    rows_file,
    tokenizer,
)


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    """Two ranks."""
    with ranks(2) as group:
        yield group


@pytest.fixture(scope="module")
def four() -> Iterator[Ranks]:
    """Four ranks."""
    with ranks(4) as group:
        yield group
