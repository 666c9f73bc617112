"""Every trained parameter in exactly one group, with the decay and the learning rate that the keys say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

from eft.config.optim import OptimConfig
from eft.core.errors import EftError, ModelError
from eft.optim.optimizers import build_optimizer
from eft.optim.param_groups import decayed_names, group_lines, param_groups
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
    assert group_lines(param_groups(nn.Linear(1000, 2), CFG)) == [
        "matrices: 1 tensors, 2,000 parameters, learning rate 0.001, weight decay 0.1",
        "norms, biases, embeddings: 1 tensors, 2 parameters, learning rate 0.001, weight decay 0",
    ]


# Learning rates ----------------------------------------------------------------------------------------------------

LORA = LoraConfig(r=2, target_modules=["q_proj", "down_proj", "embed_tokens"], modules_to_save=["lm_head"])


def adapted() -> nn.Module:
    wrapped: nn.Module = get_peft_model(tiny_model("llama"), LORA)
    return wrapped


def rates(model: nn.Module, **keys: Any) -> dict[str, float]:
    """Name to learning rate, after a look that groups are disjoint and complete."""
    cfg = OptimConfig(learning_rate=1.0, weight_decay=0.1, **keys)
    names = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
    groups = param_groups(model, cfg)
    found = [(names[id(parameter)], group["lr"]) for group in groups for parameter in group["params"]]
    assert len(found) == len(names) == len(dict(found))
    decayed = decayed_names(model)
    for group in groups:
        assert {names[id(parameter)] in decayed for parameter in group["params"]} == {group["weight_decay"] == 0.1}
    assert groups[0]["lr"] == 1.0, "the rate that is logged is the first group's"
    assert len({group["name"] for group in groups}) == len(groups)
    return dict(found)


PLAIN_RATES: dict[str, Any] = {
    "embedding_lr": st.one_of(st.none(), st.floats(0.1, 0.9)),
    "embedding_lr_scale": st.one_of(st.none(), st.floats(0.1, 0.9)),
    "layerwise_lr_decay": st.one_of(st.none(), st.floats(0.5, 0.99)),
    "lr_groups": st.one_of(
        st.none(),
        st.lists(st.sampled_from(["q_proj", "k_proj", "mlp", "layernorm"]), unique=True, min_size=1).map(
            lambda parts: [{"name": part, "modules": [part], "lr": 0.25} for part in parts]
        ),
    ),
}


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(keys=st.fixed_dictionaries({}, optional=PLAIN_RATES))
def test_any_combination_puts_every_parameter_into_one_group(keys: dict[str, Any]) -> None:
    if keys.get("embedding_lr") is not None:
        keys.pop("embedding_lr_scale", None)
    model = tiny_model("llama")
    found = rates(model, **keys)
    parts = [entry["name"] for entry in keys.get("lr_groups") or []]
    layers = model.config.num_hidden_layers
    for name, rate in found.items():
        depth = int(name.split("layers.")[1].split(".")[0]) if "layers." in name else None
        is_embedding = "embed" in name or "lm_head" in name
        decay = keys.get("layerwise_lr_decay") or 1.0
        above = layers - 1 - depth if depth is not None else layers if "embed" in name else 0
        expected = decay**above * (keys.get("embedding_lr_scale") or 1.0 if is_embedding else 1.0)
        if is_embedding and keys.get("embedding_lr"):
            expected = keys["embedding_lr"]
        if any(part in name for part in parts):
            expected = 0.25
        assert rate == pytest.approx(expected), name


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora_plus_scales_the_second_factors_only() -> None:
    found = rates(adapted(), loraplus_lr_ratio=16.0, embedding_lr_scale=0.5)
    for name, rate in found.items():
        expected = 1.0
        if "lora_embedding" in name:
            expected = 1e-6
        elif "lora_B" in name:
            expected = 16.0
        elif "lm_head" in name:
            expected = 0.5
        assert rate == expected, name
    assert {1.0, 1e-6, 16.0, 0.5} == set(found.values())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"lr_groups": [{"name": "q", "modules": ["q_prj"], "lr": 0.1}]},
            r"'q_prj' of 'q' is in the name of no.*q_pr",
        ),
        (
            {"lr_groups": [{"name": n, "modules": [m], "lr": 0.1} for n, m in (("a", "q_proj"), ("b", "attn.q"))]},
            r"q_proj.weight is in 'a' and in 'b'",
        ),
        ({"lr_groups": [{"name": "all", "modules": ["."], "lr": 0.1}]}, r"learning_rate: no trained parameter uses it"),
        ({"loraplus_lr_ratio": 4.0}, r"loraplus_lr_ratio: no LoRA factor is trained"),
    ],
)
def test_what_finds_nothing_is_an_error(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(EftError, match=message):
        param_groups(tiny_model("llama"), OptimConfig(learning_rate=1.0, **keys))


def test_frozen_embeddings_have_no_rate() -> None:
    model = tiny_model("llama")
    model.get_input_embeddings().weight.requires_grad_(False)
    model.lm_head.weight.requires_grad_(False)
    with pytest.raises(ModelError, match="embedding_lr: no embedding or output head is trained"):
        param_groups(model, OptimConfig(learning_rate=1.0, embedding_lr=0.1))


# Muon ---------------------------------------------------------------------------------------------------------------


def muon_names(model: nn.Module, **options: Any) -> set[str]:
    cfg = OptimConfig(learning_rate=1e-3, optimizer="muon", optim_args=options or None)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = build_optimizer(cfg, model).param_groups
    assert {group["name"].rpartition(" · ")[2] for group in groups} <= {"muon", "adamw"}
    return {names[id(p)] for group in groups if group["name"].endswith("muon") for p in group["params"]}


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_muon_is_for_hidden_matrices(family: str) -> None:
    model = tiny_model(family)
    expected = {
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim == 2 and not any(mark in name for mark in ("embed", "lm_head", "norm"))
    }
    assert muon_names(model) == expected != set()
    assert muon_names(model, head=True) == expected | {"lm_head.weight"}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_muon_leaves_adapters_alone_unless_asked() -> None:
    with pytest.raises(ModelError, match="muon has no hidden matrix to update.*adapter_factors"):
        muon_names(adapted())
    assert all("lora_A" in name or "lora_B" in name for name in muon_names(adapted(), adapter_factors=True))


def test_muons_rules_are_torchs_own() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Embedding(4, 6))
    cfg = OptimConfig(learning_rate=0.01, optimizer="muon", weight_decay=0.1)
    optimizer = build_optimizer(cfg, model)
    matrix, bias, rows = (nn.Parameter(parameter.detach().clone()) for parameter in model.parameters())
    references: list[torch.optim.Optimizer] = [
        torch.optim.Muon([matrix], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([bias, rows], lr=0.01, weight_decay=0.0),
    ]
    for _ in range(3):
        for ours, theirs in zip(model.parameters(), (matrix, bias, rows), strict=True):
            ours.grad = torch.randn_like(ours)
            theirs.grad = ours.grad.clone()
        for rule in (optimizer, *references):
            rule.step()
    for ours, theirs in zip(model.parameters(), (matrix, bias, rows), strict=True):
        assert torch.equal(ours, theirs)
