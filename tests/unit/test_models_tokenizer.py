"""Tokenizers: added tokens, the pad rule, and a row in the model for every token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from eft.config.model import ModelConfig
from eft.config.root import TrainConfig
from eft.core.errors import ConfigError, ModelError
from eft.models.tokenizer import load_tokenizer, new_tokens, resize_embeddings, rows_needed
from tests.tiny import tiny_tokenizer
from tests.tiny_models import tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizers") / "plain"
    tiny_tokenizer().save_pretrained(path)
    return path


def _config(folder: Path, **keys: Any) -> TrainConfig:
    datasets = [{"path": "rows.jsonl", "type": "completion"}]
    return TrainConfig(base_model=str(folder), datasets=datasets, learning_rate=1e-4, **keys)


def _without_pad(folder: Path, *, specials: tuple[str, ...] = ()) -> Path:
    tokenizer = tiny_tokenizer(specials=specials)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    return folder


def test_a_tokenizer_is_loaded_as_it_is(folder: Path) -> None:
    tokenizer = load_tokenizer(ModelConfig(base_model=str(folder)))
    assert tokenizer.get_vocab() == tiny_tokenizer().get_vocab()
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|endoftext|>", "<|im_end|>")


def test_tokenizer_config_wins_over_base_model(folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(ModelConfig(base_model=str(tmp_path), tokenizer_config=str(folder)))
    assert len(tokenizer) == len(tiny_tokenizer())


def test_a_folder_without_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError, match=r"base_model: no tokenizer could be loaded from .*set tokenizer_config"):
        load_tokenizer(ModelConfig(base_model=str(tmp_path)))


def test_added_tokens_are_one_id_and_swallow_no_neighbours(folder: Path) -> None:
    cfg = ModelConfig(base_model=str(folder), tokens=["<tool>"], special_tokens={"eos_token": "<|end|>"})
    tokenizer = load_tokenizer(cfg)
    old = len(tiny_tokenizer())
    assert new_tokens(cfg, tokenizer) == {"<|end|>": old, "<tool>": old + 1}
    assert tokenizer.eos_token_id == old
    text = "hello <tool> world<|end|>"
    ids = tokenizer.encode(text)
    assert ids.count(old + 1) == 1
    assert ids[-1] == old
    assert tokenizer.decode(ids) == text


def test_tokens_the_vocabulary_has_are_not_new(folder: Path) -> None:
    cfg = ModelConfig(base_model=str(folder), tokens=["<|im_start|>"], special_tokens={"eos_token": "<|endoftext|>"})
    tokenizer = load_tokenizer(cfg)
    assert new_tokens(cfg, tokenizer) == {}
    assert tokenizer.eos_token == "<|endoftext|>"
    assert len(tokenizer) == len(tiny_tokenizer())


def test_a_special_token_named_again_stays_special(tmp_path: Path) -> None:
    tiny_tokenizer(specials=("<|tool|>",)).save_pretrained(tmp_path)
    cfg = ModelConfig(base_model=str(tmp_path), tokens=["<|tool|>", "<new>"], special_tokens={"eos_token": "<|end|>"})
    tokenizer = load_tokenizer(cfg)
    before = load_tokenizer(ModelConfig(base_model=str(tmp_path)))
    special = {token.content: token.special for token in tokenizer.added_tokens_decoder.values()}
    for token in before.added_tokens_decoder.values():
        assert special[token.content] == token.special, token.content
    assert (special["<|tool|>"], special["<new>"]) == (True, False)
    ids = tokenizer.encode("hello<|tool|><|end|><new>")
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hello<new>"


def test_unknown_role_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="unknown role 'pad_tokn', did you mean 'pad_token'"):
        load_tokenizer(ModelConfig(base_model=str(folder), special_tokens={"pad_tokn": "<p>"}))


def test_pad_falls_back_to_a_spare_token_then_to_eos(tmp_path: Path) -> None:
    bare = _without_pad(tmp_path / "bare")
    assert load_tokenizer(ModelConfig(base_model=str(bare))).pad_token == "<|im_end|>"
    spare = _without_pad(tmp_path / "spare", specials=("<|finetune_right_pad_id|>",))
    assert load_tokenizer(ModelConfig(base_model=str(spare))).pad_token == "<|finetune_right_pad_id|>"
    chosen = load_tokenizer(ModelConfig(base_model=str(bare), special_tokens={"pad_token": "<|endoftext|>"}))
    assert chosen.pad_token == "<|endoftext|>"


def _loaded(folder: Path, **keys: Any) -> tuple[TrainConfig, PreTrainedTokenizerBase]:
    cfg = _config(folder, **keys)
    return cfg, load_tokenizer(cfg)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_new_rows_start_at_the_mean_and_are_seeded(folder: Path, tied: bool, family: str) -> None:
    cfg, tokenizer = _loaded(folder, tokens=["<a>", "<b>"])
    rows = len(tokenizer) - 2
    weights = []
    for seed in (1, 1, 2):
        model = tiny_model(family, vocab_size=rows, tie_word_embeddings=tied)
        old_in, old_out = (
            m.weight.detach().clone() for m in (model.get_input_embeddings(), model.get_output_embeddings())
        )
        torch.manual_seed(3)
        before = torch.get_rng_state()
        assert resize_embeddings(model, tokenizer, cfg, seed) == [rows, rows + 1]
        assert torch.equal(torch.get_rng_state(), before)
        new_in, new_out = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        assert (new_in is new_out) == tied
        assert model.config.vocab_size == new_in.shape[0] == new_out.shape[0] == rows + 2
        for old, new in ((old_in, new_in), (old_out, new_out)):
            assert torch.equal(new[:rows], old)
            torch.testing.assert_close(new[rows:], old.mean(dim=0).expand(2, -1), atol=0.01 * float(old.std()), rtol=0)
            assert not torch.equal(new[rows], new[rows + 1])
        weights.append(new_in.detach().clone())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_no_resize_when_every_token_has_a_row(folder: Path) -> None:
    cfg, tokenizer = _loaded(folder)
    model = tiny_model("llama", vocab_size=512)
    before = model.get_input_embeddings().weight
    assert resize_embeddings(model, tokenizer, cfg, 1) == []
    assert model.get_input_embeddings().weight is before


def test_spare_rows_that_become_tokens_start_at_the_mean(folder: Path) -> None:
    cfg, tokenizer = _loaded(folder, tokens=["<a>"])
    model = tiny_model("llama", vocab_size=512)
    with torch.no_grad():
        model.get_input_embeddings().weight[len(tokenizer) - 1] = 1e3
    (new,) = resize_embeddings(model, tokenizer, cfg, 1)
    weight = model.get_input_embeddings().weight
    assert weight.shape[0] == 512
    torch.testing.assert_close(weight[new], weight[:new].mean(dim=0), atol=0.01, rtol=0)


def test_rows_are_rounded_up_to_32(folder: Path) -> None:
    cfg, tokenizer = _loaded(folder, resize_token_embeddings_to_32x=True)
    model = tiny_model("llama", vocab_size=len(tokenizer) - len(tokenizer) % 32 + 1)
    resize_embeddings(model, tokenizer, cfg, 1)
    assert model.get_input_embeddings().weight.shape[0] == -(-len(tokenizer) // 32) * 32
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()


LORA: dict[str, Any] = {"adapter": "lora", "lora_target_linear": True}
EMBEDDING_ONLY = {**LORA, "lora_modules_to_save": ["embed_tokens"]}


@pytest.mark.parametrize(
    ("tied", "keys", "message"),
    [
        (False, LORA, r"or lora_modules_to_save: \[embed_tokens, lm_head\]"),
        (True, LORA, r"or lora_modules_to_save: \[embed_tokens\]"),
        (
            False,
            {**LORA, "lora_modules_to_save": ["embed_tokens"]},
            r"or lora_modules_to_save: \[embed_tokens, lm_head\]",
        ),
        (False, {**LORA, "lora_modules_to_save": ["embed_tokens", "lm_head"]}, None),
        (True, EMBEDDING_ONLY, None),
        (
            False,
            {"train_top_layers": 1},
            r"together with '\^model.embed_tokens.weight\$', '\^lm_h",
        ),
        (
            False,
            {"unfrozen_parameters": ["lm_head"]},
            r"would stay frozen; add to unfrozen_parameters: '",
        ),
        (True, {"unfrozen_parameters": ["lm_head"]}, None),
    ],
)
def test_new_tokens_are_trained_or_refused(folder: Path, tied: bool, keys: dict[str, Any], message: str | None) -> None:
    cfg, tokenizer = _loaded(folder, tokens=["<a>"], **keys)
    model = tiny_model("llama", vocab_size=len(tokenizer) - 1, tie_word_embeddings=tied)
    if message is None:
        assert len(resize_embeddings(model, tokenizer, cfg, 1)) == 1
    else:
        with pytest.raises(ConfigError, match=message):
            resize_embeddings(model, tokenizer, cfg, 1)


def test_a_new_pad_token_needs_no_training(folder: Path) -> None:
    cfg, tokenizer = _loaded(folder, special_tokens={"pad_token": "<|padding-only|>"}, **LORA)
    model = tiny_model("llama", vocab_size=len(tokenizer) - 1)
    assert resize_embeddings(model, tokenizer, cfg, 1) == [len(tokenizer) - 1]


def test_rounding_up_with_an_adapter_is_refused(folder: Path) -> None:
    cfg, tokenizer = _loaded(folder, resize_token_embeddings_to_32x=True, **LORA)
    model = tiny_model("llama", vocab_size=len(tokenizer))
    if len(tokenizer) % 32 == 0:
        model = tiny_model("llama", vocab_size=len(tokenizer) + 1)
    with pytest.raises(ConfigError, match=r"resize_token_embeddings_to_32x: .*with an adapter"):
        resize_embeddings(model, tokenizer, cfg, 1)


def test_ids_with_gaps_have_a_row_each(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny_tokenizer()
    assert rows_needed(tokenizer) == len(tokenizer)
    vocabulary = {**tokenizer.get_vocab(), "<far>": len(tokenizer) + 10}
    monkeypatch.setattr(tokenizer, "get_vocab", lambda: vocabulary)
    assert rows_needed(tokenizer) == len(tokenizer) + 11
