"""Liger's kernels: only where they can run, only what the family has, and only when the model computes the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from eft.config.kernels import KernelConfig
from eft.core.errors import ConfigError, ModelError
from eft.models.kernels import InstalledLiger, check_liger, use_liger, wanted_kernels
from tests.tiny_models import tiny_model

KEYS = ("liger_rms_norm", "liger_rope", "liger_glu_activation")


class FusedNorm(nn.Module):
    """The same norm in other words, off by a factor."""

    def __init__(self, norm: nn.Module, factor: float) -> None:
        super().__init__()
        self.weight, self.eps, self.factor = norm.weight, norm.variance_epsilon, factor

    def forward(self, hidden: Tensor) -> Tensor:
        scale = torch.rsqrt(hidden.double().square().mean(-1, keepdim=True) + self.eps) * self.factor
        return self.weight * (hidden * scale).to(hidden.dtype)


class FakeLiger:
    """Replaces norms, and remembers what it was asked for."""

    def __init__(self, factor: float = 1.0, offered: tuple[str, ...] = ("rms_norm", "rope", "swiglu")) -> None:
        self.factor, self.offered = factor, offered
        self.asked: list[dict[str, bool]] = []

    def offers(self, model_type: str) -> frozenset[str]:
        assert model_type == "llama"
        return frozenset(self.offered)

    def apply(self, model: Any, parts: Mapping[str, bool]) -> None:
        self.asked.append(dict(parts))
        base: PreTrainedModel = model.get_base_model() if hasattr(model, "get_base_model") else model
        if parts["rms_norm"]:
            base.model.norm = FusedNorm(base.model.norm, self.factor)


@pytest.mark.parametrize("adapted", [False, True])
def test_equal_kernels_are_used(adapted: bool) -> None:
    model: Any = tiny_model("llama")
    if adapted:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    liger = FakeLiger()
    results = use_liger(model, KernelConfig(liger_rms_norm=True, liger_glu_activation=True), liger)
    assert [(result.promise, result.status) for result in results] == [("E4", "pass")] * 2
    assert 0 < results[0].numbers["logits"] < 1e-5
    assert results[1].numbers["logits"] == 0
    assert [{name for name, is_on in parts.items() if is_on} for parts in liger.asked] == [{"rms_norm"}, {"swiglu"}]
    assert all("fused_linear_cross_entropy" in parts for parts in liger.asked), "its own default would be on"
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_kernels_that_differ_are_refused() -> None:
    with pytest.raises(ModelError, match="liger_rms_norm: with Liger's kernel the logits differ by 1.0e-04"):
        use_liger(tiny_model("llama"), KernelConfig(liger_rms_norm=True), FakeLiger(factor=1.0001))


def test_wrong_gradients_are_refused() -> None:
    class Half(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: Tensor) -> Tensor:
            return value.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient / 2

    class WrongBackward(FakeLiger):
        def apply(self, model: Any, parts: Mapping[str, bool]) -> None:
            model.model.norm.register_forward_hook(lambda module, inputs, output: Half.apply(output))

    with pytest.raises(ModelError, match="the logits differ by 0.0e\\+00 and the gradients by"):
        use_liger(tiny_model("llama"), KernelConfig(liger_rms_norm=True), WrongBackward())


@pytest.mark.parametrize("key", KEYS)
def test_what_the_family_lacks_is_refused(key: str) -> None:
    with pytest.raises(ModelError, match=f"{key}: Liger has no such kernel for llama"):
        use_liger(tiny_model("llama"), KernelConfig(**{key: True}), FakeLiger(offered=()))


@pytest.mark.parametrize("key", KEYS)
def test_they_need_cuda_and_the_package(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = KernelConfig(**{key: True})
    assert wanted_kernels(config) == (key,)
    with pytest.raises(ConfigError, match=f"{key}: Liger's kernels need CUDA, but the device is cpu"):
        check_liger(config, torch.device("cpu"))
    monkeypatch.setattr("eft.models.kernels.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=f"{key}: needs the package liger-kernel"):
        check_liger(config, torch.device("cuda", 0))


def test_without_the_keys_nothing_happens() -> None:
    check_liger(KernelConfig(), torch.device("cpu"))
    liger = FakeLiger()
    assert use_liger(tiny_model("llama"), KernelConfig(), liger) == []
    assert liger.asked == []


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_real_kernels_are_equal(dtype: torch.dtype) -> None:
    """Last in the process that runs it: Liger changes the family's module."""
    pytest.importorskip("liger_kernel")
    model = tiny_model("llama", hidden_size=64, head_dim=16).to("cuda", dtype)
    results = use_liger(model, KernelConfig(**dict.fromkeys(KEYS, True)), InstalledLiger())
    assert [result.status for result in results] == ["pass"] * 3
