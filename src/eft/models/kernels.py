"""Liger's kernels (norms, rotary positions, gated MLPs) as options, each proven equal on the model itself.

They come through transformers' own integration. Liger replaces norms and MLPs on the instance, but rotary positions in
the family's module, and the family's class names along with them: models of that family which are built later in the
same process get its kernels too. eft saves and compares in fresh processes, where they are not.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Protocol

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.liger import apply_liger_kernel

from eft.config.kernels import KernelConfig
from eft.core.errors import ConfigError, ModelError
from eft.core.records import PromiseResult
from eft.models.compile import without_compilation
from eft.models.plain import base_model_of

_PARTS = {"liger_rms_norm": ("rms_norm",), "liger_rope": ("rope",), "liger_glu_activation": ("swiglu", "geglu")}
"""Our key to what Liger calls it, which depends on the family's activation."""
_NEVER = ("cross_entropy", "fused_linear_cross_entropy", "layer_norm")
"""On by Liger's default in some families; the loss is eft's own."""
_PROBE_TOKENS = 24
_PROBE_SEED = 20_240_817
_DIFFERENCE_FP32 = 1e-5
_DIFFERENCE_EPS = 8
"""The same in half precision, in units of the format's spacing at 1."""


class Liger(Protocol):
    """What is asked of the package."""

    def offers(self, model_type: str) -> frozenset[str]:
        """Liger's names of the parts that it has for a family."""
        ...

    def apply(self, model: PreTrainedModel | PeftModel, parts: Mapping[str, bool]) -> None:
        """Switch parts on (True) or leave them alone (False)."""
        ...


class InstalledLiger:
    """The package itself, through transformers."""

    def offers(self, model_type: str) -> frozenset[str]:
        """See `Liger`."""
        # Imported on use: the package is for CUDA machines, and imports Triton.
        table = import_module("liger_kernel.transformers.monkey_patch").MODEL_TYPE_TO_APPLY_LIGER_FN
        return frozenset(inspect.signature(table[model_type]).parameters) if model_type in table else frozenset()

    def apply(self, model: PreTrainedModel | PeftModel, parts: Mapping[str, bool]) -> None:
        """See `Liger`."""
        apply_liger_kernel(model, dict(parts))


def wanted_kernels(cfg: KernelConfig) -> tuple[str, ...]:
    """The Liger keys that are on."""
    switches = {
        "liger_rms_norm": cfg.liger_rms_norm,
        "liger_rope": cfg.liger_rope,
        "liger_glu_activation": cfg.liger_glu_activation,
    }
    return tuple(name for name, is_on in switches.items() if is_on)


def check_liger(cfg: KernelConfig, device: torch.device) -> None:
    """Raise ConfigError where Liger's kernels are wanted and cannot run."""
    for key in wanted_kernels(cfg):
        if device.type != "cuda":
            raise ConfigError(
                f"{key}: Liger's kernels need CUDA, but the device is {device.type}; remove it, or fuse the same "
                "operations with `torch_compile: true`."
            )
        if find_spec("liger_kernel") is None:
            raise ConfigError(f"{key}: needs the package liger-kernel; pip install liger-kernel, or remove it.")


def use_liger(model: PreTrainedModel | PeftModel, cfg: KernelConfig, liger: Liger) -> list[PromiseResult]:
    """Switch the wanted kernels on, in place, one after the other, and compare a short row before and after each.

    Returns one result of promise E4 per kernel. The model must be on the device that it will run on.

    Raises:
        ModelError: Liger has no such kernel for this family, or the logits or gradients are not those from before.
    """
    model_type = str(base_model_of(model).config.model_type)
    offered = liger.offers(model_type) if wanted_kernels(cfg) else frozenset()
    results = []
    for key in wanted_kernels(cfg):
        names = offered.intersection(_PARTS[key])
        if not names:
            raise ModelError(f"{key}: Liger has no such kernel for {model_type}; remove it.")
        before = _probe(model)
        every = {name: False for group in _PARTS.values() for name in group} | dict.fromkeys(_NEVER, False)
        liger.apply(model, every | dict.fromkeys(names, True))
        results.append(_compared(key, model, before, _probe(model)))
    return results


def _compared(key: str, model: nn.Module, before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor]) -> PromiseResult:
    """Logits against the largest one, the gradients of all trained weights together against their norm."""
    dtype = next(model.parameters()).dtype
    limit = _DIFFERENCE_FP32 if dtype == torch.float32 else _DIFFERENCE_EPS * torch.finfo(dtype).eps
    logits = float((after[0] - before[0]).abs().max() / before[0].abs().max())
    gradients = float((after[1] - before[1]).norm() / before[1].norm().clamp_min(1e-30))
    if not (logits <= limit and gradients <= limit):
        raise ModelError(
            f"{key}: with Liger's kernel the logits differ by {logits:.1e} and the gradients by {gradients:.1e}, more "
            f"than rounding ({limit:.1e}). Remove it."
        )
    detail = f"a row of {_PROBE_TOKENS} tokens: logits {logits:.1e}, gradients {gradients:.1e} from the model's own"
    numbers = {"logits": logits, "gradients": gradients}
    return PromiseResult("E4", f"{key} = the model's own", "pass", detail, numbers)


def _probe(model: PreTrainedModel | PeftModel) -> tuple[Tensor, Tensor]:
    """(logits [tokens, vocabulary], all gradients end to end), fp32 on the CPU; leaves no gradients."""
    embedding = model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(_PROBE_SEED)
    ids = torch.randint(0, embedding.shape[0], (1, _PROBE_TOKENS), generator=generator).to(embedding.device)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with without_compilation():
            logits: Tensor = model(input_ids=ids, use_cache=False).logits[0].float()
            torch.logsumexp(logits, dim=-1).mean().backward()
        found = [p.grad.flatten().float().cpu() for p in model.parameters() if p.grad is not None]
    finally:
        model.zero_grad()
        for module, training in modes:
            module.training = training
    return logits.detach().cpu(), torch.cat(found) if found else torch.zeros(1)
