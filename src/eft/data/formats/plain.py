"""Rows that are texts or token ids already."""

from __future__ import annotations

from typing import Any

from eft.config.data import DatasetConfig
from eft.core.errors import DataError, nearest
from eft.core.records import Segment
from eft.data.formats.example import Example, Format
from eft.data.formats.fields import field, listed, parsed, shown, text
from eft.data.given_tokens import given_sample
from eft.data.readers import Row


def completion(row: Row, spec: DatasetConfig) -> Example:
    """Plain text, all of it trained, with EOS. What is longer than `sequence_len` is cut into several samples."""
    content = text(row.where, row.data, spec.field, "field")
    return Example(row.where, segments=[Segment(content, train=True, num_eos=1)], is_cut_to_fit=True)


def input_output(row: Row, spec: DatasetConfig) -> Example:
    """Pieces `{"label": true or false, "text": …}`, tokenised one by one; nothing is added between or after them."""
    pieces = field(row.where, row.data, spec.field_segments, "field_segments", "a list of {label, text}")
    return Example(row.where, segments=segments_of(row.where, pieces, spec.field_segments))


def pretokenized(row: Row, spec: DatasetConfig) -> Example:
    """`input_ids` and `labels` (and `weights`) as they are; a padded row and one without labels are refused."""
    return Example(row.where, sample=given_sample(row.where, row.data))


_PYGMALION = {"system": "<|system|>Persona: ", "human": "<|user|> ", "bot": "<|model|>"}


def pygmalion(row: Row, spec: DatasetConfig) -> Example:
    """`conversations` of system, human and bot turns after Pygmalion's markers; the bot's texts are trained, each with
    EOS."""
    turns = parsed(row.where, field(row.where, row.data, "conversations", None, "a list of turns"), "conversations")
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{row.where}: field 'conversations' is not a list with turns")
    segments: list[Segment] = []
    for number, turn in enumerate(turns, 1):
        where = f"{row.where}, turn {number}"
        if not isinstance(turn, dict):
            raise DataError(f"{where}: is a {type(turn).__name__}; expected {{'role': …, 'value': …}}")
        role, content = text(where, turn, "role"), text(where, turn, "value")
        if role not in _PYGMALION:
            close = nearest(role, _PYGMALION)
            hint = f"; did you mean {close!r}?" if close else ""
            raise DataError(f"{where}: unknown role {shown(role)}, expected one of {', '.join(_PYGMALION)}{hint}")
        if role == "system":
            content = content.removesuffix("\n<START>")
        if role == "bot":
            segments += [Segment(_PYGMALION[role], train=False), Segment(" " + content.strip(), True, num_eos=1)]
        else:
            segments.append(Segment(_PYGMALION[role] + content.strip(), train=False))
    return Example(row.where, segments=segments)


def segments_of(where: str, pieces: Any, name: str) -> list[Segment]:
    """Segments out of `[{"label": …, "text": …}, …]`."""
    pieces = parsed(where, pieces, name)
    if not isinstance(pieces, list) or not pieces:
        raise DataError(f"{where}: field {name!r} is not a list with pieces; expected [{{'label': …, 'text': …}}, …]")
    segments = []
    for number, piece in enumerate(pieces, 1):
        at = f"{where}: piece {number} of {name!r}"
        if not isinstance(piece, dict) or not isinstance(piece.get("text"), str):
            given = f" (it has {listed(piece)})" if isinstance(piece, dict) else ""
            raise DataError(f"{at} has no text; expected {{'label': true or false, 'text': …}}{given}")
        if not isinstance(piece.get("label"), bool):
            raise DataError(f"{at} has label {shown(piece.get('label'))}; expected true (train) or false (context)")
        segments.append(Segment(piece["text"], piece["label"]))
    return segments


PLAIN_FORMATS: dict[str, Format] = {
    "pygmalion": pygmalion,
    "completion": completion,
    "input_output": input_output,
    "pretokenized": pretokenized,
}
