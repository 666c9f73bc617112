"""What masks ask of a tokenizer: its special tokens, and which tokens end turns."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cache, cached_property

import numpy as np
from transformers import PreTrainedTokenizerBase

from eft.core.errors import DataError, nearest


@cache
def byte_of_sign() -> dict[str, int]:
    """The printable signs that byte-level vocabularies write bytes with (GPT-2's table)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + index): byte for index, byte in enumerate(others)}


class TokenizerFacts:
    """What is asked of the tokenizer once per batch.

    Args:
        tokenizer: a fast tokenizer.
        eot_tokens: the tokens that end turns, beside EOS; None: any special token may.

    Raises:
        DataError: one of `eot_tokens` is no token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, eot_tokens: Sequence[str] | None = None) -> None:
        added = tokenizer.added_tokens_decoder
        self.special_of = {token.content: int(token_id) for token_id, token in added.items() if token.special}
        self.eos_token: str | None = tokenizer.eos_token if isinstance(tokenizer.eos_token, str) else None
        if self.eos_token is not None:
            self.special_of.setdefault(self.eos_token, int(tokenizer.convert_tokens_to_ids(self.eos_token)))
        self.special_ids = np.array(sorted(self.special_of.values()), dtype=np.int64)
        self.special = _any_of(self.special_of)
        """Matches the text of a special token."""
        self.end_token = self.special
        plain = [token.content for token in added.values() if not token.special and token.content.strip()]
        if eot_tokens is not None:
            _check_are_tokens(tokenizer, eot_tokens)
            ends = [*eot_tokens, *([self.eos_token] if self.eos_token is not None else [])]
            self.end_token, plain = _any_of(ends), []
        self.plain_end_token = re.compile(rf"\s*({_any_of(plain).pattern})")
        self._tokenizer = tokenizer

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """What each token writes where the vocabulary is byte-level; of any other, something that does not add up to
        the text."""
        byte_of = byte_of_sign()
        vocabulary = self._tokenizer.get_vocab()
        texts = [b""] * (max(vocabulary.values()) + 1)
        for token, number in vocabulary.items():
            texts[number] = bytes(byte_of[sign] for sign in token) if all(sign in byte_of for sign in token) else b""
        for number, added in self._tokenizer.added_tokens_decoder.items():
            texts[number] = added.content.encode()
        return texts


def _any_of(words: Iterable[str]) -> re.Pattern[str]:
    """Matches any of the words, the longest one first; nothing where there are none."""
    return re.compile("|".join(map(re.escape, sorted(words, key=len, reverse=True))) or r"(?!)")


def _check_are_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> None:
    vocabulary = tokenizer.get_vocab()
    for token in tokens:
        if token not in vocabulary:
            close = nearest(token, [added.content for added in tokenizer.added_tokens_decoder.values()])
            hint = f"; did you mean {close!r}?" if close else ""
            raise DataError(
                f"eot_tokens: {token!r} is not one token of the tokenizer; expected tokens of its vocabulary (`tokens` "
                f"adds some){hint}"
            )
