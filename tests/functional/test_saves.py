"""E6 through a run: the export is what was trained, plain libraries load it, and an altered file is found out."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from eft import run
from eft.core.errors import CheckpointError
from eft.models.export import check_saved_tensors
from eft.runtime.checkpoint import CheckpointStore, verify_manifest
from tests.functional.conftest import MakeConfig, MakeTrainer

PROBE = torch.tensor([[5, 17, 60, 33, 9, 8, 71, 3, 100, 42]])


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=PROBE, use_cache=False).logits.float()


def assert_same_weights(loaded: nn.Module, live: nn.Module) -> None:
    """Bit-equal after the live ones are cast to the dtype on disk."""
    ours, theirs = live.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name].to(value.dtype), value), name


def assert_changed(model: nn.Module, base: Path, names: set[str]) -> None:
    """Exactly the parameters `names` differ from the base's."""
    before = AutoModelForCausalLM.from_pretrained(base).state_dict()
    after = model.state_dict()
    assert {name for name, value in before.items() if not torch.equal(after[name], value)} == names


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_full_fine_tuning(family: str, make_config: MakeConfig, tmp_path: Path) -> None:
    model, _, _ = run.train(make_config(family, max_steps=3))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_same_weights(loaded, model)
    ours, theirs = logits(model), logits(loaded)
    assert (ours - theirs).abs().max() <= 1e-5 * ours.abs().max()
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == "<|im_end|>"


def test_a_fresh_process_agrees(make_config: MakeConfig, tmp_path: Path) -> None:
    """`verify_saves: ends`, with an adapter, in other processes: before the first step, COMPLETE and VERIFIED."""
    keys = {"adapter": "lora", "lora_target_linear": True, "lora_dropout": 0.1}
    run.train(make_config(max_steps=3, verify_saves="ends", **keys))
    promises = json.loads((tmp_path / "out" / "promises.json").read_text())
    assert [promise["status"] for promise in promises if promise["promise"] == "E6"] == ["pass"] * 3


def test_lora(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(max_steps=3, adapter="lora", lora_target_modules=["q_proj", "v_proj"], lora_r=2)
    model, _, _ = run.train(config)
    assert isinstance(model, PeftModel)
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_same_weights(loaded, model)
    ours, theirs, base = logits(model), logits(loaded), logits(AutoModelForCausalLM.from_pretrained(config.base_model))
    assert (ours - theirs).abs().max() <= 1e-5 * ours.abs().max()
    assert (ours - base).abs().max() > 1e-3 * base.abs().max()
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_bf16_base(make_config: MakeConfig, model_folder: Any, tmp_path: Path) -> None:
    """The base is in bf16: trained in fp32, exported in bf16 again, and every bit of it is the live model's."""
    folder = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(model_folder("llama"), dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_folder("llama")).save_pretrained(folder)
    model, _, _ = run.train(make_config(base_model=str(folder), max_steps=3))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16
    assert_same_weights(loaded, model)
    assert_changed(loaded, folder, set(loaded.state_dict()))


def test_save_dtype(make_config: MakeConfig, tmp_path: Path) -> None:
    model, _, _ = run.train(make_config(max_steps=1, save_dtype="bfloat16"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16
    assert_same_weights(loaded, model)


def test_train_top_layers(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(max_steps=3, train_top_layers=1)
    model, _, _ = run.train(config)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_same_weights(loaded, model)
    trained = {name for name in loaded.state_dict() if "layers.1." in name or name == "model.norm.weight"}
    assert_changed(loaded, Path(config.base_model), trained)


def test_unfrozen_parameters(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(max_steps=3, unfrozen_parameters=["lm_head", r"model\.layers\.0\.mlp\.up"])
    model, _, _ = run.train(config)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_same_weights(loaded, model)
    assert_changed(loaded, Path(config.base_model), {"lm_head.weight", "model.layers.0.mlp.up_proj.weight"})


def test_an_altered_file_is_found_out(make_config: MakeConfig, tmp_path: Path) -> None:
    """One bit in the export, one bit in a checkpoint; the newest whole checkpoint is then an older one."""
    model, _, _ = run.train(make_config(max_steps=4, save_steps=2))
    out = tmp_path / "out"
    assert check_saved_tensors(out, model, torch.float32).status == "pass"
    flip(out / "model.safetensors")
    assert check_saved_tensors(out, model, torch.float32).status == "fail"

    verify_manifest(out / "checkpoint-4")
    flip(out / "checkpoint-4" / "optimizer.safetensors")
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors.*altered"):
        verify_manifest(out / "checkpoint-4")
    found = CheckpointStore(out, save_total_limit=None).newest_complete()
    assert found.path == out / "checkpoint-2"
    assert [path.name for path, _ in found.skipped] == ["checkpoint-4"]


def flip(path: Path) -> None:
    """Change the last byte."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def test_a_checkpoint_is_complete(make_config: MakeConfig, tmp_path: Path) -> None:
    run.train(make_config(max_steps=2, save_steps=1))
    manifest = verify_manifest(tmp_path / "out" / "checkpoint-1")
    assert manifest["step"] == 1
    assert manifest["resumable"] is True
    files = {path.name for path in (tmp_path / "out" / "checkpoint-1").iterdir()}
    assert files >= {
        "model.safetensors", "config.json", "tokenizer.json", "optimizer.safetensors", "optimizer.json",
        "progress.json", "scheduler.json", "trainer_state.json", "rng_0.json", "rng_0.safetensors", "manifest.json",
    }  # fmt: skip
    assert set(manifest["files"]) == files - {"manifest.json"}
    assert not [name for name in files if name.endswith((".pt", ".bin", ".pth", ".pkl"))], "no pickles"


def test_a_save_that_fails_beside_the_training_ends_it_at_the_next_step(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(max_steps=50, save_steps=1)

    class Refusing:
        def save_pretrained(self, folder: Path) -> None:
            raise PermissionError(errno.EACCES, "refused")

    trainer.processing_class = Refusing()
    with pytest.raises(CheckpointError, match="checkpoint-1: not written, no permission"):
        trainer.train()
    assert trainer.state.global_step <= 3


def test_saving_beside_the_training_stores_the_same_bytes(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    for name, beside in (("beside", True), ("at_once", False)):
        keys = {"max_steps": 4, "save_steps": 1, "save_asynchronously": beside, "save_total_limit": 0}
        make_trainer(output_dir=str(tmp_path / name), **keys).train()
    for step in range(1, 5):
        for file in ("model.safetensors", "optimizer.safetensors", "rng_0.json", "scheduler.json"):
            one, other = (tmp_path / name / f"checkpoint-{step}" / file for name in ("beside", "at_once"))
            assert one.read_bytes() == other.read_bytes(), f"{file} of step {step}"
