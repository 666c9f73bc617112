"""One entry of `datasets` from its rows to a token store, with an account of every row and token."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from eft.config.data import DataConfig, DatasetConfig
from eft.core.constants import IGNORE_INDEX
from eft.core.errors import DataError
from eft.core.records import TokenSample
from eft.data.formats import Example, resolve_format
from eft.data.ledger import Reason, SourceLedger
from eft.data.readers import Row
from eft.data.sample_set import measure
from eft.data.sources import count_hint, iter_rows
from eft.data.store import StoreWriter
from eft.data.tokenize import Rejected, encode_examples, trains_on_inputs

BATCH_ROWS = 512

Progress = Callable[[str, int, int | None], None]
"""Called with (what, rows done, rows in all or None) while rows are tokenised."""


@dataclass
class _Entry:
    """The state of one pass over the rows."""

    spec: DatasetConfig
    cfg: DataConfig
    writer: StoreWriter
    account: SourceLedger
    roles: Counter[str] = field(default_factory=Counter)
    is_chat: bool = False
    has_context: bool = False
    """Some stored sample has an untrained position after its first."""


def write_entry(
    writer: StoreWriter, spec: DatasetConfig, cfg: DataConfig, tokenizer: Any, template: str | None, progress: Progress
) -> SourceLedger:
    """Tokenise all rows of `spec` into `writer`; returns the balanced account (samples not yet split).

    Raises DataError for a malformed or over-long row where the config says so, for a data set that gives no sample, and
    for a chat mask that trains every token.
    """
    entry = _Entry(spec, cfg, writer, SourceLedger(name=spec.path))
    total = count_hint(spec)
    for rows in _batches(_rows(entry), BATCH_ROWS):
        converted = _convert(entry, rows)
        outcomes = encode_examples([example for _, example in converted], tokenizer, spec, cfg, template)
        for (row, example), outcome in zip(converted, outcomes, strict=True):
            _place(entry, row, example, outcome)
        progress(spec.path, entry.account.rows, total)
    _require_samples(entry)
    _require_context(entry)
    return entry.account


def _rows(entry: _Entry) -> Iterator[Row]:
    """The readable rows; each one read is counted, the unreadable ones raise or are counted as dropped."""

    def drop(number: int, error: DataError) -> None:
        entry.account.rows += 1
        entry.account.drop("malformed", str(error), 0)

    yielded = False
    try:
        for row in iter_rows(entry.spec, drop if entry.cfg.malformed_rows == "drop" else None):
            entry.account.rows += 1
            yielded = True
            yield row
    except DataError:
        if yielded or not entry.account.dropped:
            raise
        # All rows were unreadable and left out: not "no rows", as iter_rows must think.


def _batches(rows: Iterator[Row], size: int) -> Iterator[list[Row]]:
    while batch := list(islice(rows, size)):
        yield batch


def _convert(entry: _Entry, rows: list[Row]) -> list[tuple[Row, Example]]:
    """Rows with the conversation, segments or ids that their format finds in them."""
    convert = resolve_format(entry.spec)
    converted = []
    for row in rows:
        try:
            example = convert(row, entry.spec)
        except DataError as error:
            if entry.cfg.malformed_rows == "raise":
                raise
            entry.account.drop("malformed", str(error), 0)
            continue
        if example.messages is not None:
            entry.is_chat = True
            entry.roles.update(message["role"] for message in example.messages)
        converted.append((row, example))
    return converted


def _place(entry: _Entry, row: Row, example: Example, outcome: TokenSample | Rejected) -> None:
    """Store the sample, cut or whole, or drop it with its reason."""
    account, cfg = entry.account, entry.cfg
    if isinstance(outcome, Rejected):
        if cfg.malformed_rows == "raise":
            raise DataError(f"{example.where}: {outcome.reason}")
        reason: Reason = "malformed" if example.messages is None else "template"
        account.drop(reason, f"{example.where}: {outcome.reason}", 0)
        return
    length = len(outcome.input_ids)
    account.raw += length
    sample = _first_tokens(outcome, cfg.sequence_len)
    kept = len(sample.input_ids)
    count, weight = measure(sample)
    if length < cfg.min_sample_len:
        account.drop("too_short", row.where, length)
    elif length > kept and cfg.excess_length_strategy == "drop":
        account.drop("too_long", row.where, length)
    elif length > kept and cfg.excess_length_strategy == "raise":
        raise DataError(
            f"{row.where}: {length} tokens exceed sequence_len {cfg.sequence_len} (excess_length_strategy: raise); "
            f"set sequence_len to {length} or more, or excess_length_strategy to drop or truncate"
        )
    elif not count or weight <= 0:
        account.drop("no_trainable_tokens", row.where, length)
    else:
        account.truncated_rows += length > kept
        account.truncated += length - kept
        account.samples += 1
        account.trainable += count
        account.context += kept - count
        entry.has_context |= bool(np.any(sample.labels[1:] == IGNORE_INDEX))
        entry.writer.add(row.file, row.number, sample, _conversation_text(example))


def _first_tokens(sample: TokenSample, count: int) -> TokenSample:
    if len(sample.input_ids) <= count:
        return sample
    weights = None if sample.weights is None else sample.weights[:count]
    return TokenSample(sample.input_ids[:count], sample.labels[:count], weights)


def _conversation_text(example: Example) -> str | None:
    if example.messages is None:
        return None
    return json.dumps({"messages": example.messages, "tools": example.tools}, ensure_ascii=False, default=str)


def _require_samples(entry: _Entry) -> None:
    account = entry.account
    if len(entry.writer):
        return
    if not account.rows:
        raise DataError(f"{entry.spec.path}: the data set is empty: no rows")
    reasons = "; ".join(
        f"{portion.rows} {reason.replace('_', ' ')} (first: {portion.first_rows[0]})"
        for reason, portion in account.dropped.items()
    )
    message = f"{entry.spec.path}: none of its {account.rows} rows can be trained on: {reasons}"
    untrained = account.dropped.get("no_trainable_tokens")
    if untrained is not None and untrained.tokens > untrained.rows * entry.cfg.sequence_len:
        message += f". sequence_len is {entry.cfg.sequence_len}, and what truncation keeps ends before the answers"
    elif untrained is not None and entry.is_chat:
        message += f". Roles in the rows: {_roles_text(entry)}; roles_to_train: {', '.join(entry.spec.roles_to_train)}"
        message += " (`roles` maps the names in the rows to standard ones)"
    if "too_long" in account.dropped:
        message += (
            f". sequence_len is {entry.cfg.sequence_len}; excess_length_strategy: truncate keeps the start of each"
        )
    if "too_short" in account.dropped:
        message += f". min_sample_len is {entry.cfg.min_sample_len}"
    raise DataError(message)


def _roles_text(entry: _Entry) -> str:
    return ", ".join(f"{role} ({count} turns)" for role, count in entry.roles.most_common()) or "none"


def _require_context(entry: _Entry) -> None:
    """A mask that trains every token although some turns must not be trained has not been understood."""
    if not entry.is_chat or entry.has_context or trains_on_inputs(entry.spec, entry.cfg):
        return
    if set(entry.roles) <= set(entry.spec.roles_to_train):
        return
    raise DataError(
        f"{entry.spec.path}: every token of all {len(entry.writer)} samples would be trained, prompts too. Roles in "
        f"the rows: {_roles_text(entry)}; roles_to_train: {', '.join(entry.spec.roles_to_train)}. The chat template "
        "does not show where turns begin and end; use another one, or set `train_on_inputs: true` if this is meant"
    )
