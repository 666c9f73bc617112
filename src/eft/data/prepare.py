"""Rows to token stores to training and evaluation data: `prepare_datasets` is the room's front door.

Each entry of `datasets` and `test_datasets` has a store of its own, found by a key made of what decides its ids, labels
and weights: source bytes, format, template text, tokenizer, masking code, lengths. Split, deduplication and order are
index arrays on top, so that another seed or `val_set_size` tokenises nothing.
"""

from __future__ import annotations

import errno
import importlib
import inspect
import shutil
from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from eft.config.data import DataConfig, DatasetConfig
from eft.config.formats import is_own_function
from eft.core import atomic
from eft.core.errors import ConfigError, DataError, EftError
from eft.core.hashing import hash_bytes, hash_file
from eft.core.records import Int64Array, Message, TokenDataset
from eft.data import cache
from eft.data.block_encoder import Job
from eft.data.cache import StoreKey, prepared_location
from eft.data.chat_template import template_of
from eft.data.entry import Progress, write_entry
from eft.data.formats import gives_conversations, resolve_format
from eft.data.gates_entry import GatedData, GatedEntry
from eft.data.ledger import ROWS_KEPT, Ledger, Portion, SourceLedger
from eft.data.masking_code import libraries, masking_code
from eft.data.mixture import Mixture, mix
from eft.data.sample_set import SampleSet, TokenView
from eft.data.shares import SourceShare
from eft.data.sources import source_fingerprint, source_names
from eft.data.speed import may_be_fast, num_processes, with_fast_tokenizer
from eft.data.store import TokenStore, open_store
from eft.data.store_writer import STORE_VERSION, StoreWriter
from eft.data.tokenize import tokenizer_fingerprint
from eft.data.workers import WorkerDiedError, Workers

__all__ = ["PreparedData", "prepare_datasets", "prepared_location"]

MAX_CONVERSATIONS = 64
_ALWAYS_READ = (*cache.LIMITS, "dataset_processes")


@dataclass
class PreparedData:
    """What the plan, the loader and the report need of the data."""

    train: TokenDataset
    evals: dict[str, TokenDataset]
    """Empty, `{"eval": …}`, or one per entry of `test_datasets`, by name."""
    ledger: Ledger
    cache_note: str
    """One line per entry: which store was reused, or why it was made anew."""
    eval_conversations: list[list[Message]] = field(default_factory=list)
    """Up to MAX_CONVERSATIONS held-out conversations; empty for formats without turns."""
    eval_tools: list[list[dict[str, Any]] | None] = field(default_factory=list)
    """The tool definitions of each of `eval_conversations`."""
    gated: GatedData | None = None
    """For the gates."""


@dataclass(frozen=True)
class HeldOut:
    """`test_datasets`, prepared without training data."""

    evals: dict[str, SampleSet]
    accounts: list[SourceLedger]
    notes: list[str]
    """One line per entry, as in `PreparedData.cache_note`."""
    gated: list[GatedEntry]


@dataclass
class _Prepared:
    store: TokenStore
    account: SourceLedger
    note: str
    template: str | None


def prepare_datasets(cfg: DataConfig, tokenizer: Any, *, progress: Progress | None = None) -> PreparedData:
    """Tokenise what no store has yet, then split, deduplicate and order by index. The ledger returned has been checked.

    Raises DataError (row, file, data set), ConfigError (val_set_size), PromiseBroken (ledger).
    """
    if cfg.test_datasets and cfg.val_set_size:
        raise ConfigError("test_datasets and val_set_size exclude each other: keep one of them")
    location = prepared_location(cfg)
    report = progress or (lambda what, done, total, speed: None)
    trains = [_prepare_entry(spec, "train", cfg, tokenizer, location, report) for spec in cfg.datasets]
    tests = [_prepare_entry(spec, "eval", cfg, tokenizer, location, report) for spec in cfg.test_datasets or ()]
    mixture = mix(
        np.concatenate([entry.store.id_digests for entry in trains]),
        np.concatenate([entry.store.sample_digests for entry in trains]),
        _rows([entry.store for entry in trains]),
        np.concatenate([entry.store.row_keys for entry in trains]),
        seed=cfg.seed,
        shuffle=cfg.shuffle_merged_datasets,
        deduplicate=cfg.dataset_exact_deduplication,
        val_set_size=cfg.val_set_size,
        test_id_digests=np.concatenate([entry.store.id_digests for entry in tests]) if tests else None,
        lengths=np.concatenate([entry.store.lengths for entry in trains]),
        sizes=[len(entry.store) for entry in trains],
        shares=[SourceShare.of(spec) for spec in cfg.datasets],
        epoch_tokens=epoch_tokens_of(cfg),
    )
    stores, sources = [entry.store for entry in trains], names_of(cfg.datasets)
    evals: dict[str, SampleSet] = {}
    if tests:
        names = _eval_names(cfg.test_datasets or [])
        evals = {name: entry.store for name, entry in zip(names, tests, strict=True)}
    elif len(mixture.held_out):
        evals = {"eval": TokenView(stores, mixture.held_out, sources)}
    train = TokenView(stores, mixture.train, sources)
    _account_mixture(trains, mixture)
    ledger = Ledger([entry.account for entry in (*trains, *tests)])
    ledger.check()
    conversations, tools = conversations_of(evals)
    return PreparedData(
        train=train,
        evals=dict(evals),
        ledger=ledger,
        cache_note="\n".join(entry.note for entry in (*trains, *tests)),
        eval_conversations=conversations,
        eval_tools=tools,
        gated=GatedData(_gated(cfg, tokenizer, trains, tests), train, dict(evals)),
    )


def prepare_held_out(cfg: DataConfig, tokenizer: Any, *, progress: Progress | None = None) -> HeldOut:
    """`test_datasets` alone, for training data that are streamed.

    Raises DataError, PromiseBroken.
    """
    location = prepared_location(cfg)
    report = progress or (lambda what, done, total, speed: None)
    specs = cfg.test_datasets or []
    tests = [_prepare_entry(spec, "eval", cfg, tokenizer, location, report) for spec in specs]
    accounts = [entry.account for entry in tests]
    Ledger(accounts).check()
    evals: dict[str, SampleSet] = dict(zip(_eval_names(specs), (entry.store for entry in tests), strict=True))
    return HeldOut(evals, accounts, [entry.note for entry in tests], _gated(cfg, tokenizer, [], tests))


# ---- one entry -----------------------------------------------------------------------------------------------------


def _prepare_entry(
    spec: DatasetConfig,
    split: Literal["train", "eval"],
    cfg: DataConfig,
    tokenizer: Any,
    location: Path,
    report: Progress,
) -> _Prepared:
    resolve_format(spec)  # a wrong `type` is told before anything is read
    template = template_for(spec, cfg, tokenizer)
    key, values = _key_of(spec, tokenizer, template), cache.values_of(spec, cfg)
    store = cache.reusable(location, key, values)
    note = f"{spec.path}: reused {store.path}" if store is not None else ""
    if store is None:
        cache.create_location(location)
        cache.remove_abandoned(location)
        waiting = f"{spec.path}: another process is preparing it"
        with cache.exclusive(location, key, values, lambda: report(waiting, 0, None, "")) as partial:
            store = cache.reusable(location, key, values)  # the other process may have finished it meanwhile
            if store is not None:
                note = f"{spec.path}: reused {store.path}"
            else:
                damaged = cache.discard_damaged(location, key)
                why = "its files were damaged" if damaged else cache.why_not_reused(location, spec.path, key, values)
                job = Job(spec, cfg, tokenizer, template)
                store, how = _build(partial, location, key, job, report)
                note = f"{spec.path}: tokenised into {store.path} ({why}){how}"
    for section, names in ((spec, store.meta["keys_read"]["spec"]), (cfg, store.meta["keys_read"]["cfg"])):
        for name in (*names, *(_ALWAYS_READ if section is cfg else ())):
            # The pass that made the store read these keys; they had their effect on a reused one, too (E8).
            getattr(section, name)
    names = source_names(spec)
    account = SourceLedger.from_json(store.meta["ledger"])
    account.name, account.split = spec.path, split
    account.rename_files(dict(zip(store.meta["files_read"], names, strict=True)))
    renamed = dict(zip(store.meta["files_read"], names, strict=True))
    return _Prepared(store.with_sources(renamed), account, note, template)


def _build(partial: Path, location: Path, key: StoreKey, job: Job, report: Progress) -> tuple[TokenStore, str]:
    """The finished store, and a remark on how it was made. What a killed process left in `partial` is gone on with."""
    spec, cfg = job.spec, job.cfg
    try:
        partial.mkdir(exist_ok=True)
        count = num_processes(job)
        with (
            StoreWriter(partial) as writer,
            Workers(count, fast=may_be_fast(job)) if count > 1 else nullcontext() as workers,
        ):
            resumed = writer.num_blocks
            job, remark = with_fast_tokenizer(job)
            tally = write_entry(writer, job, workers, report)
            tally.account.check()
            if source_fingerprint(spec) != key["rows"]:
                raise DataError(f"{spec.path}: was changed while it was prepared; run again once it is finished")
            uses = cache.uses_of(tally, spec, cfg)
            keys = {"spec": sorted(tally.spec_keys), "cfg": sorted(tally.cfg_keys)}
            meta = {
                "name": spec.path,
                "key": key,
                "uses": uses.to_json(),
                "keys_read": keys,
                "files_read": source_names(spec),
                "ledger": tally.account.to_json(),
            }
            writer.finish(meta, tally.to_json())
        folder = cache.store_folder(location, key, uses)
        atomic.commit_folder(partial, folder)
    except WorkerDiedError:
        raise  # what is finished is good
    except EftError:
        shutil.rmtree(partial, ignore_errors=True)  # nothing of it can be of use
        raise
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO):
            raise
        raise DataError(
            f"{location}: prepared data cannot be written there ({error.strerror}); free some space, or set "
            f"dataset_prepared_path to another folder. What is finished is kept in {partial}: a new try goes on there"
        ) from error
    return open_store(folder), remark + (f"; went on after {resumed} finished blocks" if resumed else "")


def template_for(spec: DatasetConfig, cfg: DataConfig, tokenizer: Any) -> str | None:
    """The template's text, for formats that give conversations."""
    needed = gives_conversations(spec)
    if needed is False:
        return None
    is_default = cfg.chat_template == "tokenizer_default" and spec.chat_template is None
    if needed is None and is_default and spec.chat_template_jinja is None and not tokenizer.chat_template:
        return None  # the user's function may well give segments or ids; if it gives turns, `encode_examples` objects
    return template_of(tokenizer, cfg, spec)


def _key_of(spec: DatasetConfig, tokenizer: Any, template: str | None) -> StoreKey:
    """What a store is made of. A user's function counts with its file; what that imports does not."""
    # `model_dump` does not count as reading a key (E8): whether the format uses it shows when rows are tokenised.
    type_ = spec.model_dump(include={"type"})["type"]
    function = None
    if is_own_function(type_):
        module = importlib.import_module(cast("str", type_).split(":")[0])
        function = hash_file(Path(inspect.getfile(module)))
    is_tokenised = type_ in (None, "pretokenized")
    return {
        "store version": STORE_VERSION,
        "masking code": masking_code(),
        "libraries": None if is_tokenised else libraries(),
        "rows": source_fingerprint(spec),
        # Ids that are given depend on the tokenizer only by the number of its tokens.
        "tokenizer": f"{len(tokenizer)} tokens" if is_tokenised else tokenizer_fingerprint(tokenizer, template),
        "template": None if template is None else hash_bytes(template.encode()),
        "type": type_ or "pretokenized",
        "function": function,
    }


def _gated(cfg: DataConfig, tokenizer: Any, trains: list[_Prepared], tests: list[_Prepared]) -> list[GatedEntry]:
    """What the gates need of each data set; `trains` may be left out."""
    tested = cfg.test_datasets or []
    named = [*zip(names_of(cfg.datasets), cfg.datasets, strict=True)] if trains else []
    named += [(f"{name} (evaluation)", spec) for name, spec in zip(names_of(tested), tested, strict=True)]
    return [
        GatedEntry(name, spec, cfg, entry.store, entry.account, tokenizer, entry.template)
        for (name, spec), entry in zip(named, [*trains, *tests], strict=True)
    ]


# ---- all entries ---------------------------------------------------------------------------------------------------


def epoch_tokens_of(cfg: DataConfig) -> int | None:
    """`epoch_tokens`, read where a data set has a share that it decides (E8)."""
    return cfg.epoch_tokens if any(spec.token_share is not None for spec in cfg.datasets) else None


def _rows(stores: list[TokenStore]) -> Int64Array:
    """The same number for neighbouring samples of the same row, int64 [samples of all stores]."""
    starts = [
        np.concatenate([[True], (np.diff(store.row_ids) != 0) | (np.diff(store.source_ids) != 0)]) for store in stores
    ]
    return np.cumsum(np.concatenate(starts), dtype=np.int64)


def _eval_names(specs: list[DatasetConfig]) -> list[str]:
    """`eval` for a single one, else as `names_of`."""
    return ["eval"] if len(specs) == 1 else names_of(specs)


def names_of(specs: list[DatasetConfig]) -> list[str]:
    """A short name for each data set: its `name` or file stem, numbered where several share it."""
    names: list[str] = []
    taken: Counter[str] = Counter()
    for spec in specs:
        name = spec.name or Path(spec.path).name.split(".")[0]
        taken[name] += 1
        names.append(name if taken[name] == 1 else f"{name}_{taken[name]}")
    return names


def _account_mixture(trains: list[_Prepared], mixture: Mixture) -> None:
    """Move what the mixture held out or left out from each source's samples to its own column."""
    start = 0
    for entry in trains:
        end = start + len(entry.store)

        account, store = entry.account, entry.store
        train = _within(mixture.train, start, end)
        account.samples = len(train)
        account.trainable = int(store.trainable_counts[train].sum(dtype=np.int64))
        account.context = int(store.lengths[train].sum(dtype=np.int64)) - account.trainable
        account.held_out = _portion(store, np.sort(_within(mixture.held_out, start, end)))
        times = np.bincount(train, minlength=len(store))
        more = np.maximum(times - 1, 0)
        account.repeated = Portion(int(more.sum()), int((more * store.lengths).sum(dtype=np.int64)))
        for reason, indices in (
            ("duplicate", mixture.duplicates),
            ("held_out_duplicate", mixture.held_out_duplicates),
            ("over_cap", mixture.over_cap),
            ("not_drawn", mixture.not_drawn),
        ):
            portion = _portion(store, _within(indices, start, end))
            if portion.rows:
                account.dropped[reason] = portion
        start = end


def _within(indices: Int64Array, start: int, end: int) -> Int64Array:
    """Those of `indices` in start..end-1, counted from `start`."""
    return indices[(indices >= start) & (indices < end)] - start


def _portion(store: TokenStore, indices: Int64Array) -> Portion:
    return Portion(
        rows=len(indices),
        tokens=int(store.lengths[indices].sum(dtype=np.int64)),
        first_rows=[store.origin(int(index)) for index in indices[:ROWS_KEPT]],
    )


def conversations_of(
    evals: Mapping[str, SampleSet],
) -> tuple[list[list[Message]], list[list[dict[str, Any]] | None]]:
    """Conversations from the start of each held-out set, an equal number of each, and the tools of each."""
    found: list[dict[str, Any]] = []
    for dataset in evals.values():
        share = min(MAX_CONVERSATIONS // len(evals), len(dataset))
        found += [conversation for index in range(share) if (conversation := dataset.conversation(index)) is not None]
    return [conversation["messages"] for conversation in found], [conversation["tools"] for conversation in found]
