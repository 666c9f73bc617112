"""QLoRA on this machine, end to end: quantise, train, audit, save, resume, reload, merge, compare."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from eft import run
from eft.config.root import TrainConfig
from eft.models.adapters import apply_adapter, set_dtypes
from eft.models.load import load_model
from eft.models.merge import merge_adapter
from eft.models.quantised import quantised_layers
from tests.functional.adapter_matrix import check_reloaded
from tests.tiny_models import tiny_model

pytest.importorskip("bitsandbytes", reason="the extra `qlora` is not installed")
MakeConfig = Callable[..., TrainConfig]
KEYS: dict[str, Any] = {
    "adapter": "qlora",
    "load_in_4bit": True,
    "lora_target_linear": True,
    "lora_dropout": 0.1,
    "max_steps": 4,
    "save_steps": 2,
}


@pytest.mark.parametrize(
    "width",
    [
        {},
        {"bnb_config_kwargs": {"bnb_4bit_quant_storage": "bfloat16", "bnb_4bit_use_double_quant": False}},
        {"adapter": "lora", "load_in_4bit": False, "load_in_8bit": True},
    ],
)
def test_end_to_end(make_config: MakeConfig, tmp_path: Path, width: dict[str, Any]) -> None:
    config = make_config("qwen3", **{**KEYS, **width})
    model, tokenizer, trainer = run.train(config)
    assert isinstance(model, PeftModel)
    assert len(quantised_layers(model)) == 14
    assert all(promise.status == "pass" for promise in check_reloaded(Path(config.output_dir), model, tokenizer))
    assert "every trainable tensor changes, no frozen one does" in {p.title for p in trainer.outcome.promises}
    merged = merge_adapter(Path(config.output_dir), tmp_path / "merged")
    assert {promise.status for promise in merged.promises} == {"pass"}, merged.promises
    as_trained = merge_adapter(Path(config.output_dir), tmp_path / "as-trained", as_trained=True)
    assert {promise.status for promise in as_trained.promises} == {"pass"}, as_trained.promises


def test_a_resumed_run_is_bit_equal(make_config: MakeConfig, tmp_path: Path) -> None:
    straight, _, _ = run.train(make_config("qwen3", **KEYS, output_dir=str(tmp_path / "straight")))
    config = make_config(
        "qwen3",
        **KEYS,
        output_dir=str(tmp_path / "resumed"),
        resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-2"),
    )
    resumed, _, _ = run.train(config)
    for name, tensor in straight.state_dict().items():
        assert torch.equal(tensor.view(torch.uint8), resumed.state_dict()[name].view(torch.uint8)), name


def _four_bit(make_config: MakeConfig, folder: Path) -> Any:
    tiny_model("llama", hidden_size=64).save_pretrained(folder)
    config = make_config(**{**KEYS, "lora_dropout": 0.0, "base_model": str(folder)})
    return apply_adapter(load_model(config, compute_dtype=torch.float32, seed=1), config, seed=1)


def _evaluate_then_train(model: Any) -> tuple[bool, bool]:
    """Whether a forward in evaluation mode leaves the base's bits alone, and every factor gets a gradient after it."""
    ids = torch.arange(12)[None]
    before = {name: layer.weight.detach().clone() for name, layer in quantised_layers(model).items()}
    with torch.no_grad():
        model.eval()(ids)
    after = {name: layer.weight.detach() for name, layer in quantised_layers(model).items()}
    model.train()(ids, labels=ids).loss.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return all(torch.equal(before[n], after[n]) for n in before), all(p.grad is not None for p in trained)


def test_an_evaluation_before_the_training_costs_no_gradients(make_config: MakeConfig, tmp_path: Path) -> None:
    model = _four_bit(make_config, tmp_path)
    set_dtypes(model)
    assert _evaluate_then_train(model) == (True, True)


@pytest.mark.filterwarnings("ignore:bitsandbytes..gemv_4bit. an autograd kernel was not registered:UserWarning")
def test_what_bitsandbytes_does_by_itself(make_config: MakeConfig, tmp_path: Path) -> None:
    """Fails once bitsandbytes leaves layers alone in evaluation mode: then `keep_as_stored` can go."""
    from bitsandbytes.functional import has_avx512bf16

    if not has_avx512bf16():
        pytest.skip("bitsandbytes repacks on CPUs with AVX512-BF16 only")
    assert not _evaluate_then_train(_four_bit(make_config, tmp_path))[0]
