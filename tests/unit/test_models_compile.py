"""What compiling needs is asked for by name, before anything is loaded."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from eft.config.kernels import KernelConfig
from eft.core.errors import ConfigError
from eft.models.compile import check_compiler, compile_layers, without_compilation
from tests.tiny_models import tiny_model

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def bare_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """No compiler on the path, no Triton."""
    monkeypatch.setattr("eft.models.compile.shutil.which", lambda name: None)
    monkeypatch.setattr("eft.models.compile.find_spec", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("CC", raising=False)


@pytest.mark.usefixtures("bare_machine")
@pytest.mark.parametrize(
    ("device", "message"),
    [
        (CPU, r"torch_compile: needs a C\+\+ compiler, and there is no g\+\+"),
        (CUDA, "torch_compile: needs a C compiler"),
    ],
)
def test_a_missing_compiler_is_an_error(device: torch.device, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_compiler(KernelConfig(torch_compile=True), device)


@pytest.mark.usefixtures("bare_machine")
@pytest.mark.parametrize("keys", [{}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}])
def test_who_builds_nothing_needs_none(keys: dict[str, Any]) -> None:
    check_compiler(KernelConfig(**keys), CPU)


def test_a_compiler_of_the_environment_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match="no no-such-compiler here"):
        check_compiler(KernelConfig(torch_compile=True), CPU)


def test_cuda_needs_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eft.models.compile.shutil.which", lambda name: name)
    monkeypatch.setattr("eft.models.compile.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="package triton"):
        check_compiler(KernelConfig(torch_compile=True), CUDA)


@pytest.mark.parametrize(("recomputed", "compiled"), [(False, {"layers.0", "layers.1"}), (True, None)])
def test_which_modules_are_compiled(recomputed: bool, compiled: set[str] | None) -> None:
    model = tiny_model("llama")
    compile_layers(model, KernelConfig(torch_compile=True, torch_compile_backend="eager"), recomputed=recomputed)
    found = {name.removeprefix("model.") for name, m in model.named_modules() if m._compiled_call_impl is not None}
    if compiled is None:
        parts = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
        compiled = {f"layers.{layer}.{part}" for layer in (0, 1) for part in parts}
    assert found == compiled


def test_without_the_key_nothing_is() -> None:
    model = tiny_model("llama")
    compile_layers(model, KernelConfig(), recomputed=False)
    assert all(module._compiled_call_impl is None for module in model.modules())


class Doubled(torch.nn.Module):
    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return 2 * value


def test_compilation_can_be_left_out_for_a_while() -> None:
    calls: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        calls.append(1)
        return graph.forward

    layer = Doubled()
    layer.compile(backend=backend)
    with without_compilation():
        layer(torch.ones(1, 3))
    assert calls == []
    layer(torch.ones(1, 3))
    assert calls == [1]
