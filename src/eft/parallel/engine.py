"""From degrees to what accelerate is told: DDP as it is, FSDP2 and HSDP by a plugin, meshes by a ParallelismConfig."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate import ParallelismConfig
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.optim import Optimizer
from transformers.distributed import DistributedConfig

from eft.config.parallel import ParallelConfig
from eft.core.errors import ConfigError, ModelError
from eft.parallel.plan import Degrees

TENSOR_PARALLEL_FAMILIES = ("gemma2", "llama", "mistral", "phi3", "qwen2")
"""Model types whose training under tensor parallelism is that of one process, as shown by test."""


def accelerator_arguments(cfg: ParallelConfig, degrees: Degrees) -> dict[str, Any]:
    """Arguments of `accelerate.Accelerator` beside those that Trainer gives."""
    arguments: dict[str, Any] = {}
    if degrees.sharded:
        arguments["fsdp_plugin"] = _fsdp_plugin(cfg)
    if degrees.tp > 1 or (degrees.sharded and degrees.dp_replicate > 1):
        # accelerate never hears of our context parallelism: its processes shard the weights like any others.
        arguments["parallelism_config"] = ParallelismConfig(
            dp_replicate_size=degrees.dp_replicate, dp_shard_size=degrees.dp_shard * degrees.cp, tp_size=degrees.tp
        )
    return arguments


def load_time_sharding(degrees: Degrees) -> DistributedConfig | None:
    """How the model is split while it is loaded (tensor parallelism); None: afterwards or not."""
    if degrees.tp == 1:
        return None
    return DistributedConfig(tp_size=degrees.tp)


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
        # Every process reads the same files through the page cache; what it does not keep, it frees layer by layer.
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
    if degrees.sharded and distributed_type != DistributedType.FSDP:
        raise ConfigError(
            f"fsdp_version: accelerate shards on accelerators only; on {device_type} it would train plain DDP instead. "
            "Remove `fsdp_version`, `fsdp_config` and `dp_shard_size` to train with DDP."
        )


def check_device(degrees: Degrees, device_type: str) -> None:
    """Raise ConfigError, before a model is loaded, for tensor parallelism where accelerate refuses it."""
    if degrees.tp > 1 and device_type == "cpu":
        raise ConfigError("tensor_parallel_size: accelerate has meshes on accelerators only; remove it on a CPU.")


def check_family(degrees: Degrees, model_type: str) -> None:
    """Raise ModelError for tensor parallelism of a family for which it is not shown to be right.

    transformers 5.23 leaves weights that every process holds whole, but applies to its own heads or experts only (the
    norms of queries and keys, say), with the gradient of that part: the copies drift apart without a word.
    """
    if degrees.tp > 1 and model_type not in TENSOR_PARALLEL_FAMILIES:
        raise ModelError(
            f"tensor_parallel_size: not offered for {model_type}: some gradients would be those of one process's "
            f"heads. Shown to be right for {', '.join(TENSOR_PARALLEL_FAMILIES)}; use `fsdp_version: 2` instead."
        )
