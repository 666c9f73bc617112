"""Adapters, freezing and dtypes: what is trained, what it starts from, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from eft.config.model import AdapterConfig, FreezingConfig
from eft.core.errors import ConfigError, ModelError
from eft.models.adapters import (
    apply_adapter,
    apply_freezing,
    decoder_layers,
    enable_gradient_flow,
    final_norms,
    set_dtypes,
    trained_base_parameters,
)
from eft.models.load import base_dtype, describe_model
from tests.tiny_models import HIDDEN_SIZE, VOCAB_SIZE, tiny_model

# peft reads a property that transformers has renamed; theirs to mend.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

IDS = torch.arange(12)[None] + 5


def _lora(**keys: Any) -> AdapterConfig:
    return AdapterConfig(**{"adapter": "lora", "lora_target_modules": ["q_proj", "v_proj"], **keys})


def _trained(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_no_adapter_returns_the_model() -> None:
    model = tiny_model("llama")
    assert apply_adapter(model, AdapterConfig(), seed=1) is model


@pytest.mark.parametrize("keys", [{}, {"peft_use_dora": True}, {"peft_use_rslora": True, "lora_r": 4}])
def test_lora_starts_as_the_base_and_is_seeded(keys: dict[str, Any]) -> None:
    expected = tiny_model("llama")(IDS).logits
    torch.manual_seed(9)
    before = torch.get_rng_state()
    adapted = [apply_adapter(tiny_model("llama"), _lora(**keys), seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(adapted[0](IDS).logits, expected, atol=1e-5, rtol=1e-5)
    first, same, other = (_trained(model) for model in adapted)
    assert all("lora_" in name for name in first)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_lora_keys_reach_peft() -> None:
    model = apply_adapter(
        tiny_model("llama"),
        _lora(lora_r=3, lora_alpha=12, lora_dropout=0.25, peft_use_rslora=True, peft_use_dora=True),
        seed=1,
    )
    assert isinstance(model, PeftModel)
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    assert layer.r["default"] == 3
    assert layer.scaling["default"] == pytest.approx(12 / 3**0.5)
    assert layer.lora_dropout["default"].p == 0.25
    assert layer.use_dora["default"]


@pytest.mark.parametrize(
    ("keys", "modules"),
    [
        ({"lora_target_modules": None, "lora_target_linear": True}, 7),
        ({"lora_target_modules": "all-linear"}, 7),
        ({"lora_target_modules": ["q_proj"], "lora_target_linear": True}, 7),
        ({"lora_target_modules": r".*layers\.1\.self_attn\.[qv]_proj"}, 1),
        ({"lora_target_modules": ["q_proj"]}, 1),
    ],
)
def test_targets(keys: dict[str, Any], modules: int) -> None:
    model = apply_adapter(tiny_model("llama"), _lora(**keys), seed=1)
    layers = [name for name in _trained(model) if "lora_A" in name]
    assert len(layers) == 2 * modules
    assert not any("lm_head" in name for name in layers)


@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        ({"lora_target_modules": None}, ConfigError, "lora_target_modules.*or lora_target_linear: true"),
        ({"lora_target_modules": ["q_proj", "v_prj"]}, ModelError, "'v_prj' matches no module; did you mean 'v_proj'"),
        ({"lora_target_modules": "q_proj"}, ModelError, r"so write a list: \[q_proj\]"),
        ({"lora_target_modules": r".*\.q_prj"}, ModelError, "matches no module; did you mean 'q_proj'"),
        ({"lora_target_modules": "(q"}, ConfigError, "no regular expression"),
        ({"lora_target_modules": "q_.*", "lora_target_linear": True}, ConfigError, "cannot be added to a regular"),
        (
            {"lora_modules_to_save": ["embed_token"]},
            ModelError,
            "'embed_token' .*did you mean 'embed_tokens'",
        ),
        ({"lora_target_modules": ["self_attn"]}, ModelError, "Target module LlamaAttention cannot take a LoRA"),
    ],
)
def test_bad_targets(keys: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        apply_adapter(tiny_model("llama"), _lora(**keys), seed=1)


@pytest.mark.parametrize("saved", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_a_tied_head_stays_tied_when_the_embedding_is_trained(saved: list[str]) -> None:
    model = apply_adapter(tiny_model("llama", tie_word_embeddings=True), _lora(lora_modules_to_save=saved), seed=1)
    set_dtypes(model)
    whole = {name: weight for name, weight in _trained(model).items() if "lora_" not in name}
    assert [tuple(weight.shape) for weight in whole.values()] == [(VOCAB_SIZE, HIDDEN_SIZE)]
    plain = tiny_model("llama", tie_word_embeddings=True)
    with torch.no_grad():
        next(iter(whole.values())).mul_(2.0)
        plain.lm_head.weight.mul_(2.0)
    torch.testing.assert_close(model(IDS).logits, plain(IDS).logits)


def test_continuing_a_trained_adapter(tmp_path: Path) -> None:
    first = apply_adapter(tiny_model("llama"), _lora(lora_r=4), seed=1)
    with torch.no_grad():
        for weight in _trained(first).values():
            weight.add_(0.05)
    first.save_pretrained(tmp_path)
    cfg = AdapterConfig(adapter="lora", lora_model_dir=str(tmp_path), lora_dropout=0.5)
    second = apply_adapter(tiny_model("llama"), cfg, seed=2)
    trained = _trained(second)
    assert trained.keys() == _trained(first).keys()
    assert torch.equal(second.eval()(IDS).logits, first.eval()(IDS).logits)
    assert second.peft_config["default"].lora_dropout == 0.5
    assert not second.peft_config["default"].inference_mode


def test_continuing_refuses_what_the_adapter_already_decided(tmp_path: Path) -> None:
    apply_adapter(tiny_model("llama"), _lora(lora_r=4), seed=1).save_pretrained(tmp_path / "adapter")
    folder = str(tmp_path / "adapter")
    with pytest.raises(ConfigError, match=r"lora_r: 16, but the adapter in .* was trained with 4"):
        apply_adapter(tiny_model("llama"), AdapterConfig(adapter="lora", lora_model_dir=folder, lora_r=16), seed=1)
    cfg = AdapterConfig(adapter="lora", lora_model_dir=folder, lora_target_linear=True)
    with pytest.raises(ConfigError, match=r"lora_target_linear: the adapter in .* brings its own modules"):
        apply_adapter(tiny_model("llama"), cfg, seed=1)
    wider = tiny_model("llama", hidden_size=64)
    with pytest.raises(ModelError, match="does not fit"):
        apply_adapter(wider, AdapterConfig(adapter="lora", lora_model_dir=folder), seed=1)
    cfg = AdapterConfig(adapter="lora", lora_model_dir=str(tmp_path / "adaptr"))
    with pytest.raises(ModelError, match=r"no folder .*/adaptr; did you mean .*/adapter"):
        apply_adapter(tiny_model("llama"), cfg, seed=1)
    with pytest.raises(ModelError, match=r"has no adapter_config\.json"):
        apply_adapter(tiny_model("llama"), AdapterConfig(adapter="lora", lora_model_dir=str(tmp_path)), seed=1)


@pytest.mark.parametrize(
    ("family", "layers", "norms"),
    [
        ("llama", "model.layers", ["model.norm"]),
        ("gpt_neox", "gpt_neox.layers", ["gpt_neox.final_layer_norm"]),
        ("bloom", "transformer.h", ["transformer.ln_f"]),
        ("falcon", "transformer.h", ["transformer.ln_f"]),
        ("qwen3_moe", "model.layers", ["model.norm"]),
    ],
)
def test_layers_and_final_norm_are_found_by_structure(family: str, layers: str, norms: list[str]) -> None:
    model = tiny_model(family)
    assert decoder_layers(model)[0] == layers
    assert final_norms(model) == norms


def test_opt_registers_its_final_norm_first() -> None:
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32, word_embed_proj_dim=16
    )
    assert final_norms(OPTForCausalLM(config)) == ["model.decoder.final_layer_norm"]


def test_train_top_layers() -> None:
    model = tiny_model("llama")
    apply_freezing(model, FreezingConfig(train_top_layers=1))
    names = set(_trained(model))
    assert names == {name for name, _ in model.named_parameters() if "layers.1." in name} | {"model.norm.weight"}


def test_unfrozen_parameters_join_top_layers_and_reach_a_tied_head_by_either_name() -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    cfg = FreezingConfig(unfrozen_parameters=["^lm_head.weight$"], train_top_layers=1)
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= trained_base_parameters(model, cfg)
    apply_freezing(model, cfg)
    assert model.lm_head.weight.requires_grad
    assert not model.model.layers[0].mlp.up_proj.weight.requires_grad
    assert model.model.layers[1].mlp.up_proj.weight.requires_grad


def test_no_freezing_key_changes_nothing() -> None:
    model = tiny_model("llama")
    model.lm_head.weight.requires_grad_(False)
    apply_freezing(model, FreezingConfig())
    assert sum(not parameter.requires_grad for parameter in model.parameters()) == 1


@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        ({"unfrozen_parameters": ["model.layer.1"]}, ModelError, "matches no parameter; did you mean 'layers'"),
        ({"unfrozen_parameters": ["(x"]}, ConfigError, "no regular expression"),
        ({"unfrozen_parameters": ["^model.embed_tokens.weight$[:100]"]}, ConfigError, "range of rows"),
        ({"train_top_layers": 3}, ModelError, r"3, but the model has 2 layers \(model.layers\)"),
    ],
)
def test_bad_freezing(keys: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        apply_freezing(tiny_model("llama"), FreezingConfig(**keys))


def test_freezing_beside_an_adapter_is_refused() -> None:
    model = apply_adapter(tiny_model("llama"), _lora(), seed=1)
    with pytest.raises(ConfigError, match="not with an adapter"):
        apply_freezing(model, FreezingConfig(train_top_layers=1))


def test_dtypes_of_a_partly_frozen_model() -> None:
    model = tiny_model("llama", tie_word_embeddings=True).to(torch.bfloat16)
    apply_freezing(model, FreezingConfig(unfrozen_parameters=["model.embed_tokens", "model.norm"]))
    set_dtypes(model)
    assert model.model.embed_tokens.weight.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in _trained(model).values()} == {torch.float32}
    assert len(_trained(model)) == 2


@pytest.mark.parametrize("fp32_gradients", [False, True])
def test_dtypes_of_pure_bf16(fp32_gradients: bool) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    apply_freezing(model, FreezingConfig(unfrozen_parameters=["model.embed_tokens", "model.norm"]))
    set_dtypes(model, pure_bf16=True, fp32_gradients=fp32_gradients)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert base_dtype(model) == torch.bfloat16, "it is saved as it is"
    model(input_ids=torch.tensor([[1, 2, 3]])).logits.sum().backward()
    dtypes = {parameter.grad.dtype for parameter in _trained(model).values() if parameter.grad is not None}
    assert dtypes == {torch.float32 if fp32_gradients else torch.bfloat16}


def test_what_a_family_keeps_in_fp32_stays() -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.model.norm.float()
    set_dtypes(model, pure_bf16=True)
    assert model.model.norm.weight.dtype == torch.float32
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16


def test_an_adapted_model_is_described_by_its_base() -> None:
    model = apply_adapter(tiny_model("llama"), _lora(lora_modules_to_save=["lm_head"]), seed=1)
    facts = describe_model(model)
    assert (facts["architecture"], facts["model_type"], facts["layers"]) == ("LlamaForCausalLM", "llama", 2)
    assert facts["trainable_parameters"] == sum(parameter.numel() for parameter in _trained(model).values())
    assert facts["parameters"] == sum(parameter.numel() for parameter in model.parameters())


def test_dtypes_of_an_adapter() -> None:
    model = apply_adapter(tiny_model("llama").to(torch.bfloat16), _lora(lora_modules_to_save=["lm_head"]), seed=1)
    set_dtypes(model)
    assert {parameter.dtype for parameter in _trained(model).values()} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradients_flow_through_checkpointing_over_frozen_embeddings(use_reentrant: bool) -> None:
    model = apply_adapter(tiny_model("llama"), _lora(), seed=1)
    assert enable_gradient_flow(model, use_reentrant=use_reentrant) is use_reentrant
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.train()(IDS).logits.sum().backward()
    assert all(weight.grad is not None for weight in _trained(model).values())


def test_gradient_flow_is_left_alone_when_embeddings_train() -> None:
    assert not enable_gradient_flow(tiny_model("llama"), use_reentrant=True)


def test_patterns_layers_and_exclusions_reach_peft() -> None:
    keys: dict[str, Any] = {
        "lora_target_modules": ["q_proj", "up_proj", "down_proj"],
        "lora_exclude_modules": ["down_proj"],
        "lora_rank_pattern": {"q_proj": 3},
        "lora_alpha_pattern": {"layers.1.mlp.up_proj": 5},
        "peft_layers_to_transform": [1],
        "lora_r": 2,
    }
    model = apply_adapter(tiny_model("llama"), _lora(**keys), seed=1)
    ranks = {name.split(".lora_A")[0]: w.shape[0] for name, w in _trained(model).items() if "lora_A" in name}
    prefix = "base_model.model.model.layers.1."
    assert ranks == {f"{prefix}self_attn.q_proj": 3, f"{prefix}mlp.up_proj": 2}
    assert model.get_base_model().model.layers[1].mlp.up_proj.scaling["default"] == 2.5


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"lora_exclude_modules": ["q_prj"]}, "lora_exclude_modules: 'q_prj' matches no module; did you mean 'q_proj'"),
        ({"lora_rank_pattern": {"up_prj": 3}}, "lora_rank_pattern: 'up_prj' matches no module; did you mean 'up_proj'"),
        ({"lora_target_parameters": ["mlp.expert.up"]}, "lora_target_parameters: 'mlp.expert.up' ends no parameter"),
        ({"peft_layers_to_transform": 2}, r"peft_layers_to_transform: 2, but the model has layers 0 to 1"),
        ({"peft_trainable_token_indices": [VOCAB_SIZE]}, "but the embedding has rows 0 to 127"),
        ({"peft_trainable_token_indices": "new"}, "`new`, but the config adds no tokens"),
        ({"peft": {"lora_biass": True}}, "LoraConfig has no option 'lora_biass'; did you mean 'lora_bias'"),
        ({"peft": {"use_dora": True}}, "`use_dora` has a key of its own; write `peft_use_dora`"),
        ({"adapter": "peft", "peft": {"peft_type": "IA4"}}, "'IA4' is no peft_type; did you mean IA3"),
        ({"adapter": "peft", "peft": {"peft_type": "LORA"}}, "write LoRA as `adapter: lora`"),
        ({"adapter": "peft", "peft": {"peft_type": "PROMPT_TUNING"}}, "PROMPT_TUNING puts tokens of its own before"),
    ],
)
def test_wrong_names_are_named(keys: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, ModelError), match=message):
        apply_adapter(tiny_model("llama"), _lora(**keys), seed=1)


@pytest.mark.parametrize(
    "options",
    [
        {"peft_type": "IA3", "target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
        {"peft_type": "loha", "r": 2},
        {"peft_type": "VERA", "target_modules": ["q_proj"]},
        {"peft_type": "OFT", "target_modules": ["q_proj"], "oft_block_size": 4, "r": 0},
    ],
)
def test_other_methods_of_peft(options: dict[str, Any]) -> None:
    cfg = AdapterConfig(adapter="peft", peft=options, lora_target_linear="target_modules" not in options)
    model = apply_adapter(tiny_model("llama"), cfg, seed=1)
    assert str(model.peft_config["default"].peft_type).rpartition(".")[2] == options["peft_type"].upper()
    assert _trained(model)
    model(IDS, labels=IDS).loss.backward()
    assert all(weight.grad is not None for weight in _trained(model).values())


def test_frozen_experts_are_mentioned(caplog: pytest.LogCaptureFixture) -> None:
    """`all-linear` adapts fused experts in the families that peft knows; in others it says that it does not."""
    linear = _lora(lora_target_modules=None, lora_target_linear=True)
    model = apply_adapter(tiny_model("qwen3_moe"), linear, seed=1)
    experts = [name for name in _trained(model) if ".experts." in name]
    assert bool(experts) != ("the fused experts" in caplog.text)
    caplog.clear()
    apply_adapter(tiny_model("gpt_oss"), linear, seed=1)
    assert "lora_target_parameters: [mlp.experts.down_proj, mlp.experts.gate_up_proj]" in caplog.text


@pytest.mark.parametrize("kind", ["modules_to_save", "top layer", "lora", "whole"])
def test_half_of_the_base_in_fp32_needs_autocast(kind: str) -> None:
    model = tiny_model("llama").bfloat16()
    if kind == "top layer":
        apply_freezing(model, FreezingConfig(train_top_layers=1))
    elif kind != "whole":
        model = apply_adapter(model, _lora(lora_modules_to_save=["lm_head"] if kind == "modules_to_save" else None), 1)
    if kind in ("modules_to_save", "top layer"):
        with pytest.raises(ConfigError, match=r"bf16: false: the frozen weights of the base are bfloat16 and \S+"):
            set_dtypes(model, autocast=False)
        set_dtypes(model)
        with pytest.raises(RuntimeError, match="dtype"):  # what the message stands for
            model(IDS)
    else:
        set_dtypes(model, autocast=False)
        assert model(IDS).logits.isfinite().all()
