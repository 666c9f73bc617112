"""Greedy answers from a live model: for report samples, evaluation and chat; the model comes back as it was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from eft.core.records import Message
from eft.models.compile import without_compilation
from eft.models.seeding import seeded_rng

_MARK = "eftmark"
_GREEDY: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
}
"""Set one by one, because `generate` takes whatever is left unset from the checkpoint's own generation config."""


def sample_texts(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Message]],
    max_new_tokens: int,
    batch_size: int,
) -> list[str]:
    """The model's greedy answer to each conversation (which ends before the assistant's turn), in the order given.

    Conversations of similar length share a left-padded batch. Training mode (of every module), `use_cache` and the RNG
    are as before afterwards. Mixed parameter dtypes run under autocast in the lower one, as in training.
    """
    prompts = [
        tokenizer.apply_chat_template(list(turns), add_generation_prompt=True, return_dict=False)
        for turns in conversations
    ]
    answers: list[list[int]] = [[] for _ in prompts]
    by_length = sorted(range(len(prompts)), key=lambda index: (-len(prompts[index]), index))
    with _evaluation_state(model), torch.no_grad(), seeded_rng(0, model), _mixed_precision(model):
        for start in range(0, len(by_length), batch_size):
            indices = by_length[start : start + batch_size]
            batch = generate_ids(model, tokenizer, [prompts[index] for index in indices], max_new_tokens)
            for index, answer in zip(indices, batch, strict=True):
                answers[index] = answer
    return [str(tokenizer.decode(answer, skip_special_tokens=True)).strip() for answer in answers]


def generate_ids(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
) -> list[list[int]]:
    """Greedy continuation of each prompt, up to and without the first stop token. One batch, padded on the left."""
    device = model.get_input_embeddings().weight.device
    width = max(len(prompt) for prompt in prompts)
    stops = stop_token_ids(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    ids = torch.full((len(prompts), width), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(list(prompt), dtype=torch.int64)
        mask[row, width - len(prompt) :] = 1
    generation = GenerationConfig(
        max_new_tokens=max_new_tokens, pad_token_id=pad, eos_token_id=stops or None, use_cache=True, **_GREEDY
    )
    with without_compilation():
        output = model.generate(input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=generation)
    answers = output[:, width:].tolist()
    return [_until_stop(answer, stops) for answer in answers]


def _until_stop(answer: list[int], stops: list[int]) -> list[int]:
    end = next((position for position, token in enumerate(answer) if token in stops), len(answer))
    return answer[:end]


def stop_token_ids(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end an answer: the checkpoint's, the tokenizer's eos, and what the chat template writes after a turn."""
    generation = model.generation_config
    declared = generation.eos_token_id if generation is not None else None
    ids = declared if isinstance(declared, list) else [declared]
    return list(dict.fromkeys(i for i in [*ids, tokenizer.eos_token_id, _turn_end_id(tokenizer)] if i is not None))


def _turn_end_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token of its own (special, or added for the template) that ends an assistant's text in the chat template, if
    that is how the template ends it."""
    if tokenizer.chat_template is None:
        return None
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": _MARK}]
    text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    tail = text.rpartition(_MARK)[2]
    ids = tokenizer.encode(tail.lstrip(), add_special_tokens=False)
    own = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return ids[0] if ids and ids[0] in own else None


@contextmanager
def _evaluation_state(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every module is in the mode it was in, also where they differed."""
    modes = [(module, module.training) for module in model.modules()]
    config: Any = model.config
    use_cache = config.use_cache if hasattr(config, "use_cache") else None
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        if use_cache is not None:
            config.use_cache = use_cache


def _mixed_precision(model: nn.Module) -> torch.autocast:
    """Autocast in the lower dtype when frozen bf16 layers meet trained fp32 ones, else autocast switched off."""
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    low = dtypes & {torch.bfloat16, torch.float16}
    device = next(model.parameters()).device.type
    return torch.autocast(device, dtype=min(low, key=str) if low else None, enabled=bool(low) and len(dtypes) > 1)
