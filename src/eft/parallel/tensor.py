"""Tensor parallelism by transformers' plan of a family: which plans train exactly, and what the gradients still need.

A plan gives modules and weights a style by name (`layers.*.self_attn.q_proj: colwise`). What no style names lies whole
on every process, and its gradient is whole there too, unless it is applied to a part of the heads only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES
from transformers.distributed.tensor_parallel import TensorParallelLayer

from eft.core.errors import ConfigError, ModelError

PARTIAL_STYLE = "replicated_with_grad_allreduce"
"""Upstream's style of weights that lie whole on every process, but see its own heads only."""
SUMMED_STYLE = "eft_summed_gradient"
EXACT_STYLES = frozenset(
    {
        "colwise",
        "colwise_gather_output",
        "rowwise",
        "rowwise_split_input",
        "embedding_rowwise",
        "moe_tp_experts",
        "packed_colwise",
        "packed_rowwise",
        SUMMED_STYLE,
    }
)
"""Styles whose gradients are shown to be those of one process (tests/distributed/test_equality.py)."""
_HEADS = ("q_proj", "k_proj", "qkv_proj", "query_key_value")


class SummedGradient(TensorParallelLayer):  # type: ignore[misc]  # transformers is untyped
    """The gradient of a whole weight that is applied to a part of the heads: the sum over the processes.

    Upstream's style sums what has been accumulated so far, so from the second micro-batch of a step on it sums sums.
    Here the gradient of one backward pass is summed, before it is added.
    """

    def install_forward(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        """Hook the weights when they are first used: until they are loaded, others stand in for them."""
        hooked: dict[str, nn.Parameter] = {}

        def attach(module: nn.Module, arguments: object) -> None:
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.requires_grad and hooked.get(name) is not parameter:
                    _hook(parameter, _sum_over(mesh.get_group()))
                    hooked[name] = parameter

        module.register_forward_pre_hook(attach)
        return module


def _hook(parameter: nn.Parameter, change: Callable[[Tensor], Tensor]) -> None:
    """Let the gradient of each backward pass be `change`d before it is accumulated."""
    parameter.register_hook(change)


def _sum_over(group: dist.ProcessGroup, divisor: int = 1) -> Callable[[Tensor], Tensor]:
    """A hook that gives the sum of all processes' gradients, divided by `divisor`."""

    def total(gradient: Tensor) -> Tensor:
        # A hook must leave its argument as it is.
        whole = gradient.clone()
        dist.all_reduce(whole.to_local() if isinstance(whole, DTensor) else whole, group=group)
        return whole.div_(divisor) if divisor > 1 else whole

    return total


ALL_PARALLEL_STYLES.register(SUMMED_STYLE, SummedGradient())


def exact_plan(plan: Mapping[str, str], model_type: str) -> dict[str, str]:
    """What to change in a family's tensor-parallel plan, by name, so that all gradients are whole.

    Raises:
        ModelError: the family has no plan, or one with a style that is not shown to be exact.
    """
    if not plan:
        raise ModelError(
            f"tensor_parallel_size: transformers has no plan for {model_type}; use `fsdp_version: 2` instead."
        )
    changes = {name: SUMMED_STYLE for name, style in plan.items() if style == PARTIAL_STYLE}
    unknown = {name: style for name, style in {**plan, **changes}.items() if style not in EXACT_STYLES}
    if unknown:
        name, style = next(iter(unknown.items()))
        raise ModelError(
            f"tensor_parallel_size: not offered for {model_type}: its plan splits {name} as `{style}`, which is not "
            "shown to train as one process does; use `fsdp_version: 2` instead."
        )
    return changes


def check_heads(model: PreTrainedModel, tp: int) -> None:
    """Raise ConfigError where `tp` processes cannot have whole heads each."""
    if not any(style == "colwise" and name.endswith(_HEADS) for name, style in model.tp_plan.items()):
        return
    shape = model.config.get_text_config()
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(shape, name, None)
        if heads is not None and heads % tp:
            fitting = ", ".join(str(size) for size in range(1, heads + 1) if heads % size == 0)
            raise ConfigError(
                f"tensor_parallel_size: {tp} does not divide {name} {heads} of this {shape.model_type}; use one of "
                f"{fitting}."
            )


def average_split_adapters(model: nn.Module) -> None:
    """Average the gradients of tensors that were split by heads, but not over the data-parallel processes.

    So are adapters of layers that were sharded while they were loaded. Those that lie whole are averaged by Trainer.
    """
    groups = _data_groups(model)
    for parameter in model.parameters():
        if groups and parameter.requires_grad and isinstance(parameter, DTensor) and not _is_shared(parameter):
            for group in groups:
                _hook(parameter, _sum_over(group, dist.get_world_size(group)))


def _is_shared(parameter: DTensor) -> bool:
    return "fsdp" in (parameter.device_mesh.mesh_dim_names or ())


def _data_groups(model: nn.Module) -> list[dist.ProcessGroup]:
    """The groups over which FSDP2 averages, of each dimension of its mesh that has more than one process."""
    meshes: Iterator[DeviceMesh] = (
        parameter.device_mesh
        for parameter in model.parameters()
        if isinstance(parameter, DTensor) and _is_shared(parameter)
    )
    mesh = next(meshes, None)
    names = [] if mesh is None else [name for name in mesh.mesh_dim_names or () if name != "tp"]
    return [mesh.get_group(name) for name in names if mesh is not None and mesh[name].size() > 1]
