"""Loading: plain folders in their own dtype, GGUF as a plain model, and one clear message for everything else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration
from transformers import logging as transformers_logging
from transformers.convert_slow_tokenizer import bytes_to_unicode

from eft.config.model import ModelConfig
from eft.core.errors import ModelError
from eft.models.load import base_dtype, describe_model, load_model
from tests.tiny_models import HIDDEN_SIZE, NUM_LAYERS, VOCAB_SIZE, tiny_model

transformers_logging.disable_progress_bar()


def _load(folder: Path, **keys: Any) -> Any:
    return load_model(ModelConfig(base_model=str(folder), **keys), compute_dtype=torch.bfloat16, seed=1)


def _equal(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bf16 Llama folder."""
    path = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny_model("llama").to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [True, False])
def test_a_folder_is_loaded_as_it_was_saved(tmp_path: Path, dtype: torch.dtype, tied: bool) -> None:
    saved = tiny_model("llama", tie_word_embeddings=tied).to(dtype)
    saved.save_pretrained(tmp_path)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    loaded = _load(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert base_dtype(loaded) == dtype
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), saved.state_dict().values(), strict=True)
    )
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert loaded.config.name_or_path == loaded.name_or_path == str(tmp_path)


def test_float64_comes_in_the_compute_dtype(tmp_path: Path) -> None:
    tiny_model("llama").double().save_pretrained(tmp_path)
    assert {parameter.dtype for parameter in _load(tmp_path).parameters()} == {torch.bfloat16}


def test_attention_other_than_ours_is_passed_on(folder: Path) -> None:
    assert _load(folder, attn_implementation="eager").config._attn_implementation == "eager"


def test_missing_folder_names_the_nearest(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"no folder .*tiny-lama; did you mean .*/tiny-llama\?"):
        _load(folder.parent / "tiny-lama")


def test_a_file_is_no_folder(folder: Path) -> None:
    with pytest.raises(ModelError, match="is a file; expected the folder"):
        _load(folder / "config.json")


def test_unreachable_hub_id(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise OSError("We couldn't connect to the hub\nmore\nlines")

    monkeypatch.setattr("transformers.configuration_utils.PreTrainedConfig.get_config_dict", offline)
    with pytest.raises(ModelError, match=r"some-org/no-model is no folder here.*couldn't connect to the hub"):
        load_model(ModelConfig(base_model="some-org/no-model"), compute_dtype=torch.bfloat16, seed=1)


@pytest.mark.parametrize(
    ("build", "what"),
    [
        (
            lambda: T5ForConditionalGeneration(T5Config(d_model=8, d_ff=8, d_kv=4, num_heads=2, num_layers=1)),
            "T5ForCond",
        ),
        (
            lambda: BertForMaskedLM(
                BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
            ),
            "BertForMaskedLM",
        ),
    ],
)
def test_what_is_no_causal_model_is_named(tmp_path: Path, build: Any, what: str) -> None:
    build().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=rf"is a {what}.*not a causal language model"):
        _load(tmp_path)


def _edited(folder: Path, target: Path, **changes: Any) -> Path:
    values = json.loads((folder / "config.json").read_text())
    target.mkdir()
    (target / "config.json").write_text(json.dumps({**values, **changes}))
    (target / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    return target


def test_own_code_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    auto_map = {"AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}
    edited = _edited(folder, tmp_path / "m", model_type="mine", auto_map=auto_map)
    with pytest.raises(ModelError, match=r"needs its own code \(modeling_mine.py\).*trust_remote_code: true"):
        _load(edited)


def test_unknown_model_type_names_the_nearest(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no model_type 'lama'; nearest known: llama"):
        _load(_edited(folder, tmp_path / "m", model_type="lama"))


def test_quantised_checkpoints_are_refused_by_name(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"is quantised \(gptq\)"):
        _load(_edited(folder, tmp_path / "m", quantization_config={"quant_method": "gptq", "bits": 4}))


def test_missing_weights_are_an_error(folder: Path, tmp_path: Path) -> None:
    edited = _edited(folder, tmp_path / "m")
    tensors = load_file(edited / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, edited / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 weights.*at random: model.layers.1.mlp.up_proj.weight"):
        _load(edited)


def test_folders_without_config_say_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"no config.json; it is an adapter: set base_model"):
        _load(tmp_path)
    (tmp_path / "some.gguf").write_bytes(b"")
    with pytest.raises(ModelError, match=r"set gguf_file: some.gguf"):
        _load(tmp_path)
    with pytest.raises(ModelError, match=r"there is no sme.gguf in .*; did you mean some.gguf\?"):
        _load(tmp_path, gguf_file="sme.gguf")


def _write_gguf(path: Path) -> None:
    """A random two-layer Llama, 8-bit blocks for the matrices, with a byte-level BPE vocabulary of 256 tokens."""
    import gguf

    hidden, inner, heads, vocabulary = 64, 96, 2, 256
    generator = np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("a title inside the file")
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(sorted(bytes_to_unicode().values()))
    writer.add_token_types([1] * vocabulary)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)

    def matrix(name: str, rows: int, columns: int) -> None:
        values = generator.normal(0, 0.1, (rows, columns)).astype(np.float32)
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)

    matrix("token_embd.weight", vocabulary, hidden)
    for layer in range(2):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            matrix(f"blk.{layer}.{name}.weight", hidden, hidden)
        matrix(f"blk.{layer}.ffn_gate.weight", inner, hidden)
        matrix(f"blk.{layer}.ffn_up.weight", inner, hidden)
        matrix(f"blk.{layer}.ffn_down.weight", hidden, inner)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(hidden, np.float32))
    writer.add_tensor("output_norm.weight", np.ones(hidden, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_becomes_a_plain_model_that_saves_and_reloads_equal(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "base").mkdir()
    _write_gguf(tmp_path / "base" / "tiny.gguf")
    model = _load(tmp_path / "base", gguf_file="tiny.gguf")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16} == {base_dtype(model)}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.name_or_path == model.name_or_path == str(tmp_path / "base")
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert _equal(again, model)
    ids = torch.arange(9)[None]
    assert torch.equal(again(ids).logits, model.eval()(ids).logits)


def test_description_counts_parameters_and_attention_cost(folder: Path) -> None:
    model = _load(folder)
    model.lm_head.weight.requires_grad_(False)
    facts = describe_model(model)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert facts["parameters"] == total
    assert facts["trainable_parameters"] == total - VOCAB_SIZE * HIDDEN_SIZE
    assert facts["bytes_by_dtype"] == {"bfloat16": 2 * total}
    assert (facts["layers"], facts["hidden_size"], facts["vocabulary_rows"]) == (NUM_LAYERS, HIDDEN_SIZE, VOCAB_SIZE)
    assert facts["base_dtype"] == "bfloat16"
    assert facts["attention_cost_ratio"] == pytest.approx(2 * NUM_LAYERS * 4 * 8 / (total - VOCAB_SIZE * HIDDEN_SIZE))


def test_only_a_table_of_learned_positions_limits_the_length() -> None:
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, OPTConfig

    small = {"vocab_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 48}
    opt = OPTConfig(**small, hidden_size=16, ffn_dim=16, word_embed_proj_dim=16)
    gpt2 = GPT2Config(vocab_size=32, n_layer=1, n_head=2, n_embd=16, n_positions=48)
    llama = LlamaConfig(**small, hidden_size=16, intermediate_size=16)
    rows = [describe_model(AutoModelForCausalLM.from_config(config))["position_rows"] for config in (opt, gpt2, llama)]
    assert rows == [48, 48, None]
