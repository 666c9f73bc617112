"""Which parameters decay."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from eft.config.optim import OptimConfig
from eft.optim.param_groups import decayed_names, group_table, param_groups
from tests.tiny_models import FAMILIES, tiny_model

CFG = OptimConfig(learning_rate=1e-3, weight_decay=0.1)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_neox", "gpt_oss"])
def test_every_trainable_parameter_is_in_exactly_one_group(family: str) -> None:
    assert family in FAMILIES
    model = tiny_model(family)
    next(model.parameters()).requires_grad_(False)
    groups = param_groups(model, CFG)
    members = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(members) == len(set(members))
    assert set(members) == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed = {names[id(parameter)] for parameter in groups[0]["params"]}
    assert decayed == decayed_names(model)
    for name in decayed:
        assert "norm" not in name
        assert not name.endswith("bias")
        assert "embed" not in name
    assert any("mlp" in name for name in decayed)


def test_marked_and_tied_parameters_do_not_decay() -> None:
    class PerHeadNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, 4))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.state = nn.Parameter(torch.zeros(3, 4))
            self.expert_bias = nn.Parameter(torch.zeros(3, 4))
            self.embed = nn.Embedding(5, 4)
            self.head = nn.Linear(4, 5, bias=False)
            self.head.weight = self.embed.weight
            self.per_head = PerHeadNorm()
            self.plain = nn.Linear(4, 4)

    model = Model()
    model.state._no_weight_decay = True  # type: ignore[attr-defined]
    assert decayed_names(model) == {"plain.weight"}


# peft 0.21 reads a property that transformers 5.23 renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters() -> None:
    model = tiny_model("llama")
    adapter = LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"], use_dora=False)
    wrapped = get_peft_model(model, adapter)
    names = decayed_names(wrapped)
    assert any("q_proj.lora_A" in name for name in names)
    assert any("lm_head" in name for name in names)
    assert not any("lora_embedding" in name for name in names)


def test_groups_do_not_depend_on_the_value_of_the_decay() -> None:
    model = tiny_model("llama")
    with_decay, without = param_groups(model, CFG), param_groups(model, OptimConfig(learning_rate=1e-3))
    assert [len(group["params"]) for group in with_decay] == [len(group["params"]) for group in without]


def test_table() -> None:
    rows = group_table(param_groups(nn.Linear(1000, 2), CFG))
    assert rows[1:] == [
        ["matrices", "1", "2,000", "0.001", "0.1"],
        ["norms, biases, embeddings", "1", "2", "0.001", "0"],
    ]
