"""Examples → token samples: conversations by their template, segments piece by piece, given ids checked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import orjson
from transformers import PreTrainedTokenizerBase

from eft.config.data import DataConfig, DatasetConfig
from eft.core.constants import IGNORE_INDEX
from eft.core.errors import DataError
from eft.core.hashing import hash_bytes
from eft.core.records import TokenSample
from eft.data.conversations import NOT_UNICODE, ConversationEncoder, MaskRules, Outcome, Rejected, is_unicode
from eft.data.formats import Example, check_roles_to_train

__all__ = ["ExampleEncoder", "Outcome", "Rejected", "encode_examples", "tokenizer_fingerprint"]


class ExampleEncoder:
    """Encodes the examples of one data set, batch by batch.

    Args:
        tokenizer: a fast tokenizer.
        template: the resolved chat template; needed by conversations only.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str | None) -> None:
        self._tokenizer, self._template = tokenizer, template
        self._conversations: tuple[MaskRules, ConversationEncoder] | None = None

    @property
    def met(self) -> set[str]:
        """What the conversations of the last call had, see `seen.Seen.met`."""
        return self._conversations[1].met if self._conversations is not None else set()

    def __call__(self, examples: Sequence[Example], spec: DatasetConfig, cfg: DataConfig) -> list[Outcome]:
        """Ids and labels of a batch of examples.

        Args:
            examples: what the format made of the rows; a few hundred at a time are tokenised in one call.
            spec: the data set's own masking keys.
            cfg: the global ones; both sections' keys are read only where they decide something (E8).

        Returns:
            one outcome per example, in order: a sample, several (a conversation whose template rewrites history, a long
            text), or why there is none. Samples may have no trained token: that is the caller's to judge.

        Raises:
            DataError: for what no row can mend: a role nobody has, no chat template, no EOS token, a slow tokenizer.
        """
        results: dict[int, Outcome] = {}
        chats = [index for index, example in enumerate(examples) if example.messages is not None]
        if chats:
            encoder = self._conversation_encoder(spec, cfg)
            results.update(zip(chats, encoder([examples[index] for index in chats]), strict=True))
        pieces = [index for index, example in enumerate(examples) if example.segments is not None]
        if pieces:
            with_context = any(not segment.train for index in pieces for segment in examples[index].segments or ())
            everything = with_context and trains_on_inputs(spec, cfg)
            samples = _encode_segments([examples[index] for index in pieces], self._tokenizer, everything)
            for index, sample in zip(pieces, samples, strict=True):
                results[index] = _cut(sample, cfg.sequence_len) if examples[index].is_cut_to_fit else sample
        for index, example in enumerate(examples):
            if example.sample is not None:
                results[index] = _check_vocabulary(example.sample, len(self._tokenizer))
        return [results[index] for index in range(len(examples))]

    def _conversation_encoder(self, spec: DatasetConfig, cfg: DataConfig) -> ConversationEncoder:
        if self._template is None:
            raise DataError(f"{spec.path}: gives conversations, but there is no chat template; set `chat_template`")
        rules = MaskRules.of(spec, cfg, self._template)
        if not rules.train_on_inputs:
            check_roles_to_train(spec)
        if self._conversations is None or self._conversations[0] != rules:
            self._conversations = rules, ConversationEncoder(self._tokenizer, self._template, rules)
        return self._conversations[1]


def encode_examples(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    spec: DatasetConfig,
    cfg: DataConfig,
    template: str | None,
) -> list[Outcome]:
    """One batch through an `ExampleEncoder`."""
    return ExampleEncoder(tokenizer, template)(examples, spec, cfg)


def trains_on_inputs(spec: DatasetConfig, cfg: DataConfig) -> bool:
    """`train_on_inputs` of the entry, else of the run."""
    return cfg.train_on_inputs if spec.train_on_inputs is None else spec.train_on_inputs


def _encode_segments(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, train_on_inputs: bool
) -> list[TokenSample | Rejected]:
    """Segments tokenised one by one and joined; BOS once in front where the tokenizer adds one, EOS where asked for."""
    whole = [all(is_unicode(segment.text) for segment in example.segments or ()) for example in examples]
    texts = [
        segment.text
        for example, is_whole in zip(examples, whole, strict=True)
        if is_whole
        for segment in example.segments or ()
    ]
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False) if texts else {}
    ids = iter(encoded.get("input_ids", ()))
    bos = _bos_id(tokenizer)
    eos = (
        _eos_id(tokenizer) if any(segment.num_eos for example in examples for segment in example.segments or ()) else -1
    )
    return [
        _joined(example, ids, bos, eos, train_on_inputs) if is_whole else Rejected(NOT_UNICODE)
        for example, is_whole in zip(examples, whole, strict=True)
    ]


def _joined(
    example: Example, ids: Iterator[list[int]], bos: int | None, eos: int, train_on_inputs: bool
) -> TokenSample:
    assert example.segments is not None
    input_ids: list[int] = []
    trained: list[bool] = []
    for segment in example.segments:
        piece = next(ids)
        if segment.num_eos:
            ends_with_eos = (piece or input_ids)[-1:] == [eos]
            piece = [*piece, *[eos] * (segment.num_eos - ends_with_eos)]
        input_ids += piece
        trained += [segment.train or train_on_inputs] * len(piece)
    if bos is not None and input_ids[:1] != [bos]:
        input_ids.insert(0, bos)
        trained.insert(0, False)  # never a target: nothing precedes it
    row = np.array(input_ids, dtype=np.int32)
    return TokenSample(row, np.where(np.array(trained, dtype=bool), row, np.int32(IGNORE_INDEX)))


def _cut(sample: TokenSample | Rejected, length: int) -> Outcome:
    """The sample, or several of at most `length` tokens each."""
    if isinstance(sample, Rejected) or len(sample.input_ids) <= length:
        return sample
    starts = range(0, len(sample.input_ids), length)
    return tuple(TokenSample(sample.input_ids[at : at + length], sample.labels[at : at + length]) for at in starts)


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


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase, template: str | None = None) -> str:
    """SHA-256 (hex) of everything in the tokenizer that decides the ids and labels of a text: its backend (without
    truncation and padding, which calls set and which we never use, and without its decoder), BOS and EOS, and the other
    special tokens that `template` names (another pad token changes nothing). Not its chat template: that counts as the
    template of the formats that use one."""
    roles = tokenizer.special_tokens_map
    facts: dict[str, Any] = {
        "class": type(tokenizer).__name__,
        "special_tokens": {
            name: roles[name] for name in roles if name in ("bos_token", "eos_token") or name in (template or "")
        },
        "split_special_tokens": tokenizer.split_special_tokens,
    }
    if tokenizer.is_fast:
        backend = orjson.loads(tokenizer.backend_tokenizer.to_str())
        without = ("truncation", "padding", "decoder")
        facts["backend"] = {name: value for name, value in backend.items() if name not in without}
    else:
        facts["vocabulary"] = tokenizer.get_vocab()
    return hash_bytes(orjson.dumps(facts, option=orjson.OPT_SORT_KEYS))
