"""The cost of attention is known before the weights are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from eft.config.model import ModelConfig
from eft.core.errors import ModelError
from eft.models.cost import attention_cost_ratio
from eft.models.load import describe_model
from tests.tiny_models import tiny_model


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt_neox"])
def test_it_is_that_of_the_loaded_model_without_its_weights(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    for weights in tmp_path.glob("*.safetensors"):
        weights.unlink()
    before = torch.get_rng_state()
    found = attention_cost_ratio(ModelConfig(base_model=str(tmp_path)))
    assert found == describe_model(model)["attention_cost_ratio"] > 0
    assert torch.equal(torch.get_rng_state(), before)


def test_what_is_no_causal_model_is_said(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has no config"):
        attention_cost_ratio(ModelConfig(base_model=str(tmp_path)))
