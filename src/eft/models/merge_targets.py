"""What an adapter does to the parameters of its base, one at a time, through peft's own `merge`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from eft.core.errors import ModelError
from eft.models.empty_base import is_empty
from eft.models.plain import adapter_name_of, base_model_of, unwrapped_names
from eft.models.shards import Shards


@dataclass(frozen=True)
class Target:
    """One parameter of the base that the adapter changes."""

    name: str
    """In the plain model; in its files a parameter may have another name, or be several tensors."""
    shape: torch.Size
    layer: BaseTunerLayer | None
    """The adapter's layer over it; None: `value` takes the parameter's place."""
    value: Tensor | None = None

    def merged(self, weight: Tensor) -> Tensor:
        """The parameter with the adapter in it, fp32, from the base's `weight`, fp32 and of this shape."""
        if self.layer is None:
            assert self.value is not None
            return self.value.float()
        name = self.name.rpartition(".")[2]
        base: nn.Module = self.layer.get_base_layer()
        empty = base.get_parameter(name)
        base.register_parameter(name, nn.Parameter(weight.clone(), requires_grad=False))
        try:
            self.layer.merge(safe_merge=True)
            return base.get_parameter(name).detach()
        except ValueError as error:
            raise ModelError(f"{self.name}: {error}") from error
        finally:
            self.layer.merged_adapters.clear()
            base.register_parameter(name, empty)


def find_targets(model: PeftModel) -> dict[str, Target]:
    """Plain name → target, for every parameter of an empty base (see `empty_base`) that its adapter changes.

    Raises ModelError for what no plain model can hold.
    """
    adapter, base = adapter_name_of(model), base_model_of(model)
    found: list[Target] = []
    plain_names = unwrapped_names(base, [name for name, _ in base.named_parameters(remove_duplicate=False)])
    for live, plain in plain_names.items():
        parameter = base.get_parameter(live)
        if not is_empty(parameter):  # such as an embedding that was resized in memory and came along with the adapter
            found.append(Target(plain, parameter.shape, None, parameter.detach()))
    for path, module in base.named_modules():
        plain = ".".join(part for part in path.split(".") if part not in ("base_layer", "token_adapter"))
        if isinstance(module, ModulesToSaveWrapper):
            whole = module.modules_to_save[adapter].named_parameters()
            found += [Target(f"{plain}.{name}", value.shape, None, value.detach()) for name, value in whole]
        elif isinstance(module, BaseTunerLayer):
            if any(getattr(module, "lora_bias", {}).values()):
                raise ModelError(f"{plain}: its adapter has a bias of its own, which a merge would lose")
            name = module.parameter_name if isinstance(module, ParamWrapper) else "weight"
            shape = module.get_base_layer().get_parameter(name).shape
            found.append(Target(f"{plain}.{name}", shape, module))
    return {target.name: target for target in found}


@dataclass
class MergePlan:
    """Which tensors of the base's files change, and how."""

    shards: Shards
    targets: dict[str, Target]
    """By the name of the tensor in the files."""
    model: PreTrainedModel
    """Empty and plain; knows how its parameters lie in files."""
    _parts: tuple[str, dict[str, Tensor]] = ("", {})

    def merged(self, name: str, stored: Tensor) -> Tensor:
        """The tensor `name` of the files, fp32, with the adapter in it; `stored` is what they hold."""
        target = self.targets[name]
        if self._lies_as_it_is(name, target):
            return target.merged(with_rows(stored.float(), target.shape))
        # Several parts, or another layout (fused experts). Both are rearrangements, so a LoRA change goes through them
        # as the weights do; what replaces the weights likewise.
        if self._parts[0] != target.name:
            change = target.merged(torch.zeros(target.shape))
            self._parts = target.name, dict(revert_weight_conversion(self.model, {target.name: change}))
        part = self._parts[1][name]
        return part if target.layer is None else stored.float() + part

    def shape(self, name: str, stored: torch.Size) -> torch.Size:
        """Of the merged tensor, where the files hold one of shape `stored`."""
        return file_shapes(self.model, self.targets[name])[name] if name in self.targets else stored

    def _lies_as_it_is(self, name: str, target: Target) -> bool:
        return file_shapes(self.model, target) == {name: target.shape}


def plan_merge(adapted: PeftModel, plain: PreTrainedModel, shards: Shards) -> MergePlan | None:
    """Where the parameters that `adapted` changes lie in the files; None where they have other names there.

    Raises ModelError for an adapter over one of two tied weights.
    """
    aliases = aliases_of(plain)
    targets: dict[str, Target] = {}
    for name, target in find_targets(adapted).items():
        others = aliases.get(name, set()) - {name}
        if others and target.layer is not None and not isinstance(target.layer, TrainableTokensLayer):
            raise ModelError(
                f"{name} is tied to {', '.join(sorted(others))}, and the adapter changes one of the two only: no plain "
                "model can hold both"
            )
        parts = file_shapes(plain, target)
        missing = [part for part in parts if part not in shards.file_of]
        if missing and any(other in shards.file_of for other in others):
            continue  # a tied weight lies in the files once
        if missing:
            return None
        targets |= dict.fromkeys(parts, target)
    return MergePlan(shards, targets, plain)


def file_shapes(model: PreTrainedModel, target: Target) -> dict[str, torch.Size]:
    """Names and shapes of the tensors in the files that a parameter becomes."""
    parts = revert_weight_conversion(model, {target.name: torch.empty(target.shape, device="meta")})
    return {name: part.shape for name, part in parts.items()}


def aliases_of(model: nn.Module) -> dict[str, set[str]]:
    """Name → all names of the same parameter."""
    names: dict[int, set[str]] = {}
    parameters = list(model.named_parameters(remove_duplicate=False))
    for name, parameter in parameters:
        names.setdefault(id(parameter), set()).add(name)
    return {name: names[id(parameter)] for name, parameter in parameters}


def with_rows(weight: Tensor, shape: torch.Size) -> Tensor:
    """Zeros below, where the adapter's embedding has rows that the files lack."""
    missing = shape[0] - weight.shape[0]
    return nn.functional.pad(weight, (0, 0, 0, missing)) if missing > 0 else weight[: shape[0]]
