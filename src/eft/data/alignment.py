"""Characters → tokens: which tokens of a text are trained, by the overlap of their characters with trained spans."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from eft.core.constants import IGNORE_INDEX
from eft.core.records import Int32Array, Message, TokenSample
from eft.data.token_facts import TokenizerFacts
from eft.data.turns import Layout, Span, UnprovableError

Offsets = npt.NDArray[np.int64]
"""First and last + 1 character of each token, int64 [length, 2]."""


def labelled(
    ids: Sequence[int] | Int32Array,
    offsets: Sequence[tuple[int, int]] | Offsets,
    spans: list[Span] | None,
    facts: TokenizerFacts,
) -> TokenSample:
    """The sample whose tokens in `spans` (None: all) are trained. A token in several spans has the greatest weight."""
    input_ids = np.array(ids, dtype=np.int32)
    labels = input_ids.copy()
    if spans is None:
        return TokenSample(input_ids, labels)
    weights = _token_weights(input_ids, np.array(offsets, dtype=np.int64).reshape(-1, 2), spans, facts)
    trained = weights > 0
    labels[~trained] = IGNORE_INDEX
    is_weighted = bool(np.any(weights[trained] != 1.0))
    return TokenSample(input_ids, labels, weights if is_weighted else None)


def exact_offsets(
    ids: Sequence[int] | Int32Array, offsets: Sequence[tuple[int, int]] | Offsets, text: str, facts: TokenizerFacts
) -> Sequence[tuple[int, int]] | Offsets:
    """The characters that each token writes, where its bytes tell; else the tokenizer's own `offsets`.

    Some tokenizers (Llama 3) leave blanks out of their offsets, so that a token after them would seem to reach back.
    """
    tokens = [facts.token_bytes[number] if number < len(facts.token_bytes) else b"" for number in ids]
    content = text.encode()
    if b"".join(tokens) != content:
        return offsets  # no byte-level vocabulary, or a normaliser changed the text
    sizes = np.array([len(token) for token in tokens], dtype=np.int64)
    stops = np.cumsum(sizes)
    starts = stops - sizes
    if text.isascii():
        return np.stack([starts, stops], axis=1)
    # A part of a character counts as all of it.
    character = np.cumsum((np.frombuffer(content, dtype=np.uint8) & 0xC0) != 0x80, dtype=np.int64) - 1
    return np.stack([character[starts], character[stops - 1] + 1], axis=1)


def _token_weights(
    input_ids: npt.NDArray[np.int32], offsets: Offsets, spans: list[Span], facts: TokenizerFacts
) -> npt.NDArray[np.float32]:
    """float32 [length]: the weight of the tokens whose characters overlap a span, 0 elsewhere.

    `offsets` are those of the tokenizer, which may leave out blanks that a token swallowed (a token of blanks then
    looks empty): a token reaches back to the end of the one before it.
    """
    weights = np.zeros(len(input_ids), dtype=np.float32)
    stops = np.maximum.accumulate(offsets[:, 1]) if len(offsets) else offsets[:, 1]
    starts = np.minimum(offsets[:, 0], np.concatenate([[0], stops[:-1]]))
    firsts = np.searchsorted(stops, [span.start for span in spans], side="right").tolist()
    lasts = np.searchsorted(starts, [span.stop for span in spans], side="left").tolist()
    for span, first, last in zip(spans, firsts, lasts, strict=True):
        if span.start >= span.stop:
            continue
        # A special token that swallows the blanks after it (Phi-3) overlaps the span without belonging to it.
        while first < last and starts[first] < span.start and np.isin(input_ids[first], facts.special_ids):
            first += 1
        np.maximum(weights[first:last], np.float32(span.weight), out=weights[first:last])
    return weights


# ---- text of special tokens in a row ----


def special_text(messages: list[Message], tools: Any, facts: TokenizerFacts) -> tuple[str, str] | None:
    """The first place where the row itself contains the text of a special token: (place, token); None where nowhere."""
    joined = "\0".join(message["content"] for message in messages)
    plain = all(message.keys() <= {"role", "content"} for message in messages) and not tools
    if plain and facts.special.search(joined) is None:
        return None
    for number, message in enumerate(messages, 1):
        for name, value in message.items():
            match = next((found for text in _texts(value) if (found := facts.special.search(text))), None)
            if match is not None:
                return f"turn {number} ({message['role']}): its {name}", match.group()
    match = next((found for text in _texts(tools) if (found := facts.special.search(text))), None)
    return ("the tool definitions", match.group()) if match is not None else None


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield str(name)
            yield from _texts(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)


def foreign_specials(layout: Layout) -> list[Span]:
    """Where the rendered text has the text of a special token that the row brought, not the template.

    The row is rendered once more with each such text replaced by other characters of the same length.

    Raises:
        UnprovableError: the template does not put it into the text as it stands.
    """
    facts = layout.facts
    mark = next(chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in layout.text)
    masked_messages = _replaced(layout.messages, facts.special, mark)
    masked_tools = _replaced(layout.tools, facts.special, mark)
    masked = Layout(layout.tokenizer, layout.template, masked_messages, masked_tools, facts).text
    spans = []
    for run in re.finditer(f"{mark}+", masked):
        position = run.start()
        while position < run.end():
            match = facts.special.match(layout.text, position, run.end())
            if match is None:
                break
            spans.append(Span(match.start(), match.end()))
            position = match.end()
    unmasked = masked
    for span in spans:
        unmasked = unmasked[: span.start] + layout.text[span.start : span.stop] + unmasked[span.stop :]
    if unmasked != layout.text:
        raise UnprovableError(
            "contains the text of a special token, and the template does not put it into the text as it stands, so "
            "it cannot be escaped"
        )
    return spans


def _replaced(value: Any, pattern: re.Pattern[str], mark: str) -> Any:
    if isinstance(value, str):
        return pattern.sub(lambda match: mark * len(match.group()), value)
    if isinstance(value, dict):
        return {name: _replaced(item, pattern, mark) for name, item in value.items()}
    return [_replaced(item, pattern, mark) for item in value] if isinstance(value, list) else value


def escaped(
    tokenizer: PreTrainedTokenizerBase, text: str, literals: list[Span], facts: TokenizerFacts
) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids and offsets of `text` with `literals` tokenised as plain text, as transformers' own
    `sanitize_control_tokens` does it: the text is tokenised in pieces, each after a line break that is cut off again,
    so that no tokenizer takes a piece for the start of a text.

    Raises:
        UnprovableError: the tokenizer gives the special token even so.
    """
    edges = [0, *(edge for span in literals for edge in (span.start, span.stop)), len(text)]
    ids: list[int] = []
    offsets: list[tuple[int, int]] = []
    for index, (start, stop) in enumerate(pairwise(edges)):
        if start == stop:
            continue
        is_literal = index % 2 == 1
        piece_ids, piece_offsets = _piece(tokenizer, text[start:stop], is_first=index == 0, is_literal=is_literal)
        if is_literal and np.isin(piece_ids, facts.special_ids).any():
            raise UnprovableError(
                f"contains {json.dumps(text[start:stop])}, which the tokenizer makes a special token in plain text, too"
            )
        ids += piece_ids
        offsets += [(first + start, last + start) for first, last in piece_offsets]
    return ids, offsets


def _piece(
    tokenizer: PreTrainedTokenizerBase, text: str, *, is_first: bool, is_literal: bool
) -> tuple[list[int], list[tuple[int, int]]]:
    options = {"add_special_tokens": False, "return_offsets_mapping": True, "split_special_tokens": is_literal}
    if not is_first:
        newline = tokenizer("\n", **options)["input_ids"]
        encoded = tokenizer("\n" + text, **options)
        if encoded["input_ids"][: len(newline)] == newline:
            moved = [(max(first - 1, 0), last - 1) for first, last in encoded["offset_mapping"][len(newline) :]]
            return encoded["input_ids"][len(newline) :], moved
    encoded = tokenizer(text, **options)
    return encoded["input_ids"], list(encoded["offset_mapping"])
