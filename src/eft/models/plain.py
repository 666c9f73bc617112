"""A second, plain instance of a live model: what transformers itself would build from the same weights.

The live model may carry our attention, wrapped forwards, hooks and parameters of mixed dtype. Its plain instance has
none of these. It is what gets saved, and what a saved model is compared with.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import cast

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, TrainableTokensWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from eft.core.errors import ModelError
from eft.core.hashing import hash_bytes
from eft.models.quantised import plain_weight, quantised_layers
from eft.models.seeding import seeded_rng

State = dict[str, Tensor]


def base_model_of(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The transformers model inside, without the adapter's wrapper object (its layers may still be adapted)."""
    return cast("PreTrainedModel", model.get_base_model()) if isinstance(model, PeftModel) else model


def base_state(model: PreTrainedModel | PeftModel) -> State:
    """The base model's own state under its own names, on the CPU, without anything an adapter added. Not copied.

    Quantised layers give the weights that they stand for.
    """
    base = base_model_of(model)
    live = base.state_dict()
    for layer, module in quantised_layers(base).items():
        # Packed, with its scales beside it under further names.
        packed = [name for name in live if name.startswith(f"{layer}.") and name != f"{layer}.bias"]
        for name in packed:
            del live[name]
        live[f"{layer}.weight"] = plain_weight(module, base.config.dtype)
    renamed = unwrapped_names(base, list(live))
    return _on_cpu({plain: live[name] for name, plain in renamed.items()})


def id_of(tensor: Tensor) -> tuple[int, tuple[int, ...]]:
    """Memory and shape: equal for the two names of one tied tensor."""
    return tensor.data_ptr(), tuple(tensor.shape)


def _on_cpu(state: Mapping[str, Tensor]) -> State:
    """The same tensors on the CPU; names that share memory share it there too."""
    moved: dict[tuple[int, tuple[int, ...]], Tensor] = {}
    return {name: moved.setdefault(id_of(tensor), tensor.detach().cpu()) for name, tensor in state.items()}


def unwrapped_names(base: nn.Module, names: list[str]) -> dict[str, str]:
    """Live name → plain name, for those of `names` that belong to the base model and not to an adapter."""
    inner: dict[str, str] = {}
    for prefix, module in base.named_modules():
        if isinstance(module, BaseTunerLayer):
            inner[f"{prefix}."] = "base_layer."
        elif isinstance(module, TrainableTokensWrapper):
            inner[f"{prefix}."] = "token_adapter."
        elif isinstance(module, AuxiliaryTrainingWrapper):
            inner[f"{prefix}."] = "original_module."
    result: dict[str, str] = {}
    for name in names:
        # Wrappers nest: several adapted parameters of one module have one each.
        wrappers = [prefix for prefix in inner if name.startswith(prefix)]
        if all(name.startswith(prefix + inner[prefix]) for prefix in wrappers):
            plain = name
            for prefix in sorted(wrappers, key=len, reverse=True):
                plain = prefix + plain.removeprefix(prefix + inner[prefix])
            result[name] = plain
    return result


def adapter_name_of(model: PeftModel) -> str:
    """The one active adapter. Raises ModelError when there are several."""
    names = list(model.peft_config)
    if len(names) != 1:
        raise ModelError(f"the model has {len(names)} adapters ({', '.join(names)}); eft saves exactly one")
    return str(names[0])


def adapter_state(model: PeftModel, *, with_embeddings: bool) -> State:
    """The adapter's tensors under the names of `adapter_model.safetensors`, on the CPU. Not copied.

    `with_embeddings`: also the embedding and head, for a base whose vocabulary was resized in memory.
    """
    return _on_cpu(live_adapter_state(model, with_embeddings=with_embeddings))


def live_adapter_state(model: PeftModel, *, with_embeddings: bool) -> State:
    """`adapter_state` where the tensors are, sharing memory with the parameters."""
    name = adapter_name_of(model)
    return dict(get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=with_embeddings))


def cast_floats(state: Mapping[str, Tensor], dtype: torch.dtype) -> State:
    """Floating-point tensors in `dtype`, others as they are."""
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}


def plain_base(model: PreTrainedModel | PeftModel, dtype: torch.dtype) -> PreTrainedModel:
    """A plain instance of the base model on the CPU with the live weights in `dtype`, in evaluation mode.

    transformers builds it from the config and a state dict, as it would from files. Tensors that already are in `dtype`
    on the CPU are shared with the live model, so do not change them. Modules that the family keeps in fp32 stay so.
    """
    base = base_model_of(model)
    # Through a dict, as if saved and loaded: leaves behind the attention name and whatever else lives only in memory.
    values = base.config.to_dict()
    values.pop("quantization_config", None)
    config = type(base.config).from_dict(values)
    with seeded_rng(0):
        plain, info = type(base).from_pretrained(
            None, config=config, state_dict=base_state(model), dtype=dtype, output_loading_info=True
        )
    missing, unexpected = info["missing_keys"], info["unexpected_keys"]
    if missing or unexpected:
        raise ModelError(f"the live model is no plain {type(base).__name__}: {sorted([*missing, *unexpected])[:4]}")
    plain.generation_config = copy.deepcopy(base.generation_config)
    plain.name_or_path = plain.config.name_or_path = base.config.name_or_path
    _copy_unsaved_buffers(base, plain)
    return cast("PreTrainedModel", plain)


def _copy_unsaved_buffers(base: nn.Module, plain: nn.Module) -> None:
    """Give `plain` the live buffers that no file holds (RoPE frequencies), so that a live one gone wrong shows up."""
    saved = base.state_dict().keys()
    names = unwrapped_names(base, [name for name, _ in base.named_buffers() if name not in saved])
    for live_name, name in names.items():
        target, live = plain.get_buffer(name), base.get_buffer(live_name)
        if target.shape == live.shape:
            with torch.no_grad():
                target.copy_(live)


def plain_instance(
    model: PreTrainedModel | PeftModel, dtype: torch.dtype, *, adapter_dtype: torch.dtype | None = None
) -> PreTrainedModel | PeftModel:
    """`plain_base`, with the adapter on top when `model` has one: its tensors rounded to `adapter_dtype`, held in fp32.

    That is how peft holds an adapter it has loaded from files of that dtype.
    """
    plain = plain_base(model, dtype)
    if not isinstance(model, PeftModel):
        return plain
    name = adapter_name_of(model)
    with seeded_rng(0):
        wrapped = get_peft_model(plain, copy.deepcopy(model.peft_config[name]), adapter_name=name)
    state = cast_floats(adapter_state(model, with_embeddings=False), adapter_dtype or dtype)
    set_peft_model_state_dict(wrapped, state, adapter_name=name)
    return cast("PeftModel", wrapped.eval())


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's shape and values, floating ones as fp32, which holds those of every shorter dtype."""
    plain = (tensor.float() if tensor.is_floating_point() else tensor).detach().cpu().contiguous()
    return hash_bytes(repr(tuple(plain.shape)).encode(), plain.reshape(-1).view(torch.uint8).numpy().tobytes())


@torch.no_grad()
def probe_logits(model: nn.Module, ids: list[int]) -> Tensor:
    """Logits [tokens, vocabulary] of one document on the CPU, in evaluation mode, without autocast or cache.

    Every parameter is first copied to memory of its own: some kernels give other last bits at other alignments, and
    weights that were mapped from a file are aligned as the file has them.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    model.eval()
    with torch.autocast("cpu", enabled=False):
        output = model(input_ids=torch.tensor([ids]), use_cache=False)
    return cast("Tensor", output.logits[0])
