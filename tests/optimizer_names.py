"""Which optimizers of the table run on this machine, for tests of every one of them."""

from __future__ import annotations

from importlib.util import find_spec

from eft.optim.optimizers import is_averaging
from eft.optim.table import OPTIMIZERS

MISSING = sorted(name for name, row in OPTIMIZERS.items() if find_spec(row.package) is None)
"""Their package is not installed: what is tested is that they say so."""
ELSEWHERE = sorted(name for name, row in OPTIMIZERS.items() if "cpu" not in row.devices and name not in MISSING)
"""They have no kernels for a CPU."""
RUNNABLE = sorted(OPTIMIZERS.keys() - {*MISSING, *ELSEWHERE})
AVERAGED = [name for name in RUNNABLE if is_averaging(OPTIMIZERS[name])]
"""The schedule-free ones."""

RATES = {
    "sgd": 0.05,
    "schedule_free_sgd": 0.5,
    "adagrad": 0.2,
    **dict.fromkeys(("lion_pytorch", "lion_8bit", "lion_32bit"), 0.02),
    **dict.fromkeys(("rmsprop", "rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit"), 0.01),
}


def rate_of(name: str) -> float:
    """A learning rate at which the optimizer learns the small problems of these tests."""
    return RATES.get(name, 0.05)
