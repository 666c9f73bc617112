"""ZeRO by DeepSpeed, through the integration that transformers and accelerate have: what it is told, and where it runs.

Rajbhandari et al. 2020, arXiv:1910.02054. DeepSpeed owns backward, clipping and update; batches, loss and schedule are
eft's. Weights and gradients are fp32, as everywhere in eft: `bf16: true` is autocast here, too.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from eft.config.deepspeed import OWNED, deepspeed_options
from eft.config.root import TrainConfig
from eft.core.errors import ConfigError
from eft.parallel.plan import BatchPlan, Degrees

_AUTO = "auto"
_SWITCH = "ACCELERATE_USE_DEEPSPEED"
_ADAM = ("adamw_torch", "adamw_torch_fused")


def check_deepspeed(degrees: Degrees) -> None:
    """Raise ConfigError where the package of DeepSpeed is needed and missing."""
    if degrees.zero > 0 and find_spec("deepspeed") is None:
        raise ConfigError("deepspeed: needs the package deepspeed; pip install 'eft-trainer[deepspeed]'.")


def deepspeed_arguments(
    config: TrainConfig, degrees: Degrees, batch: BatchPlan, autocast: torch.dtype
) -> dict[str, Any] | None:
    """DeepSpeed's configuration of this run, for `TrainingArguments.deepspeed`; None without ZeRO.

    Args:
        autocast: its dtype; fp32 means none.

    Raises:
        ConfigError: an option says something else than the YAML; the message names both.
    """
    if degrees.zero == 0:
        return None
    assert config.deepspeed is not None
    options = deepspeed_options(config.deepspeed)
    _check_agreement(options, config, batch, autocast)
    precision: dict[str, Any] = {"enabled": False}
    if autocast != torch.float32:
        # No module is listed whose gradients may travel in that dtype: they are averaged in fp32.
        name = str(autocast).removeprefix("torch.")
        precision = {"enabled": True, "dtype": name, "lower_precision_safe_modules": []}
    ours = {
        "train_micro_batch_size_per_gpu": _AUTO,
        "gradient_accumulation_steps": _AUTO,
        "gradient_clipping": _AUTO,
        "bf16": {"enabled": False},
        "fp16": {"enabled": False},
        "torch_autocast": precision,
        # Of the table's optimizers, those that `config.deepspeed.OPTIMIZERS` lists are right on flat parts.
        "zero_allow_untested_optimizer": True,
    }
    return {name: value for name, value in options.items() if name not in OWNED} | ours


def _check_agreement(options: Mapping[str, Any], config: TrainConfig, batch: BatchPlan, autocast: torch.dtype) -> None:
    decided = {
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": batch.accumulation,
        "train_batch_size": batch.global_batch_size,
        "gradient_clipping": config.max_grad_norm,
    }
    for name, value in decided.items():
        _require_equal(name, options.get(name, _AUTO), OWNED[name], value)
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        section = options.get(name, _AUTO)
        given = section.get("enabled", _AUTO) if isinstance(section, Mapping) else section
        _require_equal(f"{name}.enabled", given, name, autocast == dtype)
    if options.get("scheduler", _AUTO) != _AUTO:
        raise ConfigError(
            f"deepspeed: `scheduler` beside `lr_scheduler: {config.lr_scheduler}`: the YAML's is a closed form "
            "of the exact number of steps; remove `scheduler` from DeepSpeed's options."
        )
    _check_optimizer(options.get("optimizer", _AUTO), config)


def _check_optimizer(section: Any, config: TrainConfig) -> None:
    """DeepSpeed's AdamW with the YAML's numbers is the YAML's; it is the YAML's that runs."""
    if section == _AUTO:
        return
    kind = section.get("type") if isinstance(section, Mapping) else section
    if kind not in ("Adam", "AdamW") or config.optimizer not in _ADAM:
        raise ConfigError(
            f"deepspeed: `optimizer.type: {kind}` beside `optimizer: {config.optimizer}`: the YAML decides; remove "
            "`optimizer` from DeepSpeed's options."
        )
    decided = {
        "lr": ("learning_rate", config.learning_rate),
        "betas": ("adam_beta1` and `adam_beta2", [config.adam_beta1, config.adam_beta2]),
        "eps": ("adam_epsilon", config.adam_epsilon),
        "weight_decay": ("weight_decay", config.weight_decay),
        "torch_adam": ("optimizer", True),
        "adam_w_mode": ("optimizer", True),
    }
    for name, given in section.get("params", {}).items():
        if name not in decided:
            raise ConfigError(f"deepspeed: `optimizer.params.{name}` is not offered; use `optim_args`.")
        _require_equal(f"optimizer.params.{name}", given, *decided[name])


def _require_equal(name: str, given: Any, key: str, value: Any) -> None:
    if given not in (_AUTO, value):
        raise ConfigError(
            f"deepspeed: `{name}: {given}` in DeepSpeed's options, but `{key}` is {value} in this run; write `auto` "
            "there, or the same."
        )


@contextmanager
def deepspeed_environment(degrees: Degrees, device: torch.device) -> Iterator[None]:
    """Inside it a trainer under ZeRO is made; nothing of it is left in the process but what the trainer holds."""
    if degrees.zero == 0:
        yield
        return
    before = os.environ.get(_SWITCH)
    os.environ[_SWITCH] = "true"
    if device.type == "cpu":
        _leave_out_shared_memory()
        # Without a name for what connects them, accelerate would count one process.
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState(backend="gloo")
    try:
        yield
    finally:
        # accelerate leaves its switch on, too: whatever is trained next in this process would run under ZeRO, too.
        if before is None:
            os.environ.pop(_SWITCH, None)
        else:
            os.environ[_SWITCH] = before
        # And transformers remembers the options for every model that is loaded from here on.
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()


def _leave_out_shared_memory() -> None:
    """Give DeepSpeed a CPU without its kernel for collectives over shared memory: gloo has all that is needed.

    DeepSpeed 0.19 would compile that kernel at the start of every first run, for minutes, and a build that was killed
    leaves a lock that the next one waits for without end.
    """
    from deepspeed.accelerator import set_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    class PlainCpu(CPU_Accelerator):
        def create_op_builder(self, op_name: str) -> Any:
            return None if op_name == "ShareMemCommBuilder" else super().create_op_builder(op_name)

    set_accelerator(PlainCpu())


def check_zero(degrees: Degrees, distributed_type: DistributedType) -> None:
    """Raise ConfigError where accelerate runs something else than ZeRO."""
    if degrees.zero > 0 and distributed_type != DistributedType.DEEPSPEED:
        raise ConfigError(
            f"deepspeed: accelerate would run {distributed_type.value} instead; unset ACCELERATE_USE_CPU, or start "
            "with `eft train --launcher torchrun`."
        )
