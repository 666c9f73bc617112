"""The machine and the process: device, rank, native precision, versions."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata

import torch

from eft.config.training import TrainingConfig
from eft.core.errors import ConfigError

_PACKAGES = (
    "eft-trainer",
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "datasets",
    "safetensors",
    "pyarrow",
    "numpy",
    "numba",
    "schedulefree",
    "pytorch-optimizer",
    "flash-attn",
)
_FIRST_TF32 = (8, 0)
"""Compute capability."""
_CPU_BF16 = ("avx512_bf16", "amx_bf16", "bf16")
"""Names in `torch.cpu.get_capabilities()` of instructions that multiply bf16 (x86, x86, ARM)."""


@dataclass(frozen=True)
class Environment:
    """Where this process runs."""

    device: torch.device
    device_name: str
    rank: int
    local_rank: int
    world_size: int
    bf16_native: bool
    bf16_reason: str
    """Why bf16 is or is not native, for the start print."""
    local_world_size: int = 1
    """Processes of the run on this machine."""

    @classmethod
    def detect(cls, environ: Mapping[str, str] | None = None) -> Environment:
        """Look at torch and at torchrun's variables (RANK, LOCAL_RANK, WORLD_SIZE; one process without them).

        Raises:
            ConfigError: the variables contradict each other or the machine.
        """
        variables = os.environ if environ is None else environ
        rank, local_rank = _number(variables, "RANK", 0), _number(variables, "LOCAL_RANK", 0)
        world_size = _number(variables, "WORLD_SIZE", 1)
        if not 0 <= rank < world_size:
            raise ConfigError(f"RANK: {rank} is not below WORLD_SIZE {world_size}; start with torchrun or eft train.")
        device = _device(local_rank)
        native, reason = _native_bf16(device)
        here = _number(variables, "LOCAL_WORLD_SIZE", world_size)
        return cls(device, _device_name(device), rank, local_rank, world_size, native, reason, here)


@dataclass(frozen=True)
class Precision:
    """What the run computes in (D10)."""

    compute_dtype: torch.dtype
    reason: str
    pure: bool = False
    """The weights are in the compute dtype too; otherwise trainable weights are fp32."""

    @property
    def autocast(self) -> bool:
        """Whether the forward pass runs under autocast."""
        return self.autocast_dtype != torch.float32

    @property
    def autocast_dtype(self) -> torch.dtype:
        """The dtype of autocast; fp32 means none."""
        return torch.float32 if self.pure else self.compute_dtype


def resolve_precision(cfg: TrainingConfig, env: Environment) -> Precision:
    """The compute dtype by `bf16`, `fp16` and the machine. `bf16: auto` never becomes fp16 by itself.

    Raises:
        ConfigError: both are switched on, fp16 or tf32 without CUDA, or bf16 or tf32 on a GPU without it.
    """
    if cfg.tf32:
        _check_tf32(env.device)
    if cfg.bfloat16:
        return _pure_bf16(cfg, env)
    if cfg.fp16:
        if cfg.bf16 is True:
            raise ConfigError("fp16: `bf16: true` is set too; keep one of the two.")
        if env.device.type != "cuda":
            raise ConfigError(f"fp16: needs CUDA, but the device is {env.device.type}; use `bf16: auto`.")
        return Precision(torch.float16, "fp16: true")
    if cfg.bf16 is False:
        return Precision(torch.float32, "bf16: false")
    if cfg.bf16 == "auto":
        dtype = torch.bfloat16 if env.bf16_native else torch.float32
        return Precision(dtype, f"bf16: auto, {env.bf16_reason}")
    if env.bf16_native:
        return Precision(torch.bfloat16, "bf16: true")
    if env.device.type == "cuda":
        raise ConfigError(f"bf16: {env.bf16_reason}; set `bf16: false`, or `fp16: true`.")
    return Precision(torch.bfloat16, f"bf16: true, though {env.bf16_reason}: correct, but slower than fp32")


def _check_tf32(device: torch.device) -> None:
    if device.type != "cuda":
        raise ConfigError(
            f"tf32: not used because the device is {device.type}, and TensorFloat-32 is CUDA's; remove it."
        )
    if torch.cuda.get_device_capability(device) < _FIRST_TF32:
        raise ConfigError(f"tf32: {_device_name(device)} has no TensorFloat-32 (Ampere and later have); remove it.")


def _pure_bf16(cfg: TrainingConfig, env: Environment) -> Precision:
    if not env.bf16_native and env.device.type == "cuda":
        raise ConfigError(f"bfloat16: {env.bf16_reason}; remove it.")
    slow = "" if env.bf16_native else f", though {env.bf16_reason}: correct, but slower than fp32"
    return Precision(torch.bfloat16, f"bfloat16: true, updates by {cfg.bf16_update.replace('_', ' ')}{slow}", pure=True)


def versions() -> dict[str, str]:
    """Python, platform and the installed versions of what a run depends on."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    # The build too (`+cpu`, `+cu130`), which the metadata of PyPI's own wheel does not tell.
    found["torch"] = str(torch.__version__)
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
    return found


def _number(variables: Mapping[str, str], name: str, default: int) -> int:
    text = variables.get(name, "")
    if text and not text.isdecimal():
        raise ConfigError(f"{name}: expected a whole number in the environment, got {text!r}.")
    return int(text) if text else default


def _device(local_rank: int) -> torch.device:
    kind = torch.accelerator.current_accelerator(check_available=True)
    if kind is None:
        return torch.device("cpu")
    count = torch.accelerator.device_count()
    if local_rank >= count:
        raise ConfigError(f"LOCAL_RANK: {local_rank}, but this machine has {count} {kind.type} devices.")
    return torch.device(kind.type, local_rank)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return str(torch.cpu.get_capabilities().get("cpu_name") or platform.processor() or "CPU")
    return device.type


def _native_bf16(device: torch.device) -> tuple[bool, str]:
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return native, f"the GPU {'computes' if native else 'does not compute'} bf16 natively"
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        found = [name for name in _CPU_BF16 if capabilities.get(name)]
        if found:
            return True, f"the CPU computes bf16 natively ({found[0]})"
        return False, "the CPU does not compute bf16 natively"
    return False, f"bf16 is not known to be native on {device.type}"
