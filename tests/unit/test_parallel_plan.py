"""The arithmetic of the global batch, and unwrapping."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from eft.core.errors import ConfigError
from eft.parallel.plan import BatchPlan, Degrees, resolve_batch
from eft.parallel.state_dict import full_state_dict, unwrap


def plan(
    micro: int, accumulation: int | None, total: int | None, world: int = 1, pinned: int | None = None
) -> BatchPlan:
    return resolve_batch(
        micro_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        global_batch_size=total,
        degrees=Degrees.resolve(world),
        pinned_global_batch_size=pinned,
    )


@given(micro=st.integers(1, 64), accumulation=st.integers(1, 64), world=st.integers(1, 64))
def test_each_way_of_saying_it_gives_the_same(micro: int, accumulation: int, world: int) -> None:
    total = micro * accumulation * world
    for given_accumulation, given_total in ((accumulation, None), (None, total), (accumulation, total)):
        found = plan(micro, given_accumulation, given_total, world)
        assert (found.accumulation, found.global_batch_size) == (accumulation, total)
    resumed = plan(micro, 7, None, world, pinned=total)
    assert (resumed.accumulation, resumed.global_batch_size) == (accumulation, total)


def test_defaults_and_origin() -> None:
    found = plan(2, None, None, world=3)
    assert (found.accumulation, found.global_batch_size) == (1, 6)
    assert found.origin == "`micro_batch_size` 2 × 3 data-parallel processes × `gradient_accumulation_steps` 1"
    assert plan(1, None, 4).origin == "global_batch_size"


@given(micro=st.integers(1, 9), world=st.integers(1, 9), total=st.integers(1, 200))
def test_what_does_not_divide_is_refused_with_the_nearest_that_does(micro: int, world: int, total: int) -> None:
    if total % (micro * world) == 0:
        assert plan(micro, None, total, world).global_batch_size == total
        return
    with pytest.raises(ConfigError, match=f"^global_batch_size: {total} is no multiple") as caught:
        plan(micro, None, total, world)
    nearest = str(caught.value).rsplit("use ", 1)[1].rstrip(".").split(" or ")
    for number in nearest:
        assert plan(micro, None, int(number), world).global_batch_size == int(number)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((2, 4, 4, 1, None), r"gradient_accumulation_steps: 4 × `micro_batch_size` 2 × 1 data-parallel process is 8"),
        ((3, None, None, 2, 16), r"micro_batch_size: the checkpoint's global batch of 16 is no multiple"),
        ((2, None, 8, 1, 16), r"global_batch_size: 8, but the checkpoint was trained with 16"),
    ],
)
def test_contradictions_name_the_keys(
    arguments: tuple[int, int | None, int | None, int, int | None], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(*arguments)


def test_full_state_dict_of_a_compiled_model() -> None:
    model = nn.Linear(2, 2)
    compiled = torch.compile(model, backend="eager")
    assert unwrap(compiled) is model  # type: ignore[arg-type]
    state = full_state_dict(compiled)  # type: ignore[arg-type]
    assert set(state) == {"weight", "bias"}
    assert state["weight"].data_ptr() == model.weight.data_ptr()
