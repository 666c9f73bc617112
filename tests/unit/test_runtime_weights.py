"""Weights in a checkpoint: bit for bit, in live dtypes, tied, partly frozen, adapters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from eft.core.errors import CheckpointError
from eft.runtime.tensors import read_tensors, same_bits, save_tensors
from eft.runtime.weights import ADAPTER_FILE, BASE_FILE, MODEL_FILE, load_weights, save_weights
from tests.tiny_models import tiny_model

# peft 0.21 reads a property that transformers 5.23 renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def scramble(model: nn.Module) -> None:
    """Other values everywhere, special ones included."""
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
            parameter.view(-1)[0] = (-0.0, float("nan"), float("inf"), 1e-45)[index % 4]


def adapted(**options: object) -> PeftModel:
    torch.manual_seed(3)
    settings = {"r": 2, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"], **options}
    model = get_peft_model(tiny_model("llama"), LoraConfig(**settings))
    assert isinstance(model, PeftModel)
    return model


def bits(model: nn.Module) -> dict[str, bytes]:
    state = model.state_dict()
    return {name: value.reshape(-1).view(torch.uint8).numpy().tobytes() for name, value in state.items()}


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss"])
def test_whole_models_with_mixed_dtypes(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    for name, parameter in model.named_parameters():  # frozen ones in bf16, trained ones in fp32 (D10)
        if "layers.0" in name:
            parameter.requires_grad_(False)
            parameter.data = parameter.data.to(torch.bfloat16)
    scramble(model)
    before = bits(model)
    save_weights(tmp_path, model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert bits(model) != before
    load_weights(tmp_path, model)
    assert bits(model) == before
    assert (tmp_path / "config.json").is_file()


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path: Path) -> None:
    model = tiny_model("gemma3_text")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    save_weights(tmp_path, model)
    assert "lm_head.weight" not in read_tensors(tmp_path / MODEL_FILE)
    before = bits(model)
    scramble(model)
    load_weights(tmp_path, model)
    assert bits(model) == before
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_plain_from_pretrained_reads_the_folder(tmp_path: Path) -> None:
    model = tiny_model("llama")
    save_weights(tmp_path, model)
    assert bits(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)) == bits(model)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"target_modules": ["embed_tokens", "q_proj"]}])
def test_adapters(options: dict[str, object], tmp_path: Path) -> None:
    model = adapted(**options)
    base = {name: value for name, value in bits(model).items() if "lora" not in name and "modules_to_save" not in name}
    scramble(model)
    trained = bits(model)
    save_weights(tmp_path, model)
    stored = read_tensors(tmp_path / ADAPTER_FILE)
    assert all("lora" in name or "lm_head" in name for name in stored)
    assert not (tmp_path / MODEL_FILE).exists()
    assert not (tmp_path / BASE_FILE).exists()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    load_weights(tmp_path, model)
    assert bits(model) == trained
    assert base.keys() < trained.keys()


def test_peft_reads_the_folder(tmp_path: Path) -> None:
    model = adapted()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.5)
    save_weights(tmp_path, model)
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    assert {name: value for name, value in bits(loaded).items() if "lora" in name} == {
        name: value for name, value in bits(model).items() if "lora" in name
    }


def test_base_weights_trained_beside_an_adapter_are_not_lost(tmp_path: Path) -> None:
    model = adapted()
    norm = model.get_parameter("base_model.model.model.norm.weight")
    norm.requires_grad_(True)
    with torch.no_grad():
        norm.fill_(2.5)
    save_weights(tmp_path, model)
    assert set(read_tensors(tmp_path / BASE_FILE)) == {"base_model.model.model.norm.weight"}
    with torch.no_grad():
        norm.zero_()
    load_weights(tmp_path, model)
    assert torch.equal(norm, torch.full_like(norm, 2.5))


def test_persistent_buffers_are_stored(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model[1].running_mean.fill_(3.0)  # type: ignore[union-attr, operator]
    save_weights(tmp_path, model)
    model[1].running_mean.zero_()  # type: ignore[union-attr, operator]
    load_weights(tmp_path, model)
    assert model[1].running_mean.tolist() == [3.0, 3.0]  # type: ignore[union-attr, operator]


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    save_weights(tmp_path, nn.Linear(2, 3))
    with pytest.raises(CheckpointError, match=r"weight is float32 \[3, 2\], but the model's is float32 \[4, 2\]"):
        load_weights(tmp_path, nn.Linear(2, 4))
    with pytest.raises(CheckpointError, match=r"but the model's is bfloat16 \[3, 2\]"):
        load_weights(tmp_path, nn.Linear(2, 3).to(torch.bfloat16))
    with pytest.raises(CheckpointError, match=r"The run has no 1 tensor: bias"):
        load_weights(tmp_path, nn.Linear(2, 3, bias=False))
    with pytest.raises(CheckpointError, match=r"lacks 2 tensors: 0\.bias, 0\.weight \(nearest: bias\)"):
        load_weights(tmp_path, nn.Sequential(nn.Linear(2, 3)))
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors: missing; the folder holds model"):
        load_weights(tmp_path, adapted())


def test_a_write_that_stored_something_else_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eft.runtime.tensors.read_tensors", lambda path: {"x": torch.tensor([1.0, 2.5])})
    save_tensors(tmp_path / "good", {"x": torch.tensor([1.0, 2.5])})
    with pytest.raises(CheckpointError, match="x read back from the disk differs"):
        save_tensors(tmp_path / "bad", {"x": torch.tensor([1.0, 2.0])})


DTYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.uint8,
    torch.bool,
    torch.int32,
]


@given(
    dtype=st.sampled_from(DTYPES),
    shape=st.lists(st.integers(0, 3), max_size=3),
    seed=st.integers(0, 99),
    transposed=st.booleans(),
)
def test_any_tensor_round_trips(
    dtype: torch.dtype, shape: list[int], seed: int, transposed: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    generator = torch.Generator().manual_seed(seed)
    count = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), dtype=torch.uint8, generator=generator)
    tensor = raw.view(dtype).reshape(shape)
    tensor = tensor.transpose(0, -1) if transposed and tensor.ndim > 1 else tensor
    save_tensors(path, {"t": tensor, "alias": tensor, "view": tensor.reshape(-1)[:1]})
    loaded = read_tensors(path)
    assert same_bits(loaded["t"], tensor)
    assert same_bits(loaded["alias"], tensor)


def test_files_are_as_readable_as_their_folder(tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o755)
    save_tensors(folder / "x", {"x": torch.ones(2)})
    assert (folder / "x").stat().st_mode & 0o777 == 0o644


def test_same_bits() -> None:
    nan = torch.tensor(float("nan"))
    assert same_bits(nan, nan.clone())
    assert not same_bits(torch.tensor(0.0), torch.tensor(-0.0))
    assert not same_bits(torch.zeros(2), torch.zeros(2, 1))
    assert not same_bits(torch.zeros(2), torch.zeros(2, dtype=torch.int32))
