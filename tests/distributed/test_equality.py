"""E2 across topologies: the same config on 1, 2 and 4 processes trains on the same global batches to the same weights.

Every mode in packed rows of uneven length, with shares of ranks that train nothing and steps of fewer bins than ranks.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from eft.parallel.tensor import EXACT_STYLES, PARTIAL_STYLE, SUMMED_STYLE, exact_plan
from tests.distributed.ranks import Ranks
from tests.distributed.training import STEPS, Trained, build, differences, settings, train
from tests.functional.reference import token_rows
from tests.tiny_models import tiny_model


@cache
def alone(kind: str, **keys: Any) -> Trained:
    """What one process comes to; a fixed place, as it writes nothing."""
    return train(0, kind, settings(Path("/tmp/eft-alone-writes-nothing"), **keys))


MODES: dict[str, tuple[int, str, dict[str, Any]]] = {
    "DDP 2": (2, "DistributedDataParallel", {}),
    "FSDP2 2": (2, "FSDP of DTensors", {"fsdp_version": 2}),
    "CP 2": (2, "DistributedDataParallel", {"context_parallel_size": 2}),
    "CP 2 in FSDP2": (2, "FSDP of DTensors", {"context_parallel_size": 2, "fsdp_version": 2}),
    "FSDP2 2 in parts": (2, " of DTensors", {"fsdp_config": {"cpu_ram_efficient_loading": True}}),
    "TP 2": (2, " of DTensors", {"tensor_parallel_size": 2}),
    "DDP 4": (4, "DistributedDataParallel", {}),
    "FSDP2 4": (4, "FSDP of DTensors", {"fsdp_config": {"reshard_after_forward": False}}),
    "HSDP 2 × 2": (4, "FSDP of DTensors", {"dp_shard_size": 2, "dp_replicate_size": 2}),
    "CP 2 × DDP 2": (4, "DistributedDataParallel", {"context_parallel_size": 2}),
    "TP 2 × FSDP2 2": (4, " of DTensors", {"tensor_parallel_size": 2, "fsdp_version": 2}),
    "TP 2 × DDP 2": (4, " of DTensors", {"tensor_parallel_size": 2}),
}
"""Name to (processes, what the model is wrapped in, keys)."""

COVER = [
    ("DDP 2", "llama"),
    ("DDP 2", "qwen3_moe"),
    ("FSDP2 2", "llama lora"),
    ("FSDP2 2 in parts", "llama lora"),
    ("CP 2", "llama"),
    ("TP 2", "qwen3 half"),
]
"""Run always, and TP 2 × FSDP2 2 by the tests of resuming; all of MODES × KINDS is slow."""
KINDS = ["llama", "llama half", "llama lora", "llama tied", "qwen3_moe", "gemma3_text"]
BY_HEADS = [
    *["llama", "llama lora", "llama tied", "cohere2", "deepseek_v3", "gemma2", "gemma3_text", "gpt_neox", "gpt_oss"],
    *["granite", "llama4_text", "mistral", "mixtral", "olmo2", "olmoe", "phi3", "phimoe", "qwen2", "qwen3"],
    *["qwen3 half", "qwen3 lora", "qwen3_moe", "smollm3"],
]
"""Families whose plans together have every style of `EXACT_STYLES`."""
OF_TWO = [(mode, kind) for mode, (size, _, _) in MODES.items() if size == 2 and mode != "TP 2" for kind in KINDS]


def check(group: Ranks, mode: str, kind: str, tmp_path: Path, **keys: Any) -> list[Trained]:
    _, wrapped, more = MODES[mode]
    got = group.run(train, kind, settings(tmp_path / "out", **more, **keys))
    assert re.sub("FSDP[A-Za-z0-9]+", "FSDP", got[0].wrapped).endswith(wrapped)
    assert got[0].is_fsdp2 == wrapped.startswith("FSDP")
    assert differences(got[0], alone(kind, **keys)) == []
    return got


@pytest.mark.parametrize(("mode", "kind"), COVER)
def test_a_training_is_that_of_one_process(mode: str, kind: str, two: Ranks, tmp_path: Path) -> None:
    check(two, mode, kind, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "kind"), [*OF_TWO, *(("TP 2", kind) for kind in BY_HEADS)])
def test_every_mode_of_two(mode: str, kind: str, two: Ranks, tmp_path: Path) -> None:
    check(two, mode, kind, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", [mode for mode, (size, _, _) in MODES.items() if size == 4])
def test_every_mode_of_four(mode: str, kind: str, four: Ranks, tmp_path: Path) -> None:
    check(four, mode, kind, tmp_path)


@pytest.mark.parametrize("family", [kind for kind in BY_HEADS if " " not in kind])
def test_a_plan_has_proven_styles_only(family: str) -> None:
    model = tiny_model(family)
    changes = exact_plan(model.tp_plan, family)
    assert {*model.tp_plan.values(), *changes.values()} - {PARTIAL_STYLE} <= EXACT_STYLES


def test_every_style_that_is_taken_is_in_some_family_that_is_tried() -> None:
    plans = [tiny_model(kind).tp_plan for kind in BY_HEADS if " " not in kind]
    tried = {style for plan in plans for style in plan.values()}
    assert EXACT_STYLES - {SUMMED_STYLE} == tried - {PARTIAL_STYLE}
    assert PARTIAL_STYLE in tried


def test_an_evaluation_counts_every_row_once_on_any_number_of_ranks(two: Ranks, tmp_path: Path) -> None:
    evals = token_rows(7, longest=24, seed=9, weighted=True)
    keys = {
        "test_datasets": [{"path": "given"}],
        "max_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "eval_on_start": True,
    }
    expected = train(0, "llama", settings(tmp_path / "one", **keys), evals)
    for name, more in {"DDP": {}, "FSDP2": {"fsdp_version": 2}, "CP": {"context_parallel_size": 2}}.items():
        for got in two.run(train, "llama", settings(tmp_path / name, **keys, **more), evals):
            assert got.evals == pytest.approx(expected.evals, rel=1e-6)
            assert len(got.evals) == 3


@pytest.mark.parametrize("mode", [mode for mode, (size, _, _) in MODES.items() if size == 2])
def test_bf16_is_the_autocast_of_one_process(mode: str, two: Ranks, tmp_path: Path) -> None:
    """From equal weights; later losses differ by roundings of bf16. The run itself looks at the dtype of a product."""
    keys = {"bf16": True, "max_steps": 2}
    expected, plain = alone("llama", **keys), alone("llama", max_steps=2)
    got = two.run(train, "llama", settings(tmp_path, **MODES[mode][2], **keys))[0]
    # Under tensor parallelism the parts of a sum are rounded.
    assert got.losses[0] == pytest.approx(expected.losses[0], rel=1e-3 if mode.startswith("TP") else 1e-6)
    assert expected.losses[0] != pytest.approx(plain.losses[0], rel=1e-5), "bf16 computes something else"


@pytest.mark.parametrize("mode", ["FSDP2 2", pytest.param("FSDP2 2 in parts", marks=pytest.mark.slow)])
def test_the_weights_of_an_evaluation_are_not_those_of_the_next_step(mode: str, two: Ranks, tmp_path: Path) -> None:
    """FSDP2 keeps the head whole after a forward pass that no backward follows, here one with averaged weights."""
    evals = token_rows(7, longest=24, seed=9, weighted=True)
    keys = {"test_datasets": [{"path": "given"}], "eval_strategy": "steps", "eval_steps": 2}
    keys |= {"weight_average": "ema", "weight_average_decay": 0.5}
    expected = train(0, "llama", settings(tmp_path / "one", **keys), evals)
    got = two.run(train, "llama", settings(tmp_path / "two", **keys, **MODES[mode][2]), evals)[0]
    assert differences(got, expected) == []
    assert got.evals == pytest.approx(expected.evals, rel=1e-6)


def test_the_ranks_are_not_all_busy_in_every_step(tmp_path: Path) -> None:
    """What the tests above rely on: uneven rows, a step with fewer bins than ranks, shares that train nothing."""
    trainer = build("llama", settings(tmp_path))
    plan = trainer.make_plan()
    bins = [plan.step(step).bins for step in range(STEPS)]
    assert min(len(step) for step in bins) < 4
    counts = [[int(plan.dataset.trainable_counts[ids].sum()) for ids in step] for step in bins]
    assert any(0 in step for step in counts)
    assert len({count for step in counts for count in step}) > 10
