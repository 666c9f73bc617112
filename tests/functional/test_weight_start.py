"""PiSSA and OLoRA through a run: resumed bit for bit, and saved exactly enough over a bf16 base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from eft import run
from tests.functional.conftest import MakeConfig

KEYS: dict[str, Any] = {"adapter": "lora", "lora_r": 2, "lora_target_linear": True}


@pytest.mark.parametrize("start", ["pissa_niter_2", "olora"])
def test_a_resumed_run_is_bit_equal(start: str, make_config: MakeConfig, tmp_path: Path) -> None:
    keys = {**KEYS, "peft_init_lora_weights": start, "max_steps": 4, "save_steps": 2}
    straight, _, _ = run.train(make_config(output_dir=str(tmp_path / "straight"), **keys))
    checkpoint = str(tmp_path / "straight" / "checkpoint-2")
    resumed, _, _ = run.train(
        make_config(output_dir=str(tmp_path / "resumed"), resume_from_checkpoint=checkpoint, **keys)
    )
    for name, tensor in straight.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_the_adapter_over_a_bf16_base_is_fp32(make_config: MakeConfig, model_folder: Any, tmp_path: Path) -> None:
    """Rounded to bf16, the two products would no longer differ by what was trained."""
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(model_folder("llama"), dtype=torch.bfloat16).save_pretrained(base)
    AutoTokenizer.from_pretrained(model_folder("llama")).save_pretrained(base)
    keys = {**KEYS, "peft_init_lora_weights": "pissa", "max_steps": 2, "base_model": str(base), "bf16": True}
    model, _, _ = run.train(make_config(**keys))
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    live = model.state_dict()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(live[name], tensor), name
