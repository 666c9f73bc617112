"""Greedy sampling from a live model: batching changes nothing, and the model comes back as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from eft.config.model import FreezingConfig
from eft.core.records import Message
from eft.models.adapters import apply_freezing, set_dtypes
from eft.models.generate import generate_ids, sample_texts, stop_token_ids
from tests.tiny import CHATML, tiny_tokenizer
from tests.tiny_models import tiny_model

TOKENIZER = tiny_tokenizer()
QUESTIONS = ["hello", "What is the capital of Italy?", "one two three four five six", "0", "how are you today? " * 4]
CONVERSATIONS: list[list[Message]] = [[{"role": "user", "content": question}] for question in QUESTIONS]


def _model(family: str = "llama", **overrides: Any) -> Any:
    return tiny_model(family, vocab_size=len(TOKENIZER), eos_token_id=TOKENIZER.eos_token_id, **overrides)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_neox"])
@pytest.mark.parametrize("batch_size", [2, 5])
def test_batched_equals_single(family: str, batch_size: int) -> None:
    model = _model(family)
    single = [sample_texts(model, TOKENIZER, [turns], 12, 1)[0] for turns in CONVERSATIONS]
    assert sample_texts(model, TOKENIZER, CONVERSATIONS, 12, batch_size) == single
    assert len(set(single)) > 1
    assert all(single)


def test_greedy_follows_the_largest_logit() -> None:
    model = _model().eval()
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.do_sample = True
    prompt = TOKENIZER.encode("hello there")
    (answer,) = generate_ids(model, TOKENIZER, [prompt], 6)
    ids = list(prompt)
    for token in answer:
        assert token == int(model(torch.tensor([ids])).logits[0, -1].argmax())
        ids.append(token)


def test_the_model_is_left_as_it_was() -> None:
    model = _model().train()
    model.model.layers[0].eval()
    model.config.use_cache = False
    model.generation_config.do_sample = True
    modes = [module.training for module in model.modules()]
    torch.manual_seed(4)
    state = torch.get_rng_state()
    first = sample_texts(model, TOKENIZER, CONVERSATIONS, 5, 3)
    assert [module.training for module in model.modules()] == modes
    assert model.config.use_cache is False
    assert model.generation_config.do_sample is True
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    assert sample_texts(model, TOKENIZER, CONVERSATIONS, 5, 3) == first
    assert torch.is_grad_enabled()


def test_frozen_bf16_below_trained_fp32_generates() -> None:
    model = _model().to(torch.bfloat16)
    apply_freezing(model, FreezingConfig(train_top_layers=1))
    set_dtypes(model)
    assert all(sample_texts(model, TOKENIZER, CONVERSATIONS, 4, 2))


def test_answers_end_at_the_first_stop_token() -> None:
    model = _model().eval()
    prompts = [TOKENIZER.encode("hello there"), TOKENIZER.encode("one two")]
    free, other = generate_ids(model, TOKENIZER, prompts, 8)
    model.generation_config.eos_token_id = free[3]
    stopped, _ = generate_ids(model, TOKENIZER, prompts, 8)
    assert stopped == free[: free.index(free[3])]
    assert len(other) == 8


def test_stop_tokens_include_what_the_template_ends_a_turn_with() -> None:
    model = _model()
    model.generation_config.eos_token_id = [7]
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    end_of_turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    # `<|im_end|>` has no role any more, as in a base model with a borrowed template; the masks train it all the same.
    assert end_of_turn not in tokenizer.all_special_ids
    assert stop_token_ids(model, tokenizer) == [7, tokenizer.eos_token_id, end_of_turn]
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "\n###\n")
    assert stop_token_ids(model, tokenizer) == [7, tokenizer.eos_token_id]
    tokenizer.chat_template = None
    assert stop_token_ids(model, tokenizer) == [7, tokenizer.eos_token_id]
