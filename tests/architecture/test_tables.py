"""The names that the config allows are exactly those of the tables that serve them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, get_args

from eft.config import data as gate_config
from eft.config import formats as data_config
from eft.config import optim as optim_config
from eft.data.formats import FORMATS
from eft.data.gates import GATES
from eft.optim.optimizers import OPTIMIZERS
from eft.optim.schedulers import SCHEDULES


def difference(literal: Any, table: Collection[str]) -> set[str]:
    """Names that only one of the two has."""
    return set(get_args(literal)) ^ set(table)


def test_tables_have_the_names_of_the_config() -> None:
    assert difference(optim_config.OptimizerName, OPTIMIZERS) == set()
    assert difference(optim_config.SchedulerName, SCHEDULES) == set()
    assert difference(data_config.FORMATS, FORMATS) == set()
    assert difference(gate_config.GateName, GATES) == set()


def test_a_missing_or_surplus_name_is_seen() -> None:
    assert difference(data_config.FORMATS, {"alpaca", "surplus"}) >= {"surplus", "completion"}
    assert difference(optim_config.OptimizerName, {}) == set(get_args(optim_config.OptimizerName)) != set()
