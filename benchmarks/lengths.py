"""Sets of sample lengths that packing is measured on."""

from __future__ import annotations

import numpy as np

from eft.core.records import Int32Array


def log_normal(rng: np.random.Generator, num: int, capacity: int) -> Int32Array:
    """Chats: median 250 tokens, sigma 1; longer than a bin drawn again."""
    drawn = rng.lognormal(np.log(250), 1.0, int(1.5 * num))
    return drawn[(drawn >= 2) & (drawn <= capacity)][:num].astype(np.int32)


def uniform(rng: np.random.Generator, num: int, capacity: int) -> Int32Array:
    """Every length from 1 token to a whole bin."""
    return rng.integers(1, capacity + 1, num).astype(np.int32)


def bimodal(rng: np.random.Generator, num: int, capacity: int) -> Int32Array:
    """70 % chats of median 120, 30 % texts of 0.55 ± 0.1 bins."""
    short, long = rng.lognormal(np.log(120), 1.0, num), rng.normal(0.55 * capacity, 0.1 * capacity, num)
    return np.clip(np.where(rng.random(num) < 0.7, short, long), 2, capacity).astype(np.int32)


DISTRIBUTIONS = {"log-normal": log_normal, "uniform": uniform, "bimodal": bimodal}
