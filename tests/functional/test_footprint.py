"""What a process is predicted to hold, by its parts; `benchmarks/footprint.py` compares with measured processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from eft.config.load import config_from_mapping
from eft.config.root import TrainConfig
from eft.data.store import as_token_dataset
from eft.footprint import _PROCESS, Footprint, footprint
from eft.inputs import plan_of
from eft.models.adapters import apply_adapter
from eft.models.load import load_model
from eft.parallel.plan import Degrees
from tests.functional.reference import token_rows
from tests.tiny import tiny_tokenizer
from tests.tiny_models import tiny_model


def config_of(folder: Path, world_size: int, **keys: Any) -> TrainConfig:
    values = {
        "base_model": str(folder),
        "datasets": [{"path": "given"}],
        "output_dir": "unused",
        "sequence_len": 64,
        "sample_packing": True,
        "global_batch_size": world_size,
        "learning_rate": 1e-3,
        "bf16": False,
        **keys,
    }
    return config_from_mapping(values)


def predict(folder: Path, world_size: int, longest: int = 30, **keys: Any) -> tuple[Footprint, Degrees]:
    config = config_of(folder, world_size, **keys)
    plan = plan_of(config, as_token_dataset(token_rows(24, longest=longest)), world_size)
    return footprint(config, plan, world_size), Degrees.resolve(world_size, config)


def test_ddp_holds_its_gradients_twice_and_shards_hold_a_part(model_folder: Callable[[str], Path]) -> None:
    folder = model_folder("llama")
    one, copies, shards = (predict(folder, size, **keys)[0] for size, keys in WAYS)
    assert (one.buckets, copies.buckets, shards.buckets) == (0, one.gradients, 0)
    assert (copies.weights, copies.optimizer) == (one.weights, one.optimizer)
    assert shards.weights == one.weights // 2
    assert shards.optimizer == one.optimizer // 2
    assert shards.gathered > 0
    for held in (one, copies, shards):
        assert held.peak >= held.weights + held.optimizer + held.buckets + held.gathered + held.activations + held.kept


def test_a_head_that_autograd_goes_through_holds_logits_and_their_gradient(
    model_folder: Callable[[str], Path],
) -> None:
    plain, headed = (
        predict(model_folder("llama"), 1, adapter="lora", lora_r=2, lora_target_modules=modules)[0]
        for modules in (["q_proj"], ["q_proj", "lm_head"])
    )
    more = headed.activations - plain.activations
    a_row = len(tiny_tokenizer()) * 4  # of fp32 logits
    assert more % a_row == 0
    assert 0 < more // a_row <= headed.tokens


@pytest.mark.parametrize(
    ("shared_by", "copies"),
    [
        ({}, 1.5),
        ({"fsdp_version": 2}, 1),
        ({"fsdp_version": 2, "fsdp_config": {"cpu_ram_efficient_loading": True}}, None),
        ({"tensor_parallel_size": 2, "global_batch_size": 1}, None),
    ],
)
def test_weights_that_are_shared_out_at_the_start_may_be_the_most(
    shared_by: dict[str, Any], copies: float | None, tmp_path: Path
) -> None:
    with torch.device("meta"):  # its config alone is read
        wide = tiny_model("llama", num_hidden_layers=12, hidden_size=256, intermediate_size=10_000)
    wide.config.save_pretrained(tmp_path)
    config = {"adapter": "lora", "lora_target_modules": ["q_proj"], "lora_r": 2, "global_batch_size": 2, **shared_by}
    held = predict(tmp_path, 2, longest=6, sequence_len=8, **config)[0]
    assert held.moment.startswith("the start") == (copies is not None)
    if copies is not None:
        whole = held.weights * (2 if "fsdp_version" in shared_by else 1)
        assert held.gathered == pytest.approx(copies * whole, abs=1)
        assert held.peak == held.weights + held.gathered + _PROCESS
        assert held.activations == held.optimizer == held.gradients == held.buckets == 0


def test_recomputation_keeps_the_inputs_of_layers(model_folder: Callable[[str], Path]) -> None:
    folder = model_folder("llama")
    whole, again = (predict(folder, 1, gradient_checkpointing=value)[0] for value in (False, True))
    assert again.activations < whole.activations


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_experts_count_for_every_token_they_are_chosen_for(family: str, model_folder: Callable[[str], Path]) -> None:
    held = predict(model_folder(family), 2)[0]
    assert held.activations > predict(model_folder("llama"), 2)[0].activations


def test_what_malloc_keeps_is_of_a_processs_own_part(model_folder: Callable[[str], Path]) -> None:
    folder = model_folder("llama")
    (one, _), (part, _) = predict(folder, 1), predict(folder, 2, tensor_parallel_size=2, global_batch_size=1)
    assert one.gradients - part.gradients == one.gradients // 2
    whole, half = (held.kept - _PROCESS for held in (one, part))
    assert whole == pytest.approx(2 * half, rel=0.1)


@pytest.mark.parametrize(
    "bits",
    [
        {"load_in_4bit": True},
        {"load_in_4bit": True, "bnb_config_kwargs": {"bnb_4bit_use_double_quant": False}},
        {"load_in_8bit": True, "adapter": "lora"},
    ],
)
def test_a_quantised_base_is_counted_as_it_is_packed(bits: dict[str, Any], model_folder: Callable[[str], Path]) -> None:
    pytest.importorskip("bitsandbytes", reason="the extra `qlora` is not installed")
    keys = {"adapter": "qlora", "lora_target_linear": True, **bits}
    folder = model_folder("qwen3")
    config = config_of(folder, 1, **keys)
    model = apply_adapter(load_model(config, compute_dtype=torch.float32, seed=0), config, seed=0)
    states = [getattr(parameter, "quant_state", None) for parameter in model.parameters()]
    found = sum(parameter.nbytes for parameter in model.parameters())
    found += sum(tensor.nbytes for state in states if state is not None for tensor in tensors_of(state))
    found += sum(
        parameter.SCB.nbytes for parameter in model.parameters() if getattr(parameter, "SCB", None) is not None
    )
    assert predict(folder, 1, **keys)[0].weights == pytest.approx(found, rel=0.02)


def tensors_of(state: Any) -> list[Tensor]:
    """Scales of a 4-bit matrix, and those of the scales."""
    inner = [state.state2.absmax] if state.nested else []
    return [state.absmax, *inner]


WAYS: list[tuple[int, dict[str, Any]]] = [(1, {}), (2, {}), (2, {"fsdp_version": 2})]


def test_it_is_called_an_estimate(model_folder: Callable[[str], Path]) -> None:
    held, degrees = predict(model_folder("llama"), 2)
    shown = dict(held.rows(degrees))["memory of each"]
    assert shown.startswith("about ")
    assert "an estimate" in shown
    assert "kept by malloc" in shown
