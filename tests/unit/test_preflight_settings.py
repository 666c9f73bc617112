"""What a run could do with less memory or disk: the order of the settings, and the least change that fits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from eft.preflight.disk import DiskNeed, disk_advice
from eft.preflight.settings import RunShape, cheaper_eval_sizes, cheaper_settings, present_setting, written

SHAPE = RunShape(
    micro_batch_size=4,
    accumulation=2,
    eval_batch_size=6,
    sequence_len=512,
    recomputes=False,
    offloads=False,
    can_offload=True,
    gives_global_batch=False,
)
ONE = {"micro_batch_size": 1, "gradient_accumulation_steps": 8}
TWO = {"micro_batch_size": 2, "gradient_accumulation_steps": 4}
RECOMPUTE = {"gradient_checkpointing": True}
OFFLOAD = {**RECOMPUTE, "activation_offloading": True}


def keys_of(shape: RunShape) -> list[dict[str, Any]]:
    return [setting.keys for setting in cheaper_settings(shape)]


def test_from_the_cheapest_to_the_dearest() -> None:
    assert keys_of(SHAPE) == [
        TWO,
        ONE,
        {**RECOMPUTE, "gradient_checkpointing_every": 2},
        RECOMPUTE,
        {**RECOMPUTE, **TWO},
        {**RECOMPUTE, **ONE},
        OFFLOAD,
        {**OFFLOAD, **TWO},
        {**OFFLOAD, **ONE},
        {**OFFLOAD, **ONE, "sequence_len": 256},
        {**OFFLOAD, **ONE, "sequence_len": 128},
    ]


def test_only_what_is_not_on_already() -> None:
    assert keys_of(replace(SHAPE, recomputes=True, offloads=True, sequence_len=128)) == [TWO, ONE]
    assert keys_of(replace(SHAPE, micro_batch_size=1, recomputes=True, can_offload=False)) == [
        {"sequence_len": 256},
        {"sequence_len": 128},
    ]
    without = keys_of(replace(SHAPE, may_accumulate=False))
    assert without[0] == {**RECOMPUTE, "gradient_checkpointing_every": 2}
    assert not [keys for keys in without if "micro_batch_size" in keys]
    assert keys_of(replace(SHAPE, gives_global_batch=True))[0] == {"micro_batch_size": 2}


@given(micro=st.integers(1, 64), accumulation=st.integers(1, 8), recomputes=st.booleans(), offloads=st.booleans())
def test_every_setting_keeps_the_global_batch(micro: int, accumulation: int, recomputes: bool, offloads: bool) -> None:
    shape = replace(SHAPE, micro_batch_size=micro, accumulation=accumulation, recomputes=recomputes, offloads=offloads)
    present = present_setting(shape)
    assert (present.micro_batch_size, present.accumulation, present.offloads) == (micro, accumulation, offloads)
    for setting in cheaper_settings(shape):
        assert setting.micro_batch_size * setting.accumulation == micro * accumulation
        assert setting.keys.get("micro_batch_size", micro) == setting.micro_batch_size
        assert setting.offloads == (offloads or "activation_offloading" in setting.keys)
        assert (setting.longest is not None) == ("sequence_len" in setting.keys)


def test_sizes_of_an_evaluation_batch() -> None:
    assert cheaper_eval_sizes(SHAPE) == [3, 2, 1]


def test_keys_as_one_would_write_them() -> None:
    assert written({"a": 2, "b": True}) == "`a: 2`, `b: true`"


NEED = DiskNeed(weights=10, optimizer=20, saves=5, present=0, limit=None, keeps_best=False)


def test_how_much_lies_there_at_once() -> None:
    assert (NEED.at_once, NEED.total) == (5, 160)
    assert replace(NEED, limit=2).at_once == 3, "the new one is whole before the oldest goes"
    assert replace(NEED, limit=2, keeps_best=True).at_once == 4
    assert replace(NEED, limit=9).at_once == 5
    assert replace(NEED, limit=2, present=2).at_once == 1
    assert replace(NEED, saves=0, limit=2).total == 10, "the export"


@given(
    weights=st.integers(1, 50),
    optimizer=st.integers(0, 100),
    saves=st.integers(0, 6),
    present=st.integers(0, 3),
    limit=st.none() | st.integers(1, 5),
    keeps_best=st.booleans(),
    free=st.integers(0, 800),
)
def test_disk_advice_is_the_least_change_that_fits(
    weights: int, optimizer: int, saves: int, present: int, limit: int | None, keeps_best: bool, free: int
) -> None:
    need = DiskNeed(weights, optimizer, saves, present, limit, keeps_best)
    keys = disk_advice(need, free)
    if need.total <= free:
        assert keys == {}
        return
    if keys is None:
        assert weights > free
        return
    if "save_strategy" in keys:
        assert replace(need, limit=1, optimizer=0).total > free >= weights
        return
    changed = replace(need, optimizer=0) if "save_only_model" in keys else need
    assert replace(changed, limit=keys.get("save_total_limit", limit)).total <= free
    if "save_only_model" in keys:
        assert replace(need, limit=1).total > free, "a limit alone would have done"
