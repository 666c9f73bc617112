"""Examples → token samples: conversations by their template, segments piece by piece, given ids checked."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from eft.config.data import DataConfig, DatasetConfig
from eft.core.constants import IGNORE_INDEX
from eft.core.errors import DataError
from eft.core.hashing import hash_json
from eft.core.records import TokenSample
from eft.data.chat_template import Rejected, encode_conversations
from eft.data.formats import Example, check_roles_to_train

__all__ = ["MASKING_VERSION", "Rejected", "encode_examples", "tokenizer_fingerprint"]

MASKING_VERSION = 1
"""Raised whenever the same rows, tokenizer and template would give other ids or labels: prepared stores are stale."""


def encode_examples(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    spec: DatasetConfig,
    cfg: DataConfig,
    template: str | None,
) -> list[TokenSample | Rejected]:
    """Ids and labels of a batch of examples of one data set.

    Args:
        examples: what the format made of the rows; a few hundred at a time are tokenised in one call.
        tokenizer: a fast tokenizer.
        spec: the data set's own masking keys.
        cfg: the global `train_on_inputs`; it and the masking keys are read only where they decide something (E8).
        template: the resolved chat template; needed by conversations only.

    Returns:
        one result per example, in order. Samples may have no trained token: that is the caller's to judge.

    Raises:
        DataError: for what no row can mend: a role nobody has, no chat template, no EOS token, a slow tokenizer.
    """
    results: dict[int, TokenSample | Rejected] = {}
    chats = [index for index, example in enumerate(examples) if example.messages is not None]
    if chats:
        if template is None:
            raise DataError(f"{spec.path}: gives conversations, but there is no chat template; set `chat_template`")
        everything = trains_on_inputs(spec, cfg)
        if not everything:
            check_roles_to_train(spec)
        encoded = encode_conversations(
            tokenizer,
            template,
            [examples[index] for index in chats],
            roles_to_train=() if everything else spec.roles_to_train,
            train_on_eos="all" if everything else spec.train_on_eos,
            train_on_inputs=everything,
        )
        results.update(zip(chats, encoded, strict=True))
    pieces = [index for index, example in enumerate(examples) if example.segments is not None]
    if pieces:
        with_context = any(not segment.train for index in pieces for segment in examples[index].segments or ())
        everything = with_context and trains_on_inputs(spec, cfg)
        samples = _encode_segments([examples[index] for index in pieces], tokenizer, everything)
        results.update(zip(pieces, samples, strict=True))
    for index, example in enumerate(examples):
        if example.sample is not None:
            results[index] = _check_vocabulary(example.sample, len(tokenizer))
    return [results[index] for index in range(len(examples))]


def trains_on_inputs(spec: DatasetConfig, cfg: DataConfig) -> bool:
    """`train_on_inputs` of the entry, else of the run."""
    return cfg.train_on_inputs if spec.train_on_inputs is None else spec.train_on_inputs


def _encode_segments(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, train_on_inputs: bool
) -> list[TokenSample]:
    """Segments tokenised one by one and joined; BOS once in front where the tokenizer adds one, EOS where asked for."""
    texts = [segment.text for example in examples for segment in example.segments or ()]
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    ids = iter(encoded["input_ids"])
    bos = _bos_id(tokenizer)
    samples = []
    for example in examples:
        assert example.segments is not None
        input_ids: list[int] = []
        trained: list[bool] = []
        for segment in example.segments:
            piece = next(ids)
            input_ids += piece
            trained += [segment.train or train_on_inputs] * len(piece)
        if bos is not None and input_ids[:1] != [bos]:
            input_ids.insert(0, bos)
            trained.insert(0, False)  # never a target: nothing precedes it
        if example.add_eos:
            eos = _eos_id(tokenizer)
            if input_ids[-1:] != [eos]:
                input_ids.append(eos)
                trained.append(example.segments[-1].train or train_on_inputs)
        row = np.array(input_ids, dtype=np.int32)
        samples.append(TokenSample(row, np.where(np.array(trained, dtype=bool), row, np.int32(IGNORE_INDEX))))
    return samples


def _bos_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The BOS id where a plain call of the tokenizer puts one in front."""
    bos = tokenizer.bos_token_id
    ids: list[int] = tokenizer("a")["input_ids"]
    return int(bos) if bos is not None and ids[:1] == [bos] else None


def _eos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no EOS token to end each sample; set `special_tokens: {eos_token: …}`")
    return int(tokenizer.eos_token_id)


def _check_vocabulary(sample: TokenSample, size: int) -> TokenSample | Rejected:
    wrong = np.flatnonzero((sample.input_ids < 0) | (sample.input_ids >= size))
    if not len(wrong):
        return sample
    at = int(wrong[0])
    found = sample.input_ids[at]
    return Rejected(f"input_ids[{at}] is {found}, outside the tokenizer's vocabulary of {size} (0 to {size - 1})")


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 (hex) of everything in the tokenizer that decides the ids of a text: its backend (without truncation and
    padding, which calls set and which we never use) and its special tokens. Not its chat template: that counts as the
    template of the formats that use one."""
    facts: dict[str, Any] = {
        "class": type(tokenizer).__name__,
        "special_tokens": tokenizer.special_tokens_map,
        "split_special_tokens": tokenizer.split_special_tokens,
    }
    if tokenizer.is_fast:
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        facts["backend"] = {name: value for name, value in backend.items() if name not in ("truncation", "padding")}
    else:
        facts["vocabulary"] = tokenizer.get_vocab()
    return hash_json(facts)
