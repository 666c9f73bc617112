"""One block of rows → its samples and its part of the account, the same in whatever process it is done."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np

from eft.config.data import DataConfig, DatasetConfig
from eft.core.errors import DataError
from eft.core.records import TokenSample
from eft.data.conversation_text import conversation_bytes
from eft.data.encoded import EncodedRows, StoredSample, encode_samples
from eft.data.formats import Example, resolve_format
from eft.data.ledger import Reason, SourceLedger
from eft.data.readers import Block, Row
from eft.data.rows import rows_of
from eft.data.seen import TAGS, Seen
from eft.data.tokenize import ExampleEncoder, Rejected
from eft.data.turns import has_generation_tag

_KEY_BYTES = 8


@dataclass(frozen=True)
class Job:
    """All that decides what becomes of a block, picklable."""

    spec: DatasetConfig
    cfg: DataConfig
    tokenizer: Any
    template: str | None


@dataclass
class Tally:
    """What is counted over the rows of a data set; tallies of blocks add up."""

    account: SourceLedger
    roles: Counter[str] = field(default_factory=Counter)
    is_chat: bool = False
    has_context: bool = False
    """Some stored sample has an untrained position after its first."""
    longest: int = 0
    """Tokens of the longest sample, before anything was cut."""
    shortest: int | None = None
    is_cut: bool = False
    """Some text was cut into samples of `sequence_len`."""
    seen: Seen = field(default_factory=Seen)
    spec_keys: set[str] = field(default_factory=set)
    """Keys of the entry that the rows' format and mask read."""
    cfg_keys: set[str] = field(default_factory=set)

    def add(self, other: Tally) -> None:
        """Count another block's rows, which come after these."""
        self.account.add(other.account)
        self.roles += other.roles
        self.is_chat |= other.is_chat
        self.has_context |= other.has_context
        if other.shortest is not None:
            self.count_lengths(other.shortest, other.longest)
        self.is_cut |= other.is_cut
        self.seen.add(other.seen)
        self.spec_keys |= other.spec_keys
        self.cfg_keys |= other.cfg_keys

    def count_lengths(self, shortest: int, longest: int) -> None:
        """Count samples of these and other lengths, before anything was cut."""
        self.longest = max(self.longest, longest)
        self.shortest = shortest if self.shortest is None else min(self.shortest, shortest)

    def to_json(self) -> dict[str, Any]:
        """A JSON-able mapping; `from_json` is its inverse."""
        sets = {"spec_keys": sorted(self.spec_keys), "cfg_keys": sorted(self.cfg_keys)}
        parts = {"account": self.account.to_json(), "roles": dict(self.roles), "seen": self.seen.to_json()}
        return {**self.__dict__, **parts, **sets}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Tally:
        parts = {"account": SourceLedger.from_json(value["account"]), "roles": Counter(value["roles"])}
        sets = {"spec_keys": set(value["spec_keys"]), "cfg_keys": set(value["cfg_keys"])}
        return cls(**{**value, **parts, **sets, "seen": Seen.from_json(value["seen"])})


@dataclass(frozen=True)
class EncodedBlock:
    rows: EncodedRows
    tally: Tally


class BlockEncoder:
    """Encodes the blocks of one data set."""

    def __init__(self, job: Job):
        # Own copies: which keys are read is recorded per block, and must be the same in every process.
        self._spec, self._cfg = pickle.loads(pickle.dumps((job.spec, job.cfg)))
        self._tokenizer = job.tokenizer
        self._template = job.template
        self._format = resolve_format(self._spec)  # a wrong `type` is told at once
        self._encoder = ExampleEncoder(self._tokenizer, self._template)
        self._tags = {TAGS} if self._template is not None and has_generation_tag(self._template) else set()

    def __call__(self, block: Block) -> EncodedBlock:
        """The samples of a block.

        Raises DataError for a malformed or over-long row where the config says so.
        """
        self._spec.forget_reads()
        self._cfg.forget_reads()
        self._format = resolve_format(self._spec)  # anew, as it reads keys
        tally = Tally(SourceLedger(name=self._spec.path))
        converted = self._convert(block, tally)
        outcomes = self._encoder([example for _, example in converted], self._spec, self._cfg)
        tally.seen.met |= self._encoder.met | self._tags
        shortest, longest = self._cfg.min_sample_len, self._cfg.sequence_len
        samples: list[StoredSample] = []
        cut_from: list[int] = []
        for (row, example), outcome in zip(converted, outcomes, strict=True):
            pieces = outcome if isinstance(outcome, tuple) else (outcome,)
            tally.account.further_samples += len(pieces) - 1
            tally.is_cut |= example.is_cut_to_fit and len(pieces) > 1
            key, text = _row_key(row), None
            if example.messages is not None:
                text = conversation_bytes(example.messages, example.tools)
            for piece in pieces:
                if isinstance(piece, TokenSample) and shortest <= len(piece.input_ids) <= longest:
                    tokens: TokenSample | None = piece
                else:
                    tokens = self._fitted(tally, row, example, piece)
                if tokens is not None:
                    samples.append(StoredSample(row.number, key, tokens, text))
                    cut_from.append(len(cast("TokenSample", piece).input_ids))
        rows = _account_samples(tally, encode_samples(block.file, samples), cut_from)
        tally.spec_keys |= self._spec.keys_read()
        tally.cfg_keys |= self._cfg.keys_read()
        return EncodedBlock(rows, tally)

    def _convert(self, block: Block, tally: Tally) -> list[tuple[Row, Example]]:
        """The readable rows with the conversation, segments or ids that their format finds in them."""

        def broken(number: int, error: DataError) -> None:
            if self._cfg.malformed_rows == "raise":
                raise error
            tally.account.rows += 1
            tally.account.drop("malformed", str(error), 0)

        converted = []
        roles: list[str] = []
        for row in rows_of(block, broken):
            tally.seen.look_at_row(row.data)
            try:
                example = self._format(row, self._spec)
            except DataError as error:
                broken(row.number, error)
                tally.seen.lose_track()
                continue
            tally.account.rows += 1
            if example.messages is not None:
                roles += [message["role"] for message in example.messages]
                tally.seen.look_at_turns(example.messages)
            converted.append((row, example))
        tally.is_chat = bool(roles)
        tally.roles.update(roles)
        tally.seen.roles |= set(tally.roles)
        return converted

    def _fitted(self, tally: Tally, row: Row, example: Example, outcome: TokenSample | Rejected) -> TokenSample | None:
        """A sample of another length than asked for, cut; None for what is dropped, with its reason in the account."""
        account, cfg = tally.account, self._cfg
        if isinstance(outcome, Rejected):
            if cfg.malformed_rows == "raise":
                raise DataError(f"{example.where}: {outcome.reason}")
            reason: Reason = "malformed" if example.messages is None else "template"
            account.drop(reason, f"{example.where}: {outcome.reason}", 0)
            return None
        length = len(outcome.input_ids)
        if length < cfg.min_sample_len:
            _count_dropped(tally, "too_short", row.where, length)
            return None
        if cfg.excess_length_strategy == "truncate":
            return _first_tokens(outcome, cfg.sequence_len)
        if cfg.excess_length_strategy == "raise":
            raise DataError(
                f"{row.where}: {length} tokens exceed sequence_len {cfg.sequence_len} (excess_length_strategy: raise); "
                f"set sequence_len to {length} or more, or excess_length_strategy to drop or truncate"
            )
        _count_dropped(tally, "too_long", row.where, length)
        return None


def _count_dropped(tally: Tally, reason: Reason, where: str, length: int) -> None:
    tally.account.raw += length
    tally.count_lengths(length, length)
    tally.account.drop(reason, where, length)


def _account_samples(tally: Tally, rows: EncodedRows, cut_from: list[int]) -> EncodedRows:
    """Drop the samples that train nothing and count the others; `cut_from` has their lengths before they were cut."""
    account, columns = tally.account, rows.columns
    lengths, counts, whole = columns["lengths"], columns["trainable_counts"], np.array(cut_from, dtype=np.int64)
    account.raw += int(whole.sum())
    if len(whole):
        tally.count_lengths(int(whole.min()), int(whole.max()))
    trains = (counts > 0) & (columns["weight_sums"] > 0)
    for index in np.flatnonzero(~trains).tolist():
        where = f"{rows.source} row {columns['row_ids'][index]}"
        account.drop("no_trainable_tokens", where, int(whole[index]))
    if not trains.all():
        rows, lengths, counts, whole = rows.chosen(trains), lengths[trains], counts[trains], whole[trains]
    total, trained = int(lengths.sum(dtype=np.int64)), int(counts.sum(dtype=np.int64))
    account.truncated_rows += int(np.count_nonzero(whole > lengths))
    account.truncated += int(whole.sum()) - total
    account.samples += len(lengths)
    account.trainable += trained
    account.context += total - trained
    tally.has_context = bool(np.any(lengths - 1 > counts))
    return rows


def _first_tokens(sample: TokenSample, count: int) -> TokenSample:
    weights = None if sample.weights is None else sample.weights[:count]
    return TokenSample(sample.input_ids[:count], sample.labels[:count], weights)


def _row_key(row: Row) -> int:
    """64 bits of what the row is, whatever its place and whatever it is made into."""
    content = row.raw.strip() if row.raw is not None else json.dumps(row.data, sort_keys=True, default=str).encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=_KEY_BYTES).digest(), "little")
