"""Rows with images to training and evaluation data. Images are opened once here, to know how many tokens they take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from eft.config.data import DatasetConfig
from eft.config.root import TrainConfig
from eft.core.errors import DataError
from eft.data.cache import prepared_location
from eft.data.entry import Progress
from eft.data.formats import Example, check_roles_to_train, resolve_format
from eft.data.gates_entry import GatedData, GatedEntry
from eft.data.gates_images import ImageGate, gated_images
from eft.data.image_rows import ImageRowEncoder, ImageSample
from eft.data.image_set import ImageSet
from eft.data.images import ImageFinder, ImageSize
from eft.data.ledger import Ledger, SourceLedger
from eft.data.masks import MaskRules
from eft.data.mixture import held_out_count, random_order
from eft.data.prepare import PreparedData, names_of, template_for
from eft.data.readers import Row
from eft.data.rows import rows_of
from eft.data.sample_set import SampleSet, TokenView
from eft.data.sources import iter_blocks, no_rows
from eft.data.turns import UnprovableError

_SPLIT_STREAM, _ORDER_STREAM = 11, 12


@dataclass
class _Entry:
    samples: ImageSet
    account: SourceLedger
    gated: GatedEntry


def image_size_of(cfg: TrainConfig) -> ImageSize:
    """`image_size` and how to resize to it."""
    size = cfg.image_size
    if size is None:
        return ImageSize()
    return ImageSize(
        (size[0], size[1]) if isinstance(size, list) else size,
        cfg.image_resize_algorithm,
    )


def prepare_images(cfg: TrainConfig, processor: Any, *, progress: Progress | None = None) -> PreparedData:
    """The data of a run whose rows have images. Nothing is cached but images that come as bytes.

    Raises DataError naming the row, the turn and the image or field that is wrong.
    """
    trains = [
        _entry(spec, name, "train", cfg, processor)
        for spec, name in zip(cfg.datasets, names_of(cfg.datasets), strict=True)
    ]
    specs = cfg.test_datasets or []
    names = ["eval"] if len(specs) == 1 else names_of(specs)
    tests = {name: _entry(spec, name, "eval", cfg, processor) for spec, name in zip(specs, names, strict=True)}
    sets, sources = [entry.samples for entry in trains], names_of(cfg.datasets)
    count = sum(len(each) for each in sets)
    drawn = random_order(count, cfg.seed, _SPLIT_STREAM)
    number = held_out_count(count, cfg.val_set_size)
    held_out, kept = drawn[:number], np.sort(drawn[number:])
    if cfg.shuffle_merged_datasets:
        kept = kept[random_order(len(kept), cfg.seed, _ORDER_STREAM)]
    whole = TokenView(sets, np.arange(count), sources)
    forbidden = np.concatenate([whole.id_digests[held_out], *(entry.samples.id_digests for entry in tests.values())])
    leaks = np.isin(whole.id_digests[kept], forbidden)
    _account(trains, whole, held_out, kept[leaks])
    kept = kept[~leaks]
    if not len(kept):
        raise DataError("nothing is left to train on: every row is held out, or equal to one that is")
    evals: dict[str, Any] = {name: entry.samples for name, entry in tests.items()}
    if len(held_out):
        evals["eval"] = TokenView(sets, held_out, sources)
    ledger = Ledger([entry.account for entry in (*trains, *tests.values())])
    ledger.check()
    blocks = [entry.gated.store for entry in trains]
    gated_evals: dict[str, SampleSet] = {name: entry.gated.store for name, entry in tests.items()}
    if len(held_out):
        gated_evals["eval"] = TokenView(blocks, held_out, sources)
    gated = GatedData(
        [entry.gated for entry in (*trains, *tests.values())], TokenView(blocks, kept, sources), gated_evals
    )
    train = TokenView(sets, kept, sources)
    return PreparedData(train=train, evals=evals, ledger=ledger, cache_note="", gated=gated)


def _entry(spec: DatasetConfig, name: str, split: Literal["train", "eval"], cfg: TrainConfig, processor: Any) -> _Entry:
    check_roles_to_train(spec)
    template = template_for(spec, cfg, processor.tokenizer)
    assert template is not None, "conversations have a template"
    encoder = ImageRowEncoder(processor, template, MaskRules.of(spec, cfg), image_size_of(cfg))
    finder = ImageFinder(spec, prepared_location(cfg) / "images")
    reading = _Reading(cfg, spec, finder, encoder, SourceLedger(spec.path, split))
    for block in iter_blocks(spec):
        for row in rows_of(block, reading.broken):
            reading.take(row)
    if not reading.account.rows:
        raise no_rows(spec)
    if not reading.samples:
        dropped = "; ".join(
            f"{portion.rows} {reason.replace('_', ' ')} (first: {portion.first_rows[0]})"
            for reason, portion in reading.account.dropped.items()
        )
        raise DataError(f"{spec.path}: none of its {reading.account.rows} rows can be trained on: {dropped}")
    samples = ImageSet(reading.samples, reading.origins, reading.rows, name)
    images = ImageGate(processor, samples.samples, image_size_of(cfg), frozenset(encoder.placeholders))
    shown = name if split == "train" else f"{name} (evaluation)"
    gated = GatedEntry(
        shown,
        spec,
        cfg,
        gated_images(samples, reading.examples),
        reading.account,
        processor.tokenizer,
        template,
        images,
    )
    return _Entry(samples, reading.account, gated)


class _Reading:
    """The rows of one entry, on their way to samples and into the account."""

    def __init__(
        self,
        cfg: TrainConfig,
        spec: DatasetConfig,
        finder: ImageFinder,
        encoder: ImageRowEncoder,
        account: SourceLedger,
    ) -> None:
        self._cfg, self._spec = cfg, spec
        self._finder, self._encoder = finder, encoder
        self._format = resolve_format(spec)
        self.account = account
        self.samples: list[ImageSample] = []
        self.examples: list[Example] = []
        """The conversation of each sample's row."""
        self.origins: list[str] = []
        self.rows: list[int] = []

    def broken(self, number: int, error: DataError) -> None:
        if self._cfg.malformed_rows == "raise":
            raise error
        self.account.rows += 1
        self.account.drop("malformed", str(error), 0)

    def take(self, row: Row) -> None:
        try:
            changed, images = self._finder(row)
            example = self._format(changed, self._spec)
            found = self._encoder(example, images)
        except DataError as error:
            self.broken(row.number, error)
            return
        except UnprovableError as error:
            self.broken(row.number, DataError(f"{row.where}: {error}"))
            return
        self.account.rows += 1
        self.account.further_samples += len(found) - 1
        for sample in found:
            self._keep(row, example, sample)

    def _keep(self, row: Row, example: Example, sample: ImageSample) -> None:
        length = len(sample.input_ids)
        self.account.raw += length
        trained = int(np.count_nonzero(sample.labels[1:] != -100))
        if length > self._cfg.sequence_len:
            if self._cfg.excess_length_strategy == "raise":
                raise DataError(
                    f"{row.where}: {length} tokens, those of its images included, exceed sequence_len "
                    f"{self._cfg.sequence_len}; set a smaller `image_size`, or sequence_len to {length} or more"
                )
            self.account.drop("too_long", row.where, length)
        elif length < self._cfg.min_sample_len:
            self.account.drop("too_short", row.where, length)
        elif not trained:
            self.account.drop("no_trainable_tokens", row.where, length)
        else:
            self.account.samples += 1
            self.account.trainable += trained
            self.account.context += length - trained
            self.samples.append(sample)
            self.examples.append(example)
            self.origins.append(row.where)
            self.rows.append(row.number)


def _account(trains: Sequence[_Entry], whole: TokenView, held_out: Any, leaks: Any) -> None:
    """Move what is held out, or equal to what is, to its own column of each source."""
    for number, entry in enumerate(trains):
        for indices, reason in ((held_out, None), (leaks, "held_out_duplicate")):
            mine = indices[whole.groups()[indices] == number]
            for index in mine.tolist():
                length, trained = int(whole.lengths[index]), int(whole.trainable_counts[index])
                entry.account.samples -= 1
                entry.account.trainable -= trained
                entry.account.context -= length - trained
                if reason is None:
                    entry.account.held_out.add(whole.origin(index), length)
                else:
                    entry.account.drop("held_out_duplicate", whole.origin(index), length)
