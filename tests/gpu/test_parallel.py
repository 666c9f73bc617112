"""What the CPU runs through a shim only, on accelerators as users run it: two processes come to what one does."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from eft.core.constants import METRICS_FILE
from tests.distributed.commands import start, write_run

MODES: dict[str, dict[str, Any]] = {
    "DDP": {},
    "FSDP2": {"fsdp_version": 2},
    "CP": {"context_parallel_size": 2},
    "CP in FSDP2": {"context_parallel_size": 2, "fsdp_version": 2},
    "TP": {"tensor_parallel_size": 2, "adapter": None},
    "ZeRO-2": {"deepspeed": "zero2"},
    "ZeRO-3": {"deepspeed": "zero3"},
}


@pytest.mark.gpu
@pytest.mark.timeout(900)
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("mode", MODES)
def test_two_gpus_train_as_one_does(mode: str, tmp_path: Path) -> None:
    if "deepspeed" in MODES[mode] and find_spec("deepspeed") is None:
        pytest.skip("the extra `deepspeed` is not installed")
    keys = {"lora_dropout": 0.0, "adam_epsilon": 1e-3, **MODES[mode]}
    if keys.get("adapter", "lora") is None:
        keys |= {"lora_target_linear": None, "lora_dropout": None}
    config = write_run(tmp_path, **keys)
    alone = [f"{name}=null" for name in MODES[mode] if name != "adapter"]
    for folder, arguments in (("one", ["--launcher", "none", *alone]), ("two", ["--nproc", 2])):
        code, text = start("train", config, f"output_dir={tmp_path / folder}", *arguments).end()
        assert code == 0, text
    losses = []
    for folder in ("one", "two"):
        rows = [json.loads(line) for line in (tmp_path / folder / METRICS_FILE).read_text().splitlines()]
        losses.append({row["step"]: row["loss"] for row in rows if "loss" in row})
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
