"""From degrees to what accelerate and transformers are told.

DDP as it is, FSDP2 and HSDP by accelerate's plugin; whatever is split while it is loaded by a DistributedConfig.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate import ParallelismConfig
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.optim import Optimizer
from transformers import PreTrainedModel
from transformers.distributed import DistributedConfig

from eft.config.parallel import ParallelConfig
from eft.core.errors import ConfigError, ModelError
from eft.parallel.plan import Degrees
from eft.parallel.tensor import average_split_adapters, check_heads, exact_plan


def accelerator_arguments(cfg: ParallelConfig, degrees: Degrees) -> dict[str, Any]:
    """Arguments of `accelerate.Accelerator` beside those that Trainer gives."""
    # Of a model that was sharded while it was loaded, Trainer tells accelerate by itself.
    if not degrees.sharded or degrees.in_parts:
        return {}
    arguments: dict[str, Any] = {"fsdp_plugin": _fsdp_plugin(cfg)}
    if degrees.dp_replicate > 1:
        # accelerate never hears of our context parallelism: its processes shard the weights like any others.
        arguments["parallelism_config"] = ParallelismConfig(
            dp_replicate_size=degrees.dp_replicate, dp_shard_size=degrees.dp_shard * degrees.cp
        )
    return arguments


def load_time_sharding(cfg: ParallelConfig, degrees: Degrees, model: PreTrainedModel) -> DistributedConfig | None:
    """How a model is split while it is loaded, over one mesh of all processes; None: afterwards or not.

    Args:
        model: one of its kind, also without weights.

    Raises:
        ModelError: tensor parallelism of a family whose plan is not shown to train exactly.
        ConfigError: the processes do not divide its heads.
    """
    if not degrees.in_parts:
        return None
    changes = None
    if degrees.tp > 1:
        changes = exact_plan(model.tp_plan, model.config.get_text_config().model_type)
        check_heads(model, degrees.tp)
    return DistributedConfig(
        tp_size=degrees.tp,
        # To transformers no rules are not the same as no change.
        tp_plan=changes or None,
        fsdp_size=degrees.dp_shard * degrees.cp,
        dp_replicate_size=degrees.dp_replicate,
        fsdp_cpu_offload=bool((cfg.fsdp_config or {}).get("offload_params", False)),
    )


def complete_split(model: nn.Module, base: PreTrainedModel, cfg: ParallelConfig, degrees: Degrees) -> None:
    """What a model that was sharded while it was loaded still needs before it is trained.

    Args:
        model: with its adapter, if any.
        base: transformers' model inside.

    Raises:
        ModelError: it was not loaded so, or by a plan that does not train exactly.
    """
    if not degrees.in_parts:
        return
    if not base.is_distributed_loading_by_transformers:
        raise ModelError(
            f"tensor_parallel_size: {degrees.tp}, but the model that was given is whole; load it with "
            "`distributed_config=load_time_sharding(...)` (eft.parallel.engine)."
        )
    if degrees.tp > 1 and exact_plan(base.tp_plan, base.config.get_text_config().model_type):
        raise ModelError(
            "tensor_parallel_size: the model that was given was loaded by a plan that gives some weights a wrong "
            "gradient; load it with `distributed_config=load_time_sharding(...)` (eft.parallel.engine)."
        )
    average_split_adapters(model)
    if (cfg.fsdp_config or {}).get("reshard_after_forward") is False:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_reshard_after_forward(False, recurse=False)


def _fsdp_plugin(cfg: ParallelConfig) -> FullyShardedDataParallelPlugin:
    options = cfg.fsdp_config or {}
    layers = options.get("transformer_layer_cls_to_wrap")
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward=bool(options.get("reshard_after_forward", True)),
        cpu_offload=bool(options.get("offload_params", False)),
        auto_wrap_policy=str(options.get("auto_wrap_policy", "transformer_based_wrap")).lower(),
        transformer_cls_names_to_wrap=[layers] if isinstance(layers, str) else layers,
        min_num_params=options.get("min_num_params"),
        # Ours is `in_parts`. Here every process has loaded the whole model; what it does not keep, it frees.
        cpu_ram_efficient_loading=False,
        # Autocast decides about dtypes, as on one process; gradients are added up in fp32.
        mixed_precision_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32),
    )


def one_tensor_at_a_time(build: Callable[[nn.Module], Optimizer], model: nn.Module) -> Optimizer:
    """An optimizer of `model` that updates each tensor by itself.

    Under tensor parallelism matrices are DTensors and norms are not, and no kernel for many tensors takes both.
    """
    optimizer = build(model)
    for group in optimizer.param_groups:
        group.update({name: False for name in ("fused", "foreach") if name in group})
    return optimizer


def check_engine(degrees: Degrees, distributed_type: DistributedType, device_type: str) -> None:
    """Raise ConfigError where accelerate runs something else than what was asked for, which it does without a word."""
    if degrees.sharded and not degrees.in_parts and distributed_type != DistributedType.FSDP:
        raise ConfigError(
            f"fsdp_version: accelerate shards on accelerators only; on {device_type} it would train plain DDP instead. "
            "Remove `fsdp_version`, `fsdp_config` and `dp_shard_size` to train with DDP."
        )


def check_device(degrees: Degrees, device_type: str) -> None:
    """Raise ConfigError, before a model is loaded, for meshes where accelerate refuses them."""
    if degrees.in_parts and device_type == "cpu":
        key = "tensor_parallel_size" if degrees.tp > 1 else "fsdp_config: cpu_ram_efficient_loading"
        raise ConfigError(f"{key}: accelerate has meshes on accelerators only; remove it on a CPU.")
