"""LoRA on layers that were split while they were loaded.

peft 0.21 gives such a layer an adapter of the size of this process's part: drawn otherwise than on one process, alike
in every part, and of a wrong shape where FSDP2 shards beside the heads. So its matrices are made anew, whole and as on
one process, and split as their layer is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES

from eft.core.errors import ModelError


def remake_adapters(model: nn.Module) -> None:
    """Give every adapted layer of a model that was split at load new LoRA matrices; a model without any stays as it is.

    They are drawn from the global generator in the order in which peft draws on one process: seed it the same.

    Raises:
        ModelError: what is adapted is no linear layer.
    """
    if not isinstance(model, PeftModel):
        return
    for name, layer in _adapted(model):
        linear = layer.get_base_layer()
        if not isinstance(linear, nn.Linear):
            raise ModelError(
                f"lora_target_modules: {name} is a {type(linear).__name__}; beside `tensor_parallel_size` and "
                "`cpu_ram_efficient_loading` only linear layers are adapted."
            )
        style = model.get_base_model().tp_plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", name))
        for adapter, config in model.peft_config.items():
            _remake(layer, linear, adapter, config.init_lora_weights)
            split = {"colwise": layer.lora_B, "rowwise": layer.lora_A}.get(style if _by_heads(linear) else "")
            if split is not None:
                _split(split[adapter], str(style), linear)


def _adapted(model: PeftModel) -> Iterator[tuple[str, LoraLayer]]:
    return ((name, module) for name, module in model.get_base_model().named_modules() if isinstance(module, LoraLayer))


def _by_heads(linear: nn.Linear) -> bool:
    weight = linear.weight
    return isinstance(weight, DTensor) and "tp" in (weight.device_mesh.mesh_dim_names or ())


def _remake(layer: LoraLayer, linear: nn.Linear, adapter: str, init: bool | str) -> None:
    rank, old = layer.r[adapter], layer.lora_A[adapter].weight
    layer.lora_A[adapter] = nn.Linear(linear.in_features, rank, bias=False)
    layer.lora_B[adapter] = nn.Linear(rank, linear.out_features, bias=layer.lora_bias[adapter])
    layer.reset_lora_parameters(adapter, init)
    for made in (layer.lora_A[adapter], layer.lora_B[adapter]):
        made.to(device=old.device, dtype=old.dtype)


def _split(matrix: nn.Linear, style: str, linear: nn.Linear) -> None:
    weight = linear.weight
    assert isinstance(weight, DTensor)
    for name, _ in list(matrix.named_parameters(recurse=False)):
        ALL_PARALLEL_STYLES[style].shard_param(matrix, name, weight.device_mesh["tp"])
    ALL_PARALLEL_STYLES[style].install_forward(matrix, weight.device_mesh["tp"])
