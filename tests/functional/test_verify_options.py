"""`eft verify` on options of memory, speed and precision: they hold, and a fault in each is found (E4, yardstick)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from eft.config.kernels import KernelConfig
from eft.core.records import PromiseResult
from eft.models.checkpointing import set_checkpointing
from eft.models.compile import compile_layers
from eft.trainer.trainer import EftTrainer
from eft.verify.exact import (
    GradientErrors,
    PlainObjective,
    comparable_weights,
    exact_arithmetic,
    gradient_errors,
    plain_batch_loss,
    plain_loss,
    take_gradients,
)
from eft.verify.excerpt import first_documents
from eft.verify.options import ALWAYS_ON, TOGETHER, option_checks
from eft.verify.precision import check_half_precision
from eft.verify.verification import Verification
from tests.functional.test_verify import (  # noqa: F401  # pytest looks for the fixtures here
    LORA,
    _quiet_logging,
    _verification,
    failed,
    plant,
    run_command,
    warm_child,
    write_config,
)

MEMORY: dict[str, Any] = {"gradient_checkpointing": True, "activation_offloading": True}
COMPILE: dict[str, Any] = {"torch_compile": True, "torch_compile_backend": "eager"}


def options_of(verification: Verification) -> dict[str, PromiseResult]:
    """What each check of E4 says, by what it is about."""
    with exact_arithmetic(verification.model):
        return {what: check()[0] for what, check in option_checks(verification)}


# ---- it holds ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("warm_child")
def test_a_run_with_every_option(write_config: Callable[..., Path]) -> None:  # noqa: F811
    keys = {**MEMORY, **COMPILE, "bf16": True}
    code, results = run_command(write_config("chat_template", **keys))
    assert [result for result in results if result["status"] != "pass"] == []
    assert code == 0
    titles = [result["title"] for result in results if result["promise"] == "E4"]
    wanted = (ALWAYS_ON, "activation checkpointing", "activation offloading", "compiled layers", TOGETHER)
    assert titles == [f"{what}: the same step" for what in wanted]
    assert [result["title"] for result in results if "bf16" in result["title"]]


@pytest.mark.parametrize("family", ["gemma2", "qwen3_moe", "gpt_oss"])
def test_options_of_other_families(family: str, tmp_path: Path, tokenizer: Any) -> None:
    results = options_of(_verification(tmp_path, tokenizer, family, **MEMORY))
    assert {what: result.status for what, result in results.items()} == dict.fromkeys(results, "pass"), results
    assert len(results) == 4


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_moe", "gpt_neox", "cohere2", "bloom"])
@pytest.mark.parametrize("pure", [False, True])
def test_bf16_is_as_near_as_plain_transformers(pure: bool, family: str, tmp_path: Path, tokenizer: Any) -> None:
    packing = family != "bloom"
    keys = {"bf16": True, "bfloat16": pure, "sample_packing": packing, "activation_offloading": True}
    verification = _verification(tmp_path, tokenizer, family, **keys)
    before = {name: tensor.clone() for name, tensor in verification.model.state_dict().items()}
    (result,) = check_half_precision(verification)
    assert result.status == "pass", result
    assert 1e-4 < result.numbers["gradients"] < 0.2
    assert 0.5 < result.numbers["gradients"] / result.numbers["plain_gradients"] < 1.5
    if not pure:
        assert all(torch.equal(before[name], value) for name, value in verification.model.state_dict().items())
    assert all(parameter.grad is None for parameter in verification.model.parameters())


def test_the_objective_of_the_run_is_compared(tmp_path: Path, tokenizer: Any) -> None:
    keys = {"label_smoothing_factor": 0.1, "z_loss_weight": 1e-2, "activation_offloading": True}
    results = options_of(_verification(tmp_path, tokenizer, **keys))
    assert {result.status for result in results.values()} == {"pass"}, results


def test_fp32_has_no_yardstick(tmp_path: Path, tokenizer: Any) -> None:
    assert check_half_precision(_verification(tmp_path, tokenizer)) == []


def test_the_plain_batch_is_the_plain_program(tmp_path: Path, tokenizer: Any) -> None:
    verification = _verification(tmp_path, tokenizer)
    documents = first_documents(verification.plan, 5, 30)
    model, objective = verification.model, PlainObjective(0.1, 1e-3)
    with exact_arithmetic(model):
        loss = plain_loss(model, documents, objective)
        gradients = take_gradients(model)
        assert plain_batch_loss(model, documents, objective) == pytest.approx(loss, rel=1e-12)
        errors = gradient_errors(take_gradients(model), gradients)
    assert errors.whole < 1e-12
    assert errors.typical < 1e-12


def test_gradient_errors() -> None:
    expected = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([0.0, 0.1])}
    assert gradient_errors(expected, expected) == GradientErrors(0.0, 0.0)
    errors = gradient_errors({"a": expected["a"], "b": torch.tensor([0.0, 0.2])}, expected)
    assert errors.whole == pytest.approx(0.1 / (25.01**0.5))
    assert errors.typical == pytest.approx(1 / 2**0.5), "a small tensor that is wrong by as much as itself shows"
    assert gradient_errors({"a": expected["a"]}, expected).typical == pytest.approx(1 / 2**0.5)


def test_weights_that_were_zero_are_the_same_in_every_dtype(tmp_path: Path, tokenizer: Any) -> None:
    model = _verification(tmp_path, tokenizer).model
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    torch.nn.init.zeros_(model.lm_head.weight)
    with comparable_weights(model):
        narrow = model.lm_head.weight.clone()
        assert narrow.bool().any()
        with exact_arithmetic(model):
            assert torch.equal(model.lm_head.weight, narrow.double())
    assert not model.lm_head.weight.bool().any()


# ---- it finds what is wrong ----------------------------------------------------------------------------------------


@contextmanager
def _offloading_that_spoils(**kwargs: Any) -> Iterator[None]:
    def unpack(value: Tensor) -> Tensor:
        return value * 1.001 if value.is_floating_point() else value

    with saved_tensors_hooks(lambda value: value, unpack):
        yield


def _spoil_offloading(trainer: EftTrainer) -> None:
    kept: Any = trainer.parts.offloading
    if kept.args[0]:
        trainer.parts.offloading = _offloading_that_spoils


@pytest.mark.usefixtures("warm_child")
def test_spoilt_offloading_is_found(write_config: Any, plant: Any) -> None:  # noqa: F811
    plant(_spoil_offloading)
    code, results = run_command(write_config("chat_template", **MEMORY))
    assert code == 1
    assert failed(results) == {"E2", "E4"}, "E2 is measured with the run's options"
    broken = {result["title"].partition(":")[0] for result in results if result["status"] == "fail"}
    assert {"activation offloading", TOGETHER} <= broken
    assert not {ALWAYS_ON, "activation checkpointing"} & broken


@pytest.mark.usefixtures("warm_child")
def test_wrong_recomputation_is_found(write_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    def recompute_wrongly(model: Any, wanted: Any) -> None:
        set_checkpointing(model, wanted)
        for module in model.modules():
            if wanted is not None and "_gradient_checkpointing_func" in vars(module):
                # Cuts the gradient of a layer's input, as the reentrant kind can.
                module._gradient_checkpointing_func = lambda function, *args: function(args[0].detach(), *args[1:])

    monkeypatch.setattr("eft.builder.set_checkpointing", recompute_wrongly)
    code, results = run_command(write_config("chat_template", gradient_checkpointing=True))
    assert code == 1
    assert "E4" in failed(results)
    failing = [result for result in results if result["promise"] == "E4" and result["status"] == "fail"]
    broken = {result["title"].partition(":")[0] for result in failing}
    assert broken == {"activation checkpointing"}


@pytest.mark.usefixtures("warm_child")
def test_wrong_compilation_is_found(write_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    def compile_wrongly(model: Any, config: KernelConfig, **kwargs: Any) -> None:
        compile_layers(model, config, **kwargs)
        if config.torch_compile:
            model.model.layers[0].mlp.register_forward_hook(lambda module, inputs, output: output * 1.0001)

    monkeypatch.setattr("eft.builder.compile_layers", compile_wrongly)
    code, results = run_command(write_config("chat_template", **COMPILE))
    assert code == 1
    assert failed(results) == {"E4"}
    (broken,) = [result for result in results if result["status"] == "fail"]
    assert broken["title"] == "compiled layers: the same step"


@pytest.mark.usefixtures("warm_child")
def test_a_wrong_loss_head_is_found(write_config: Any, plant: Any) -> None:  # noqa: F811
    def scale_hidden(trainer: EftTrainer) -> None:
        loss: Any = trainer.parts.loss

        def spoilt(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            return loss.from_hidden(hidden * 1.0001, *args, **kwargs)

        trainer.parts.loss = replace(loss, from_hidden=spoilt)

    plant(scale_hidden)
    code, results = run_command(write_config("chat_template"))
    assert code == 1
    assert failed(results) == {"E2", "E4"}
    assert f"{ALWAYS_ON}: the same step" in {result["title"] for result in results if result["status"] == "fail"}


@pytest.mark.usefixtures("warm_child")
def test_a_coarser_step_is_found(write_config: Any, plant: Any) -> None:  # noqa: F811
    """In fp64 there is nothing to see; in bf16 only the exponent is left of what the head sees."""

    def lose_bits(trainer: EftTrainer) -> None:
        loss: Any = trainer.parts.loss

        def coarse(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            if hidden.dtype != torch.float64:
                powers = hidden.sign() * hidden.abs().clamp_min(1e-6).log2().round().exp2()
                hidden = hidden + (powers - hidden).detach()
            return loss.from_hidden(hidden, *args, **kwargs)

        trainer.parts.loss = replace(loss, from_hidden=coarse)

    plant(lose_bits)
    code, results = run_command(write_config("chat_template", bf16=True))
    assert code == 1
    (broken,) = [result for result in results if result["status"] == "fail"]
    assert "bf16" in broken["title"]
    assert "more than 1.5 times" in broken["detail"]
