"""Device, ranks, precision, versions."""

from __future__ import annotations

from dataclasses import replace
from importlib import metadata
from typing import Any

import pytest
import torch

from eft.config.training import TrainingConfig
from eft.core.errors import ConfigError
from eft.runtime.env import Environment, resolve_precision, versions

CPU = Environment(torch.device("cpu"), "cpu", 0, 0, 1, True, "native for the test")
OLD_CPU = replace(CPU, bf16_native=False, bf16_reason="the CPU does not compute bf16 natively")
CUDA = replace(CPU, device=torch.device("cuda", 0))
OLD_CUDA = replace(CUDA, bf16_native=False, bf16_reason="the GPU does not compute bf16 natively")


def test_detect_one_process() -> None:
    env = Environment.detect({})
    assert (env.rank, env.local_rank, env.world_size) == (0, 0, 1)
    assert env.device.type == ("cuda" if torch.cuda.is_available() else env.device.type)
    assert env.device_name
    assert env.bf16_reason


def test_detect_torchrun() -> None:
    env = Environment.detect({"RANK": "5", "LOCAL_RANK": "0", "WORLD_SIZE": "8"})
    assert (env.rank, env.local_rank, env.world_size) == (5, 0, 8)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK: 2 is not below WORLD_SIZE 2"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE: expected a whole number in the environment, got 'two'"),
        ({"WORLD_SIZE": "0"}, "RANK: 0 is not below WORLD_SIZE 0"),
    ],
)
def test_contradictory_variables(variables: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Environment.detect(variables)


@pytest.mark.parametrize(
    ("keys", "env", "dtype", "reason"),
    [
        ({}, CPU, torch.bfloat16, "bf16: auto, native for the test"),
        ({}, OLD_CPU, torch.float32, "does not compute bf16"),
        ({}, OLD_CUDA, torch.float32, "does not compute bf16"),
        ({"bf16": False}, CUDA, torch.float32, "bf16: false"),
        ({"bf16": True}, CUDA, torch.bfloat16, "bf16: true"),
        ({"bf16": True}, OLD_CPU, torch.bfloat16, "slower than fp32"),
        ({"fp16": True}, CUDA, torch.float16, "fp16: true"),
        ({"fp16": True, "bf16": False}, OLD_CUDA, torch.float16, "fp16: true"),
        ({"bfloat16": True}, CPU, torch.bfloat16, "bfloat16: true, updates by stochastic rounding"),
        ({"bfloat16": True, "bf16_update": "fp32_master"}, CUDA, torch.bfloat16, "updates by fp32 master"),
        ({"bfloat16": True}, OLD_CPU, torch.bfloat16, "slower than fp32"),
    ],
)
def test_precision(keys: dict[str, Any], env: Environment, dtype: torch.dtype, reason: str) -> None:
    precision = resolve_precision(TrainingConfig(**keys), env)
    assert precision.compute_dtype == dtype
    assert reason in precision.reason
    assert precision.pure == ("bfloat16" in keys)
    assert precision.autocast == (dtype != torch.float32 and not precision.pure)
    assert precision.autocast_dtype == (dtype if precision.autocast else torch.float32)


@pytest.mark.parametrize(
    ("keys", "env", "message"),
    [
        ({"fp16": True, "bf16": True}, CUDA, "fp16: `bf16: true` is set too"),
        ({"fp16": True}, CPU, "fp16: needs CUDA, but the device is cpu"),
        ({"tf32": True}, CPU, "tf32: not used because the device is cpu"),
        ({"bf16": True}, OLD_CUDA, "bf16: the GPU does not compute bf16 natively; set `bf16: false`"),
        ({"bfloat16": True}, OLD_CUDA, "bfloat16: the GPU does not compute bf16 natively; remove it"),
    ],
)
def test_refused_precision(keys: dict[str, Any], env: Environment, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_precision(TrainingConfig(**keys), env)


def test_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    # PyPI's own wheel of torch leaves its build out of its metadata.
    installed = metadata.version
    monkeypatch.setattr(metadata, "version", lambda package: installed(package).partition("+")[0])
    found = versions()
    assert found["torch"] == torch.__version__
    assert found["python"].startswith("3.")
    assert "eft-trainer" in found
