"""Exports: what is on disk is what was trained (E6), plain transformers loads it, and an altered one is caught."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers import logging as transformers_logging

from eft.config.model import AdapterConfig, FreezingConfig
from eft.config.root import TrainConfig
from eft.core.hashing import hash_file
from eft.models import verify_child, verify_export
from eft.models.adapters import apply_adapter, apply_freezing, set_dtypes
from eft.models.export import check_saved_tensors, export_model
from eft.models.merge import merge_adapter
from eft.models.tokenizer import load_tokenizer, resize_embeddings
from tests.tiny import CHATML, tiny_tokenizer
from tests.tiny_models import tiny_model

# peft reads a property that transformers has renamed; theirs to mend.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
transformers_logging.disable_progress_bar()

TOKENIZER = tiny_tokenizer()
IDS = TOKENIZER.encode("The capital of France is Paris. hello world")
BF16, F32 = torch.bfloat16, torch.float32


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The child's program inside this process: a fresh one takes seconds to import, and the matrix is wide."""

    def run(folder: Path, ids: list[int]) -> tuple[dict[str, Tensor] | None, str]:
        out = folder.parent / "logits.safetensors"
        verify_child.main(folder, ids, out)
        return load_file(out), ""

    monkeypatch.setattr(verify_export, "_run_child", run)


def _base(folder: Path, family: str = "llama", dtype: torch.dtype = BF16, **overrides: Any) -> Any:
    """A model that was loaded from `folder`."""
    tiny_model(family, vocab_size=len(TOKENIZER), **overrides).to(dtype).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder)


def _train(model: torch.nn.Module, seed: int = 0) -> None:
    """Move every trained parameter, to values that bf16 cannot hold."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))


def _lora(model: Any, **keys: Any) -> PeftModel:
    cfg = AdapterConfig(adapter="lora", **{"lora_target_linear": True, **keys})
    adapted = apply_adapter(model, cfg, seed=1)
    assert isinstance(adapted, PeftModel)
    set_dtypes(adapted)
    _train(adapted)
    return adapted


def _partly_trained(folder: Path, **overrides: Any) -> Any:
    """bf16 below, fp32 on top, as after training with `train_top_layers`."""
    model = _base(folder, **overrides)
    apply_freezing(model, FreezingConfig(train_top_layers=1, unfrozen_parameters=["model.embed_tokens"]))
    set_dtypes(model)
    _train(model)
    return model


def _state(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def _assert_passes(folder: Path, model: Any, dtype: torch.dtype) -> None:
    for result in (
        check_saved_tensors(folder, model, dtype),
        verify_export.verify_export(folder, model, TOKENIZER, IDS),
    ):
        assert result.status == "pass", result


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("save_dtype", [None, F32, torch.float16])
@pytest.mark.usefixtures("in_process")
def test_a_partly_trained_model_is_saved_exactly(tmp_path: Path, tied: bool, save_dtype: torch.dtype | None) -> None:
    model = _partly_trained(tmp_path / "base", tie_word_embeddings=tied)
    model.train()
    before, config = _state(model), copy.deepcopy(model.config.to_dict())
    manifest = export_model(model, TOKENIZER, tmp_path / "out", save_dtype=save_dtype)
    assert _same(_state(model), before)
    assert model.config.to_dict() == config
    assert model.training
    dtype = save_dtype or BF16
    _assert_passes(tmp_path / "out", model, dtype)
    assert manifest["dtype"] == str(dtype).removeprefix("torch.")
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert ("lm_head.weight" in file.keys()) is not tied  # noqa: SIM118  # safetensors' file has no `in`
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "qwen3_moe", "gpt_oss", "gpt_neox", "bloom", "phi3"])
@pytest.mark.usefixtures("in_process")
def test_families(tmp_path: Path, family: str) -> None:
    model = _base(tmp_path / "base", family)
    set_dtypes(model)
    _train(model)
    export_model(model, TOKENIZER, tmp_path / "out", save_dtype=None)
    _assert_passes(tmp_path / "out", model, BF16)


@pytest.mark.usefixtures("in_process")
def test_a_model_built_in_memory_with_foreign_attention(tmp_path: Path) -> None:
    model = tiny_model("llama", vocab_size=len(TOKENIZER), attn_implementation="eager")
    export_model(model, TOKENIZER, tmp_path, save_dtype=None)
    _assert_passes(tmp_path, model, F32)
    assert "eager" not in (tmp_path / "config.json").read_text()


LORA_CASES: list[dict[str, Any]] = [
    {},
    {"peft_use_dora": True},
    {"peft_use_rslora": True, "lora_r": 3, "lora_target_linear": False, "lora_target_modules": r".*\.q_proj"},
    {"lora_modules_to_save": ["embed_tokens"]},
    {"lora_modules_to_save": ["lm_head", "embed_tokens"]},
]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("keys", LORA_CASES)
@pytest.mark.usefixtures("in_process")
def test_an_adapter_is_saved_as_an_adapter(tmp_path: Path, keys: dict[str, Any], tied: bool) -> None:
    model = _lora(_base(tmp_path / "base", tie_word_embeddings=tied), **keys)
    before = _state(model)
    export_model(model, TOKENIZER, tmp_path / "out", save_dtype=None)
    assert _same(_state(model), before)
    assert not model.peft_config["default"].inference_mode
    _assert_passes(tmp_path / "out", model, BF16)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert len({path.stat().st_mode for path in (tmp_path / "out").iterdir()}) == 1
    assert {"adapter_model.safetensors", "adapter_config.json", "manifest.json", "tokenizer.json"} <= names
    assert "model.safetensors" not in names
    auto = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    assert auto.peft_config["default"].base_model_name_or_path == str(tmp_path / "base")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("saved", [["embed_tokens", "lm_head"], None])
@pytest.mark.usefixtures("in_process")
def test_new_tokens_travel_with_an_adapter(tmp_path: Path, tied: bool, saved: list[str] | None) -> None:
    """Trained ones as modules to save; a pad token alone as the resized embedding."""
    _base(tmp_path / "base", tie_word_embeddings=tied)
    TOKENIZER.save_pretrained(tmp_path / "base")
    new: dict[str, Any] = {"tokens": ["<a>"]} if saved else {"special_tokens": {"pad_token": "<|pad-only|>"}}
    cfg = TrainConfig(
        base_model=str(tmp_path / "base"),
        datasets=[{"path": "rows.jsonl", "type": "completion"}],
        learning_rate=1e-4,
        adapter="lora",
        lora_target_linear=True,
        lora_modules_to_save=saved,
        **new,
    )
    tokenizer = load_tokenizer(cfg)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    resize_embeddings(base, tokenizer, cfg, seed=1)
    model = _lora(base, lora_modules_to_save=saved)
    export_model(model, tokenizer, tmp_path / "out", save_dtype=None)
    assert check_saved_tensors(tmp_path / "out", model, BF16).status == "pass"
    result = verify_export.verify_export(tmp_path / "out", model, tokenizer, [*IDS, len(tokenizer) - 1])
    assert result.status == "pass", result
    auto = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert auto.get_input_embeddings().weight.shape[0] == len(tokenizer)
    assert all(promise.status == "pass" for promise in merge_adapter(tmp_path / "out", tmp_path / "merged").promises)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.get_input_embeddings().weight.shape[0] == len(tokenizer)


def test_an_adapter_on_a_model_from_memory_cannot_be_verified_but_is_complete(tmp_path: Path) -> None:
    model = _lora(tiny_model("llama", vocab_size=len(TOKENIZER)))
    export_model(model, TOKENIZER, tmp_path, save_dtype=None)
    assert check_saved_tensors(tmp_path, model, F32).status == "pass"
    assert verify_export.verify_export(tmp_path, model, TOKENIZER, IDS).status == "not applicable"


def _flip_byte(file: Path, *, mend_manifest: bool) -> None:
    """Change one byte (the exponent) of the last tensor in a safetensors file."""
    data = bytearray(file.read_bytes())
    data[-1] ^= 0x11
    file.write_bytes(data)
    if mend_manifest:
        _mend_manifest(file)


def _mend_manifest(file: Path) -> None:
    """Make the manifest agree with a file that was changed, so that only the tensors can tell."""
    path = file.parent / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"][file.name] = {"sha256": hash_file(file), "size": file.stat().st_size}
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize("mend_manifest", [True, False])
@pytest.mark.parametrize("adapter", [True, False])
@pytest.mark.usefixtures("in_process")
def test_one_altered_byte_fails_both_checks(tmp_path: Path, adapter: bool, mend_manifest: bool) -> None:
    model = _lora(_base(tmp_path / "base")) if adapter else _partly_trained(tmp_path / "base")
    export_model(model, TOKENIZER, tmp_path / "out", save_dtype=None)
    file = tmp_path / "out" / ("adapter_model.safetensors" if adapter else "model.safetensors")
    _flip_byte(file, mend_manifest=mend_manifest)
    complete = check_saved_tensors(tmp_path / "out", model, BF16)
    verified = verify_export.verify_export(tmp_path / "out", model, TOKENIZER, IDS)
    assert (complete.status, verified.status) == ("fail", "fail")
    if mend_manifest:
        assert "differs from the live tensor" in complete.detail
        assert "logits differ by up to" in verified.detail
    else:
        assert "sha256 differs" in complete.detail
        assert "sha256 differs" in verified.detail


def test_what_was_left_out_is_found(tmp_path: Path) -> None:
    model = _lora(_base(tmp_path / "base"))
    model.get_base_model().model.norm.weight.requires_grad_(True)
    export_model(model, TOKENIZER, tmp_path / "out", save_dtype=None)
    result = check_saved_tensors(tmp_path / "out", model, BF16)
    assert result.status == "fail"
    assert "model.norm.weight was trained but is not part of the export" in result.detail
    (tmp_path / "out" / "adapter_config.json").unlink()
    assert "adapter_config.json is missing" in check_saved_tensors(tmp_path / "out", model, BF16).detail
    (tmp_path / "out" / "manifest.json").unlink()
    assert "never finished" in check_saved_tensors(tmp_path / "out", model, BF16).detail


def test_a_tensor_missing_on_disk_is_found(tmp_path: Path) -> None:
    model = _base(tmp_path / "base")
    export_model(model, TOKENIZER, tmp_path / "out", save_dtype=None)
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file)
    _mend_manifest(file)
    result = check_saved_tensors(tmp_path / "out", model, BF16)
    assert (result.status, result.detail) == ("fail", "model.norm.weight was not saved")


@pytest.mark.usefixtures("in_process")
def test_live_buffers_that_no_file_holds_are_part_of_the_check(tmp_path: Path) -> None:
    model = _base(tmp_path / "base")
    export_model(model, TOKENIZER, tmp_path / "out", save_dtype=None)
    model.model.rotary_emb.inv_freq.mul_(1.5)
    assert check_saved_tensors(tmp_path / "out", model, BF16).status == "pass"
    assert verify_export.verify_export(tmp_path / "out", model, TOKENIZER, IDS).status == "fail"


def test_a_new_export_replaces_the_old_one_wholly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _base(tmp_path / "base")
    out = tmp_path / "out"
    out.mkdir()
    (out / "metrics.jsonl").write_text("{}\n")
    monkeypatch.setattr("eft.models.export.MAX_SHARD_SIZE", "40KB")
    sharded = export_model(model, TOKENIZER, out, save_dtype=None)
    assert sum(name.startswith("model-0") for name in sharded["files"]) > 1
    assert check_saved_tensors(out, model, BF16).status == "pass"
    monkeypatch.undo()
    single = export_model(model, TOKENIZER, out, save_dtype=None)
    assert {path.name for path in out.iterdir()} == {*single["files"], "manifest.json", "metrics.jsonl"}
    assert check_saved_tensors(out, model, BF16).status == "pass"


def test_a_failed_export_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _base(tmp_path / "base")
    export_model(model, TOKENIZER, tmp_path / "out", save_dtype=None)
    before = {path.name: hash_file(path) for path in (tmp_path / "out").iterdir()}

    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(TOKENIZER, "save_pretrained", full)
    with pytest.raises(OSError, match="No space"):
        export_model(model, TOKENIZER, tmp_path / "out", save_dtype=F32)
    assert {path.name: hash_file(path) for path in (tmp_path / "out").iterdir()} == before


def test_tokenizer_template_and_stop_tokens_are_part_of_the_export(tmp_path: Path) -> None:
    model = tiny_model("llama", vocab_size=len(TOKENIZER), eos_token_id=9)
    model.generation_config.eos_token_id = 9
    model.generation_config.temperature = 0.7  # without do_sample: loads, but transformers refuses to save it
    tokenizer = tiny_tokenizer(CHATML.replace("assistant", "model"))
    export_model(model, tokenizer, tmp_path, save_dtype=None)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert saved.chat_template == tokenizer.chat_template
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.generation_config.eos_token_id == [9, TOKENIZER.eos_token_id]
    assert model.generation_config.eos_token_id == 9


def test_a_fresh_process_verifies_full_and_adapter_exports(tmp_path: Path) -> None:
    """The real thing: a mixed-dtype model and an adapter, each in a process of its own."""
    model = _partly_trained(tmp_path / "base", tie_word_embeddings=True)
    export_model(model, TOKENIZER, tmp_path / "full", save_dtype=None)
    result = verify_export.verify_export(tmp_path / "full", model, TOKENIZER, IDS)
    assert result.status == "pass", result
    assert result.numbers["max_abs_difference"] == 0.0
    adapted = _lora(_base(tmp_path / "base32", dtype=F32), lora_modules_to_save=["lm_head"])
    export_model(adapted, TOKENIZER, tmp_path / "adapter", save_dtype=None)
    result = verify_export.verify_export(tmp_path / "adapter", adapted, TOKENIZER, IDS)
    assert result.status == "pass", result


def test_a_child_that_dies_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _base(tmp_path / "base")
    export_model(model, TOKENIZER, tmp_path / "out", save_dtype=None)
    stub = tmp_path / "python"
    stub.write_text("#!/bin/sh\necho 'OSError: it does not load' >&2\nexit 1\n")
    stub.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(stub))
    result = verify_export.verify_export(tmp_path / "out", model, TOKENIZER, IDS)
    assert result.status == "fail"
    assert "plain transformers could not load" in result.detail
    assert "OSError: it does not load" in result.detail
