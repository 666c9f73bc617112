"""One data set of a stream: its rows as samples, round after round, from any place on, tokenised in the background."""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from eft.core.errors import DataError
from eft.core.records import TokenSample
from eft.data.block_encoder import BlockEncoder, EncodedBlock, Job
from eft.data.encoded import EncodedRows
from eft.data.ledger import ROWS_KEPT, Portion, SourceLedger
from eft.data.mixture import equal_to_any
from eft.data.packing import random_key
from eft.data.packing_kernels import shuffle_in_place
from eft.data.readers import Block
from eft.data.sample_set import Digests
from eft.data.sources import Part, no_rows, parts_of
from eft.data.workers import encode_in_workers

_FIRST_STAGE = 100
"""Shuffles of parts are other draws than those of samples and bins."""


@dataclass(frozen=True)
class Place:
    """A sample of a source, by arithmetic: in which round, part (of the round's order), block and sample of it."""

    round: int = 0
    part: int = 0
    block: int = 0
    sample: int = 0


class Drawn(NamedTuple):
    """One sample of a stream."""

    tokens: TokenSample
    trained: int
    weight: float
    where: str
    """`data.jsonl row 17`."""


@dataclass(frozen=True)
class SourceState:
    """All that reading a source goes on from; JSON-able by `to_json`."""

    place: Place
    """Of the next sample."""
    account: SourceLedger
    """Of all blocks before the one that the place is in."""

    def to_json(self) -> dict[str, Any]:
        return {"place": asdict(self.place), "account": self.account.to_json()}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> SourceState:
        return cls(Place(**value["place"]), SourceLedger.from_json(value["account"]))


@dataclass(frozen=True)
class StreamSource:
    """An entry of `datasets`."""

    name: str
    """In metrics."""
    job: Job
    share: float
    """Its share of the tokens that are drawn, relative to the other sources'."""
    seed: int
    shuffle: bool
    """Whether each round has an order of its files of its own."""
    num_processes: int
    """1: rows are tokenised in a thread of this process."""
    held_out: Digests
    """Ids of held-out samples, which are dropped."""

    @cached_property
    def parts(self) -> list[Part]:
        """Its files."""
        return parts_of(self.job.spec)

    def start(self) -> SourceState:
        """Before its first sample."""
        return SourceState(Place(), SourceLedger(name=self.job.spec.path))

    def order(self, round_: int) -> list[int]:
        """The parts in the order of a round."""
        order = np.arange(len(self.parts), dtype=np.int32)
        if self.shuffle:
            shuffle_in_place(order, random_key(self.seed, round_, _FIRST_STAGE))
        return [int(number) for number in order]

    def head(self) -> EncodedBlock:
        """The first block of the first round. Raises DataError as `Reading.draw` does, if there is no row at all."""
        block = next(self._blocks(Place(), deque()))
        return BlockEncoder(self.job)(block)

    def encoded(self, place: Place, places: deque[Place]) -> Generator[EncodedBlock]:
        """All blocks from that of `place` on, without end; `places` gets the place of each, in the same order."""
        blocks = self._blocks(place, places)
        if self.num_processes > 1:
            yield from encode_in_workers(self.job, blocks, self.num_processes)
        # A copy: a tokenizer does not serve two threads at once.
        tokenizer = pickle.loads(pickle.dumps(self.job.tokenizer))
        yield from map(BlockEncoder(replace(self.job, tokenizer=tokenizer)), blocks)

    def _blocks(self, place: Place, places: deque[Place]) -> Iterator[Block]:
        """The blocks of a place and after it. What comes before it in its file is read over, not looked into."""
        round_, first_part, first_block = place.round, place.part, place.block
        while True:
            empty = True
            for position, number in enumerate(self.order(round_)):
                if position < first_part:
                    continue
                for block_number, block in enumerate(self.parts[number].blocks(first_block), first_block):
                    empty = False
                    places.append(Place(round_, position, block_number))
                    yield block
                first_block = 0
            if empty and first_part == 0:
                raise no_rows(self.job.spec)
            round_, first_part = round_ + 1, 0


class Reading:
    """A source that is being read."""

    def __init__(self, source: StreamSource, state: SourceState) -> None:
        self._source = source
        self._places: deque[Place] = deque()
        self._encoded = source.encoded(state.place, self._places)
        self._skip = state.place.sample
        self._before = state.account
        self._at = state.place
        self._open: _Open | None = None
        self._found = 0
        """Samples of the running round, or -1 where it was not read from its start."""
        if state.place != Place(state.place.round):
            self._found = -1

    def draw(self) -> Drawn:
        """The next sample.

        Raises DataError for a malformed or over-long row where the config says so, and for a source that gives no
        sample in a whole round.
        """
        self.ready()
        assert self._open is not None
        return self._open.draw()

    def ready(self) -> None:
        """Open the block of the next sample, so that `state` and `rounds` are its own. Raises as `draw`."""
        while self._open is None or self._open.next >= len(self._open.rows):
            self._open_next()

    def state(self) -> SourceState:
        """What a reading that goes on from here begins with."""
        if self._open is None:
            return SourceState(replace(self._at, sample=self._skip), self._before)
        return SourceState(replace(self._at, sample=self._open.next), self._before)

    def opened(self) -> SourceLedger:
        """The account of all blocks so far, that of the next sample included."""
        account = SourceLedger.from_json(self._before.to_json())
        if self._open is not None:
            account.add(self._open.account)
        return account

    def waiting(self) -> tuple[int, int]:
        """(samples, tokens) of the open block that were not drawn yet."""
        return (0, 0) if self._open is None else self._open.waiting()

    def rounds(self) -> int:
        """Whole rounds before the open block."""
        return self._at.round

    def close(self) -> None:
        """End the processes."""
        self._encoded.close()

    def _open_next(self) -> None:
        self._before, self._open = self.opened(), None
        encoded = next(self._encoded)
        place = self._places.popleft()
        if place.round != self._at.round:
            if self._found == 0:
                raise self._fruitless()
            self._found = 0
        self._at = place
        self._open = _Open(*without_held_out(encoded, self._source.held_out), self._skip)
        self._skip = 0
        if self._found >= 0:
            self._found += len(self._open.rows)

    def _fruitless(self) -> DataError:
        reasons = "; ".join(
            f"{portion.rows} {reason.replace('_', ' ')} (first: {portion.first_rows[0]})"
            for reason, portion in self._before.dropped.items()
        )
        return DataError(f"{self._source.job.spec.path}: none of its rows can be trained on: {reasons}")


class _Open:
    """A block whose samples are being drawn."""

    def __init__(self, rows: EncodedRows, account: SourceLedger, first: int) -> None:
        self.rows = rows
        self.account = account
        self.next = first
        lengths = rows.columns["lengths"]
        self._ends = np.cumsum(lengths, dtype=np.int64)
        self._starts: npt.NDArray[np.int64] = self._ends - lengths

    def draw(self) -> Drawn:
        index, rows = self.next, self.rows
        self.next += 1
        here = slice(int(self._starts[index]), int(self._ends[index]))
        weights = rows.weights[here] if rows.weights is not None and rows.is_weighted[index] else None
        return Drawn(
            TokenSample(rows.ids[here], rows.labels[here], weights),
            int(rows.columns["trainable_counts"][index]),
            float(rows.columns["weight_sums"][index]),
            f"{rows.source} row {rows.columns['row_ids'][index]}",
        )

    def waiting(self) -> tuple[int, int]:
        lengths = self.rows.columns["lengths"][self.next :]
        return len(lengths), int(lengths.sum(dtype=np.int64))


def without_held_out(encoded: EncodedBlock, held_out: Digests) -> tuple[EncodedRows, SourceLedger]:
    """The block without samples whose ids equal a held-out one's, and its account with them as dropped."""
    rows, account = encoded.rows, encoded.tally.account
    leaks = equal_to_any(rows.columns["id_digests"], held_out)
    if leaks.any():
        lengths, counts = rows.columns["lengths"][leaks], rows.columns["trainable_counts"][leaks]
        total, trained = int(lengths.sum(dtype=np.int64)), int(counts.sum(dtype=np.int64))
        account.samples -= len(lengths)
        account.trainable -= trained
        account.context -= total - trained
        named = [f"{rows.source} row {row}" for row in rows.columns["row_ids"][leaks][:ROWS_KEPT].tolist()]
        account.dropped["held_out_duplicate"] = Portion(len(lengths), total, named)
        rows = rows.chosen(~leaks)
    return rows, account
