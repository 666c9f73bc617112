"""metrics.jsonl and token rates."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eft.runtime.metrics import MetricsWriter, Throughput


def rows(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_row_is_in_the_file_at_once(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path)
    assert rows(writer.path) == []
    for step in range(3):
        writer.write({"step": step, "loss": 0.1 * step})
        assert len(rows(writer.path)) == step + 1


def test_what_is_not_finite_becomes_null_and_scalars_become_numbers(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path)
    writer.write(
        {
            "nan": math.nan,
            "inf": [math.inf, {"deep": -math.inf}],
            "torch": torch.tensor(1.5),
            "torch_nan": torch.tensor(math.nan),
            "numpy": np.float32(0.25),
            "int": np.int64(3),
            "flag": True,
            "none": None,
            "path": Path("a"),
        }
    )
    assert rows(writer.path) == [
        {
            "nan": None,
            "inf": [None, {"deep": None}],
            "torch": 1.5,
            "torch_nan": None,
            "numpy": 0.25,
            "int": 3,
            "flag": True,
            "none": None,
            "path": "a",
        }
    ]


@given(value=st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_keep_every_digit(value: float, tmp_path_factory: pytest.TempPathFactory) -> None:
    writer = MetricsWriter(tmp_path_factory.getbasetemp())
    writer.write({"x": value})
    (row,) = rows(writer.path)
    assert row["x"].hex() == value.hex()


def test_after_a_resume_each_step_is_there_once(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path)
    writer.write({"event": "start"})
    for step in range(1, 8):
        writer.write({"step": step, "run": 1})
    with writer.path.open("a") as file:
        file.write('{"step": 8, "lo')  # killed in the middle of a line
    resumed = MetricsWriter(tmp_path, resume_step=5)
    for step in range(6, 9):
        resumed.write({"step": step, "run": 2})
    written = rows(resumed.path)
    assert written[0] == {"event": "start"}
    assert [(row["step"], row["run"]) for row in written[1:]] == [(step, 1 if step < 6 else 2) for step in range(1, 9)]


def test_a_fresh_run_starts_anew_and_a_missing_file_is_no_error(tmp_path: Path) -> None:
    MetricsWriter(tmp_path).write({"step": 1})
    assert rows(MetricsWriter(tmp_path).path) == []
    assert rows(MetricsWriter(tmp_path / "new", resume_step=3).path) == []


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_rates_leave_pauses_out() -> None:
    clock = Clock()
    meter = Throughput(clock)
    clock.now += 2
    meter.count(100, 60)
    with meter.paused():
        clock.now += 50
        with meter.paused():
            clock.now += 50
        clock.now += 50
    clock.now += 2
    meter.count(100, 20)
    assert meter.rates() == {
        "tokens_per_second": 50.0,
        "trained_tokens_per_second": 20.0,
        "tokens": 200,
        "trained_tokens": 80,
        "time": 4.0,
    }
    clock.now += 1
    meter.count(10, 5)
    assert meter.rates()["tokens_per_second"] == 10.0
    assert meter.rates()["tokens_per_second"] == 0.0  # no time has passed


def test_a_pause_ends_with_an_error_too() -> None:
    clock = Clock()
    meter = Throughput(clock)

    def fail() -> None:
        with meter.paused():
            clock.now += 5
            raise KeyError("planted")

    with pytest.raises(KeyError):
        fail()
    clock.now += 1
    assert meter.seconds == 1.0


def test_totals_go_on_after_a_resume() -> None:
    clock = Clock()
    first = Throughput(clock)
    clock.now += 4
    first.count(100, 50)
    state = json.loads(json.dumps(first.state()))
    clock.now += 1000
    second = Throughput(clock)
    clock.now += 7
    second.restore(state)
    clock.now += 2
    second.count(20, 10)
    rates = second.rates()
    assert (rates["tokens"], rates["trained_tokens"], rates["time"]) == (120, 60, 6.0)
    assert rates["tokens_per_second"] == 10.0
