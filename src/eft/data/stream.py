"""A stream of samples from several sources, and its windows: the samples that are held, shuffled and packed together.

Sources take turns by the tokens drawn from each: the next sample is of the one that is furthest behind its share. No
random number is drawn, so the state of a stream is a few counters, and the same rows come on every machine.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from eft.core.errors import DataError
from eft.core.records import Float64Array, Int32Array, TokenSample
from eft.data.ledger import SourceLedger
from eft.data.packing import Packing, PackingRule, Strategy, choose, one_per_bin, pack, random_key, rule_of
from eft.data.sample_set import measure
from eft.data.stream_source import Drawn, Reading, SourceState, StreamSource

BUFFER_TOKENS = 1 << 24
"""A window holds no more tokens, 128 MiB of ids and labels, whatever `streaming_multipack_buffer_size`."""
_WINDOW_STAGE = 101


class StreamDataset:
    """What `datasets` gives under `streaming: true`. Has no length of its own: a plan says how much of it is used.

    As a `TokenDataset` it holds the head of each source, for a look at what will be trained.
    """

    column_names: Sequence[str] = ("input_ids", "labels")

    def __init__(self, sources: Sequence[StreamSource], fingerprint: str, head: Sequence[TokenSample]) -> None:
        self.sources = list(sources)
        self.fingerprint = fingerprint
        self.head = list(head)
        self.lengths: Int32Array = np.array([len(sample.input_ids) for sample in head], np.int32)
        measures = [measure(sample) for sample in head]
        self.trainable_counts: Int32Array = np.array([count for count, _ in measures], np.int32)
        self.weight_sums: Float64Array = np.array([weight for _, weight in measures], np.float64)

    def __len__(self) -> int:
        """Samples of the head."""
        return len(self.head)

    def sample(self, index: int) -> TokenSample:
        """One of the head."""
        return self.head[index]


@dataclass(frozen=True)
class StreamState:
    """Where a stream is: before a window. A few hundred bytes per source."""

    window: int
    """Number of the window."""
    drawn: tuple[int, ...]
    """Tokens drawn from each source."""
    sources: tuple[SourceState, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "window": self.window,
            "drawn": list(self.drawn),
            "sources": [source.to_json() for source in self.sources],
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> StreamState:
        sources = tuple(SourceState.from_json(source) for source in value["sources"])
        return cls(value["window"], tuple(value["drawn"]), sources)

    @classmethod
    def before(cls, dataset: StreamDataset) -> StreamState:
        """The start of a stream."""
        return cls(0, (0,) * len(dataset.sources), tuple(source.start() for source in dataset.sources))


@dataclass(frozen=True)
class WindowRule:
    """How a window is filled and packed."""

    buffer_samples: int
    capacity: int
    """Longest bin, in tokens."""
    strategy: Strategy | None
    """As asked for; None where bins are single samples."""
    is_auto: bool
    bin_samples: int | None
    shuffle: bool
    seed: int
    vocabulary_rows: int | None = None
    """Rows of the model's embedding; larger ids are refused. None: not known."""
    position_rows: int | None = None
    """Tokens of a document that the model can number; None where it has no such table."""

    @classmethod
    def of(
        cls,
        *,
        buffer_samples: int,
        capacity: int,
        packed: bool,
        sequential: bool,
        strategy: Strategy | Literal["auto"],
        bin_samples: int | None,
        shuffle: bool,
        seed: int,
        vocabulary_rows: int | None = None,
        position_rows: int | None = None,
    ) -> WindowRule:
        """By the options of a plan."""
        is_auto = strategy == "auto" and not sequential
        named: Strategy = "sequential" if sequential else "fit" if strategy == "auto" else strategy
        wanted = named if packed else None
        numbers = (bin_samples, shuffle, seed, vocabulary_rows, position_rows)
        return cls(buffer_samples, capacity, wanted, is_auto, *numbers)

    def pack(self, lengths: Int32Array, window: int) -> Packing:
        """The bins of a window, which depend on nothing but its lengths, its number and the rule."""
        if self.strategy is None:
            return one_per_bin(lengths, self.capacity, self.seed, window, shuffle=self.shuffle)
        if self.is_auto and self.shuffle:
            seed = int(random_key(self.seed, window, _WINDOW_STAGE))
            return choose(lengths, self.capacity, seed, bin_samples=self.bin_samples).packing
        rule: PackingRule = rule_of(self.strategy, len(lengths), self.bin_samples)
        return pack(lengths, self.capacity, self.seed, window, rule=rule, shuffle=self.shuffle)


@dataclass(frozen=True)
class WindowFacts:
    """What is known of a window once its samples are gone."""

    start: StreamState
    """From here the window is made again."""
    accounts: tuple[SourceLedger, ...]
    """Of each source's blocks that were opened by the end of the window."""
    rounds: tuple[int, ...]
    waiting: tuple[tuple[int, int], ...]
    """(samples, tokens) of those blocks that are in no window yet."""


@dataclass(frozen=True)
class Window:
    """Samples that are in memory, and their bins. Arrays are [samples]."""

    facts: WindowFacts
    samples: list[TokenSample]
    lengths: Int32Array
    trained: Int32Array
    weights: Float64Array
    owners: Int32Array
    """The source of each."""
    packing: Packing

    def rest(self, first_bin: int, num_sources: int) -> list[tuple[int, int]]:
        """(samples, tokens) per source in the bins from `first_bin` on."""
        ids = self.packing.order[self.packing.offsets[first_bin] :]
        samples = np.bincount(self.owners[ids], minlength=num_sources)
        tokens = np.bincount(self.owners[ids], self.lengths[ids], minlength=num_sources)
        return [(int(count), int(total)) for count, total in zip(samples, tokens, strict=True)]


def windows(dataset: StreamDataset, rule: WindowRule, state: StreamState) -> Generator[Window]:
    """The windows of a stream from `state` on, without end, each made in a thread while the one before is in use."""
    with closing(_made(dataset, rule, state)) as made, ThreadPoolExecutor(1, thread_name_prefix="eft-stream") as thread:
        following = thread.submit(next, made)
        while True:
            window = following.result()
            following = thread.submit(next, made)
            yield window


def _made(dataset: StreamDataset, rule: WindowRule, state: StreamState) -> Generator[Window]:
    readings = [Reading(source, start) for source, start in zip(dataset.sources, state.sources, strict=True)]
    shares = [source.share for source in dataset.sources]
    drawn, number = list(state.drawn), state.window
    try:
        while True:
            for reading in readings:
                reading.ready()
            start = StreamState(number, tuple(drawn), tuple(reading.state() for reading in readings))
            rounds = [reading.rounds() for reading in readings]
            samples: list[Drawn] = []
            owners: list[int] = []
            held = 0
            while len(samples) < rule.buffer_samples and held < BUFFER_TOKENS:
                owner = min(range(len(readings)), key=lambda index: drawn[index] / shares[index])
                readings[owner].ready()
                if all(reading.rounds() > before for reading, before in zip(readings, rounds, strict=True)):
                    break  # every row has been in it: small data are trained once in each round, as in an epoch
                sample = readings[owner].draw()
                _check(sample, rule)
                samples.append(sample)
                owners.append(owner)
                drawn[owner] += len(sample.tokens.input_ids)
                held += len(sample.tokens.input_ids)
            yield _window(start, readings, samples, owners, rule)
            number += 1
    finally:
        for reading in readings:
            reading.close()


def _window(
    start: StreamState, readings: list[Reading], samples: list[Drawn], owners: list[int], rule: WindowRule
) -> Window:
    lengths = np.array([len(sample.tokens.input_ids) for sample in samples], np.int32)
    facts = WindowFacts(
        start,
        tuple(reading.opened() for reading in readings),
        tuple(reading.rounds() for reading in readings),
        tuple(reading.waiting() for reading in readings),
    )
    return Window(
        facts,
        [sample.tokens for sample in samples],
        lengths,
        np.array([sample.trained for sample in samples], np.int32),
        np.array([sample.weight for sample in samples], np.float64),
        np.array(owners, np.int32),
        rule.pack(lengths, start.window),
    )


def _check(sample: Drawn, rule: WindowRule) -> None:
    """Raise DataError naming a row with an id, or a length, that the model has no row of a table for."""
    ids = sample.tokens.input_ids
    if rule.vocabulary_rows is not None and ids.max() >= rule.vocabulary_rows:
        raise DataError(
            f"{sample.where}: the id {ids.max()} is none of the model's {rule.vocabulary_rows} (0 to "
            f"{rule.vocabulary_rows - 1}); tokenise with the model's own tokenizer"
        )
    if rule.position_rows is not None and len(ids) > rule.position_rows:
        raise DataError(
            f"{sample.where}: {len(ids)} tokens, but the model's table of learned positions has {rule.position_rows}; "
            f"set `sequence_len: {rule.position_rows}` or less"
        )
