"""LoRA factors that start from the weights themselves, over a base that stays as it is.

PiSSA (Meng et al. 2024, https://arxiv.org/abs/2404.02948) starts A, B at the principal components of W, OLoRA
(Büyükakyüz 2024, https://arxiv.org/abs/2406.01775) at the first rows of its QR decomposition, and both take the product
out of the base, W - s·B₀A₀, so that nothing has changed before the first step. The trained adapter then is wrong on the
base that it names. Here the same sum W - s·B₀A₀ + s·BA has the second term in the adapter: factors of twice the rank,
[A; A₀] and [B, -B₀], whose second half gets no gradient. That is what peft's `path_initial_model_for_weight_conversion`
makes of a trained PiSSA adapter, only from the first step on: what is saved is plain LoRA, on the base as it is.
"""

from __future__ import annotations

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import Tensor, nn

from eft.core.errors import ModelError


def starts_from_weights(start: bool | str | None) -> bool:
    """Whether a value of `peft_init_lora_weights` names such a start."""
    return isinstance(start, str) and (start == "olora" or start.startswith("pissa"))


@torch.no_grad()
def start_from_weights(model: PeftModel, start: str) -> None:
    """Set the factors of every LoRA layer of `model`, made with twice the rank; the model computes what its base does.

    `start`: `pissa`, `pissa_niter_<n>` (by a randomised SVD with n power iterations, torch's global generator) or
    `olora`. The second half of each factor is fixed: its gradient is zeroed as it arrives.

    Raises ModelError for a layer that is not linear.
    """
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        if isinstance(layer, ParamWrapper) or not layer.lora_A:
            raise ModelError(f"peft_init_lora_weights: {start} is for linear layers, and {name} is none; exclude it")
        weight = layer.get_base_layer().weight
        for adapter, first in layer.lora_A.items():
            second = layer.lora_B[adapter]
            rank = first.weight.shape[0] // 2
            matrix = (weight.T if layer.fan_in_fan_out else weight).float()
            if rank > min(matrix.shape):
                raise ModelError(f"peft_init_lora_weights: {name} has no {rank} components; lower `lora_r`")
            down, up = _factors(matrix, rank, layer.scaling[adapter], start)
            first.weight.copy_(torch.cat([down, down]))
            second.weight.copy_(torch.cat([up, -up], dim=1))
            _fix_second_half(first.weight, 0)
            _fix_second_half(second.weight, 1)


def _factors(weight: Tensor, rank: int, scaling: float, start: str) -> tuple[Tensor, Tensor]:
    """A [rank, in] and B [out, rank] of a weight [out, in]."""
    if start == "olora":
        q, r = torch.linalg.qr(weight)
        return r[:rank], q[:, :rank]
    if start == "pissa":
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        u, s, vh = u[:, :rank], s[:rank], vh[:rank]
    else:
        u, s, v = torch.svd_lowrank(weight, rank, niter=int(start.rpartition("_")[2]))
        vh = v.T
    root = (s / scaling).sqrt()
    return root[:, None] * vh, u * root


def _fix_second_half(factor: nn.Parameter, dim: int) -> None:
    half = factor.shape[dim] // 2

    def without_second(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        gradient.narrow(dim, half, half).zero_()
        return gradient

    factor.register_hook(without_second)
