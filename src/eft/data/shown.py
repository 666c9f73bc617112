"""Samples as text, token by token: what is trained, what is context, what is a special token."""

from __future__ import annotations

import re
from itertools import groupby, pairwise

import numpy as np
from transformers import PreTrainedTokenizerBase

from eft.core.constants import IGNORE_INDEX
from eft.core.records import ShownRow, TokenKind, TokenSample

_KINDS: tuple[TokenKind, ...] = ("context", "trained", "special", "trained special")
MOST_TOKENS = 400
"""A longer sample is shown without its middle where a limit is asked for."""


def shown_row(
    origin: str,
    sample: TokenSample,
    tokenizer: PreTrainedTokenizerBase,
    *,
    note: str = "",
    most_tokens: int | None = None,
    openings: re.Pattern[str] | None = None,
) -> ShownRow:
    """The sample decoded in pieces of one kind each; of more than `most_tokens` the middle is left out.

    `openings` matches what opens turns (see `gates_openings`).
    """
    ids, labels = np.asarray(sample.input_ids), np.asarray(sample.labels)
    trained = labels != IGNORE_INDEX
    special = np.isin(ids, special_ids(tokenizer))
    title = f"{origin}: {len(ids):,} tokens, {int(trained[1:].sum()):,} trained"
    kinds = trained + 2 * special
    parts: list[tuple[str, TokenKind]] = []
    half = len(ids) if most_tokens is None or len(ids) <= most_tokens else most_tokens // 2
    for start, stop in ((0, half), (len(ids) - half, len(ids))) if half < len(ids) else ((0, half),):
        if start:
            parts.append((f" … {len(ids) - 2 * half:,} tokens … ", "context"))
        pairs = zip(kinds[start:stop].tolist(), ids[start:stop].tolist(), strict=True)
        parts += [
            (_decoded(tokenizer, [number for _, number in group]), _KINDS[kind])
            for kind, group in groupby(pairs, key=lambda pair: pair[0])
        ]
    return ShownRow(title, parts if openings is None else _with_headers(parts, openings), note)


def _with_headers(parts: list[tuple[str, TokenKind]], openings: re.Pattern[str]) -> list[tuple[str, TokenKind]]:
    """The pieces cut where turns are opened; what of that is trained stays so."""
    whole = "".join(text for text, _ in parts)
    edges = sorted({edge for match in openings.finditer(whole) for edge in match.span()})
    inside = {match.start() for match in openings.finditer(whole)}
    found: list[tuple[str, TokenKind]] = []
    at, is_header = 0, False
    for text, kind in parts:
        for start, stop in pairwise([at, *(edge for edge in edges if at < edge < at + len(text)), at + len(text)]):
            is_header = start in inside or (is_header and start not in edges)
            piece = text[start - at : stop - at]
            found.append((piece, "header" if is_header and not kind.startswith("trained") else kind))
        at += len(text)
    return found


def special_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of all special tokens, those that were added beside the named ones too."""
    added = (int(number) for number, token in tokenizer.added_tokens_decoder.items() if token.special)
    return sorted({*tokenizer.all_special_ids, *added})


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
