"""`eft merge`: the files hold base + adapter, whatever shards, layout and dtype; nothing is lost or half written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from eft.config.model import AdapterConfig
from eft.core.errors import ConfigError, ModelError
from eft.models import merge as merge_module
from eft.models import merge_probe, rounding
from eft.models.adapters import apply_adapter, set_dtypes
from eft.models.export import export_model
from eft.models.merge import MERGE_FILE, merge_adapter
from eft.models.merge_targets import Target
from eft.models.rounding import is_rounded, round_keeping_change
from eft.models.shards import write_shard
from eft.models.verify_export import manifest_problems
from tests.tiny import tiny_tokenizer
from tests.tiny_models import tiny_model

TOKENIZER = tiny_tokenizer()
IDS = TOKENIZER.encode("The capital of France is Paris. hello world")


def _trained(
    place: Path, family: str = "llama", *, shards: str = "1GB", dtype: Any = torch.float32, **keys: Any
) -> Any:
    """A base in `place`/base, and a PeftModel over it whose adapter is far from zero, exported to `place`/adapter."""
    overrides = keys.pop("overrides", {})
    base = tiny_model(family, vocab_size=len(TOKENIZER), **overrides).to(dtype)
    base.save_pretrained(place / "base", max_shard_size=shards)
    model = AutoModelForCausalLM.from_pretrained(place / "base")
    cfg = AdapterConfig(adapter="lora", **{"lora_target_linear": True, **keys})
    adapted = apply_adapter(model, cfg, seed=1)
    assert isinstance(adapted, PeftModel)
    set_dtypes(adapted)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    export_model(adapted, TOKENIZER, place / "adapter", save_dtype=torch.float32)
    return adapted.eval()


CASES: list[dict[str, Any]] = [
    {},
    {"peft_use_dora": True},
    {"peft_use_rslora": True, "lora_r": 3, "lora_target_linear": False, "lora_target_modules": r".*\.q_proj"},
    {"lora_rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 5}, "lora_alpha_pattern": {"down_proj": 3}},
    {"lora_modules_to_save": ["lm_head", "embed_tokens"]},
    {"peft_trainable_token_indices": {"embed_tokens": [3, 7], "lm_head": [7]}},
    {"family": "gpt_neox"},
    {"family": "qwen3_moe"},
    {"family": "mixtral", "lora_target_linear": False, "lora_target_parameters": ["mlp.experts.down_proj"]},
    {"family": "gemma3_text", "lora_modules_to_save": ["embed_tokens"], "overrides": {"tie_word_embeddings": True}},
    {"family": "llama", "peft_trainable_token_indices": [5], "overrides": {"tie_word_embeddings": True}},
]


@pytest.mark.parametrize("keys", CASES, ids=str)
@torch.no_grad()
def test_merged_equals_adapter(tmp_path: Path, keys: dict[str, Any]) -> None:
    model = _trained(tmp_path, shards="40KB", **keys)
    done = merge_adapter(tmp_path / "adapter", tmp_path / "merged", ids=IDS)
    assert [promise.status for promise in done.promises] == ["pass"]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    expected = model(torch.tensor([IDS])).logits
    torch.testing.assert_close(merged(torch.tensor([IDS])).logits, expected, atol=2e-5, rtol=2e-5)
    assert all(change.change > 0 for change in done.changes)
    assert {path.name for path in (tmp_path / "base").glob("model*")} == {
        path.name for path in (tmp_path / "merged").glob("model*")
    }


def test_what_is_not_adapted_stays_bit_for_bit(tmp_path: Path) -> None:
    _trained(tmp_path, dtype=torch.bfloat16, lora_target_linear=False, lora_target_modules=["q_proj"])
    done = merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "merged"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype == torch.bfloat16
        assert torch.equal(after[name], tensor) == ("q_proj" not in name), name
    assert {change.name for change in done.changes} == {name for name in before if "q_proj" in name}
    assert [promise.detail.partition(":")[0] for promise in done.promises] == ["before rounding", "saved in bfloat16"]


def test_the_folder_is_whole(tmp_path: Path) -> None:
    """Tokenizer, stop token, manifest with checksums, the change of every tensor; readable as the folder is."""
    _trained(tmp_path)
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", save_dtype=torch.float16)
    folder = tmp_path / "merged"
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == TOKENIZER.get_vocab()
    assert GenerationConfig.from_pretrained(folder).eos_token_id == TOKENIZER.eos_token_id
    assert manifest_problems(folder) == []
    assert {p.dtype for p in AutoModelForCausalLM.from_pretrained(folder).parameters()} == {torch.float16}
    assert len(json.loads((folder / MERGE_FILE).read_text())["tensors"]) == 14
    assert len({path.stat().st_mode for path in folder.iterdir() if path.suffix == ".safetensors"}) == 1


def test_nothing_is_overwritten_unless_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _trained(tmp_path)
    out = tmp_path / "merged"
    merge_adapter(tmp_path / "adapter", out)
    with pytest.raises(ConfigError, match="is not empty; choose another folder with --output-dir, or pass --overwrite"):
        merge_adapter(tmp_path / "adapter", out)
    (out / "mark").write_text("")

    def fail(*_: Any) -> None:
        raise OSError("planted")

    monkeypatch.setattr(merge_module, "_write_shards", fail)
    with pytest.raises(OSError, match="planted"):
        merge_adapter(tmp_path / "adapter", out, overwrite=True)
    assert (out / "mark").exists()
    monkeypatch.undo()
    merge_adapter(tmp_path / "adapter", out, overwrite=True)
    assert not (out / "mark").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "merged"]


def test_a_merge_that_loses_the_adapter_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _trained(tmp_path)
    monkeypatch.setattr(Target, "merged", lambda self, weight: weight)
    done = merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    assert [promise.status for promise in done.promises] == ["fail"]
    assert {change.change for change in done.changes} == {0.0}


def test_the_streamed_logits_are_the_models(tmp_path: Path) -> None:
    """A decoder layer in memory at a time computes what the whole model does."""
    model = _trained(tmp_path, peft_use_dora=True)
    facts = merge_probe.AdapterFacts(tmp_path / "adapter", str(tmp_path / "base"), None, None, None, None)
    streamed = merge_probe.adapted_logits(facts, tmp_path / "base", IDS)
    with torch.no_grad():
        torch.testing.assert_close(streamed, model(torch.tensor([IDS])).logits[0], atol=1e-6, rtol=1e-6)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_refusals(tmp_path: Path) -> None:
    _trained(
        tmp_path, lora_target_linear=False, lora_target_modules=["lm_head"], overrides={"tie_word_embeddings": True}
    )
    with pytest.raises(ModelError, match=r"lm_head.weight is tied to model.embed_tokens.weight"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    with pytest.raises(ModelError, match="nothing to merge"):
        merge_adapter(tmp_path / "base", tmp_path / "merged")
    with pytest.raises(ConfigError, match="not quantised; leave --as-trained out"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged", as_trained=True)


def test_a_broken_adapter_is_named(tmp_path: Path) -> None:
    _trained(tmp_path)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "q_proj.lora_B" in name)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"q_proj.weight: NaNs detected"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_keeps_a_small_change(dtype: torch.dtype) -> None:
    """A change far below the spacing of the dtype survives; rounding to the nearest loses all of it."""
    base = torch.linspace(1, 2, 64).to(dtype).float().repeat(8, 16)
    change = torch.finfo(dtype).eps / 8
    value = base + change
    rounded = round_keeping_change(value, base, dtype, "name")
    assert torch.equal(value.to(dtype).float()[:, :63], base[:, :63])
    kept = (rounded.float() - base).sum(1) / (change * base.shape[1])
    assert (kept - 1).abs().max() < 0.02
    assert is_rounded(rounded, value)
    assert not is_rounded(rounded, value + 8 * change)
    assert torch.equal(round_keeping_change(base, base, dtype, "name").float(), base)
    assert torch.equal(rounded, round_keeping_change(value, base, dtype, "name"))
    assert not torch.equal(rounded, round_keeping_change(value, base, dtype, "another"))


@given(
    st.integers(1, 5),
    st.sampled_from([1, 7, 400]),
    st.sampled_from([1e-4, 1e-3, 1e-2, 3.0]),
    st.booleans(),
    st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_rounding_of_any_change(rows: int, columns: int, size: float, on_the_grid: bool, seed: int) -> None:
    """One of the two neighbours everywhere; of a row's change at most what one element carries is lost, unless rounding
    to the nearest had lost nothing anyway."""
    generator = torch.Generator().manual_seed(seed)
    base, direction = torch.randn(2, rows, columns, generator=generator)
    base = base.bfloat16().float() if on_the_grid else base
    value = base + size * direction
    rounded = round_keeping_change(value, base, torch.bfloat16, "name")
    assert is_rounded(rounded, value)
    change = value - base
    lost = ((value - rounded.float()) * change).sum(1)
    by_nearest = ((value - value.bfloat16().float()) * change).sum(1)
    one = (2**-7 * value.abs() * change.abs()).amax(1) + 1e-12
    assert (lost >= by_nearest.clamp(max=0) - 1e-5 * one).all()
    assert (lost <= torch.where(by_nearest > 0, one, by_nearest + 1e-5 * one)).all()
    assert torch.equal(round_keeping_change(value, base, torch.float32, "name"), value)


def test_chunks_of_rows_are_rounded_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    base = torch.randn(3, 8, 32, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    value = base * 1.001
    whole = round_keeping_change(value, base, torch.bfloat16, "name")
    monkeypatch.setattr(rounding, "_CHUNK", 64)
    assert torch.equal(round_keeping_change(value, base, torch.bfloat16, "name"), whole)


@pytest.mark.parametrize("fault", ["doubled", "left out", "layer in the files"])
def test_a_wrong_merge_into_bf16_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    _trained(tmp_path, dtype=torch.bfloat16)
    merged, write = Target.merged, write_shard

    def wrong(self: Target, weight: torch.Tensor) -> torch.Tensor:
        value = merged(self, weight)
        if fault == "doubled":
            return value + (value - weight)
        return weight if fault == "left out" and self.name == "model.layers.1.mlp.up_proj.weight" else value

    def write_wrong(path: Path, layout: dict[str, Any], tensors: Any) -> int:
        base = load_file(tmp_path / "base" / path.name)
        name = "model.layers.1.mlp.up_proj.weight"
        if fault == "layer in the files":
            tensors = (base[key] if key == name else tensor for key, tensor in zip(layout, tensors, strict=True))
        return write(path, layout, tensors)

    monkeypatch.setattr(Target, "merged", wrong)
    monkeypatch.setattr(merge_module, "write_shard", write_wrong)
    done = merge_adapter(tmp_path / "adapter", tmp_path / "merged", ids=IDS)
    assert "fail" in [promise.status for promise in done.promises], done.promises
    assert done.promises[0].status == "fail"  # before rounding: to the last digits, not by a tolerance
