"""ZeRO by DeepSpeed over gloo: the numbers of one process, checkpoints like any other.

DeepSpeed runs on the CPU by itself here, without a shim; only its kernel for shared memory is left out (as in a run).
"""

from __future__ import annotations

import os
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers.integrations import is_deepspeed_zero3_enabled

from eft.core.hashing import hash_file
from eft.runtime.checkpoint import verify_manifest
from tests.distributed.ranks import Ranks
from tests.distributed.training import STEPS, Trained, build, differences, save_again, settings, train
from tests.functional.reference import token_rows

if find_spec("deepspeed") is None:
    pytest.skip("the extra `deepspeed` is not installed", allow_module_level=True)

KINDS = ["llama", "llama lora", "llama tied", "qwen3_moe", "gemma3_text"]
COVER = {("zero2", "llama"), ("zero3", "llama"), ("zero3", "llama lora")}
"""Run always."""


@cache
def alone(kind: str, **keys: Any) -> Trained:
    """What one process comes to; a fixed place, as it writes nothing."""
    return train(0, kind, settings(Path("/tmp/eft-alone-writes-nothing"), **keys))


@pytest.mark.parametrize(
    ("stage", "kind"),
    [
        pytest.param(stage, kind, marks=() if (stage, kind) in COVER else pytest.mark.slow)
        for stage in ("zero1", "zero2", "zero3")
        for kind in KINDS
    ],
)
def test_a_training_is_that_of_one_process(stage: str, kind: str, two: Ranks, tmp_path: Path) -> None:
    got = two.run(train, kind, settings(tmp_path / "out", deepspeed=stage))
    assert got[0].wrapped == "DeepSpeedEngine"
    assert differences(got[0], alone(kind)) == []


MIDDLE, LATER = 5, 8
SAVES: dict[str, Any] = {"save_strategy": "steps", "save_steps": 100}


def run(group: Ranks, way: str, kind: str, folder: Path, resume: str | None, stop: int | None) -> Trained:
    if way == "one":
        return train(0, kind, settings(folder, **SAVES), None, resume, stop)
    got: Trained = group.run(train, kind, settings(folder, **SAVES, deepspeed=way), None, resume, stop)[0]
    return got


@pytest.mark.parametrize(
    ("ways", "kind"),
    [
        (("one", "zero2", "one"), "llama lora"),
        (("zero3", "one", "zero3"), "llama tied"),
        (("zero2", "zero3", "zero1"), "llama lora"),
        *(
            pytest.param(ways, kind, marks=pytest.mark.slow)
            for ways in (("one", "zero2", "one"), ("one", "zero3", "one"), ("zero3", "zero2", "zero3"))
            for kind in ("llama", "llama lora", "llama tied", "qwen3_moe")
        ),
    ],
)
def test_a_run_goes_on_elsewhere(ways: tuple[str, ...], kind: str, two: Ranks, tmp_path: Path) -> None:
    """Stopped after step 5, after step 8, and run to the end: what follows is what one process does."""
    expected, resume, start = alone(kind), None, 0
    for number, way in enumerate(ways):
        stop = (MIDDLE, LATER, None)[number]
        got = run(two, way, kind, tmp_path / str(number), resume, stop)
        end = stop or STEPS
        whole = expected if stop is None else replace(expected, weights={})
        until = replace(whole, losses=expected.losses[:end], norms=expected.norms[:end])
        assert differences(got if stop is None else replace(got, weights={}), until, start=start) == []
        if stop is not None:
            checkpoint = tmp_path / str(number) / f"checkpoint-{stop}"
            verify_manifest(checkpoint)
            resume, start = str(checkpoint), stop


@pytest.mark.parametrize("kind", ["llama lora", pytest.param("llama tied", marks=pytest.mark.slow)])
def test_a_checkpoint_is_the_same_bytes_whoever_writes_it(kind: str, two: Ranks, tmp_path: Path) -> None:
    """What one process has written, two have read, each its runs, and written again: no bit is lost, none is empty."""
    keys = {**SAVES, "max_steps": 3}
    train(0, kind, settings(tmp_path / "one", **keys))
    source = tmp_path / "one" / "checkpoint-3"
    weights = "adapter_model.safetensors" if kind.endswith("lora") else "model.safetensors"
    assert all(tensor.numel() for tensor in load_file(source / weights).values())
    for way in ("zero2", "zero3"):
        two.run(save_again, kind, settings(tmp_path / way, **keys, deepspeed=way), str(source))
        written = tmp_path / way / "checkpoint-3"
        for name in (weights, "optimizer.safetensors", "optimizer.json"):
            assert hash_file(written / name) == hash_file(source / name)


HELD_OUT: dict[str, Any] = {
    "test_datasets": [{"path": "given"}],
    "max_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "eval_on_start": True,
}


@pytest.mark.parametrize("bf16", [False, True])
def test_an_evaluation_and_bf16_are_those_of_one_process(bf16: bool, two: Ranks, tmp_path: Path) -> None:
    """In bf16 the first numbers must agree, which come from equal weights; autocast is DeepSpeed's there."""
    evals = token_rows(7, longest=24, seed=9, weighted=True)
    keys = {**HELD_OUT, "bf16": bf16}
    expected = train(0, "llama", settings(tmp_path / "one", **keys), evals)
    for stage in ("zero2", "zero3"):
        for got in two.run(train, "llama", settings(tmp_path / stage, **keys, deepspeed=stage), evals):
            assert len(got.evals) == 3
            count = 1 if bf16 else 3
            assert got.evals[:count] == pytest.approx(expected.evals[:count], rel=1e-6)
            assert got.losses[0] == pytest.approx(expected.losses[0], rel=1e-6)
            assert got.norms[0] == pytest.approx(expected.norms[0], rel=1e-5)
    if bf16:
        plain = train(0, "llama", settings(tmp_path / "plain", **HELD_OUT), evals)
        assert expected.losses[0] != pytest.approx(plain.losses[0], rel=1e-5), "bf16 computes something else"


def _switches(rank: int, keys: dict[str, Any]) -> tuple[str | None, bool]:
    build("llama", keys)
    return os.environ.get("ACCELERATE_USE_DEEPSPEED"), is_deepspeed_zero3_enabled()


def test_nothing_is_left_switched_on(two: Ranks, tmp_path: Path) -> None:
    """What is trained or loaded next in the same process must not be ZeRO's, too."""
    assert two.run(_switches, settings(tmp_path, deepspeed="zero3")) == [(None, False)] * 2
    assert two.run(train, "llama", settings(tmp_path / "next", max_steps=1))[0].wrapped == "DistributedDataParallel"


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
@pytest.mark.parametrize(("name", "options"), [("sgd", {"momentum": 0.9}), ("rmsprop", {"eps": 1e-3})])
def test_every_optimizer_that_is_taken(
    name: str, options: dict[str, float], stage: str, two: Ranks, tmp_path: Path
) -> None:
    keys = {"optimizer": name, "optim_args": options, "adam_epsilon": None}
    expected = train(0, "llama", settings(tmp_path / "one", **keys))
    got = two.run(train, "llama", settings(tmp_path / "two", deepspeed=stage, **keys))
    assert differences(got[0], expected) == []
