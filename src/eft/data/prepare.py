"""Rows to token stores to training and evaluation data: `prepare_datasets` is the room's front door.

Each entry of `datasets` and `test_datasets` has a store of its own, found by a key made of what decides its ids, labels
and weights: source bytes, format, template text, tokenizer, masking code, lengths. Split, deduplication and order are
index arrays on top, so that another seed or `val_set_size` tokenises nothing.
"""

from __future__ import annotations

import errno
import importlib
import inspect
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from eft.config.data import DataConfig, DatasetConfig
from eft.config.section import Section
from eft.core import atomic
from eft.core.errors import ConfigError, DataError
from eft.core.hashing import hash_bytes, hash_file
from eft.core.records import Int64Array, Message, TokenDataset
from eft.data import cache
from eft.data.cache import StoreKey, prepared_location
from eft.data.chat_template import resolve_template
from eft.data.entry import Progress, write_entry
from eft.data.formats import resolve_format
from eft.data.ledger import ROWS_KEPT, Ledger, Portion, SourceLedger
from eft.data.mixture import Mixture, mix
from eft.data.sample_set import SampleSet, TokenView
from eft.data.sources import source_fingerprint
from eft.data.store import STORE_VERSION, StoreWriter, TokenStore, open_store
from eft.data.tokenize import MASKING_VERSION, tokenizer_fingerprint

__all__ = ["PreparedData", "prepare_datasets", "prepared_location"]

MAX_CONVERSATIONS = 64


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


@dataclass
class _Prepared:
    store: TokenStore
    account: SourceLedger
    note: str


def prepare_datasets(cfg: DataConfig, tokenizer: Any, *, progress: Progress | None = None) -> PreparedData:
    """Tokenise what no store has yet, then split, deduplicate and order by index. The ledger returned has been checked.

    Raises DataError (row, file, data set), ConfigError (val_set_size), PromiseBroken (ledger).
    """
    if cfg.test_datasets and cfg.val_set_size:
        raise ConfigError("test_datasets and val_set_size exclude each other: keep one of them")
    location = prepared_location(cfg)
    report = progress or (lambda what, done, total: None)
    trains = [_prepare_entry(spec, "train", cfg, tokenizer, location, report) for spec in cfg.datasets]
    tests = [_prepare_entry(spec, "eval", cfg, tokenizer, location, report) for spec in cfg.test_datasets or ()]
    mixture = mix(
        np.concatenate([entry.store.id_digests for entry in trains]),
        np.concatenate([entry.store.sample_digests for entry in trains]),
        seed=cfg.seed,
        shuffle=cfg.shuffle_merged_datasets,
        deduplicate=cfg.dataset_exact_deduplication,
        val_set_size=cfg.val_set_size,
        test_id_digests=np.concatenate([entry.store.id_digests for entry in tests]) if tests else None,
    )
    stores = [entry.store for entry in trains]
    evals: dict[str, SampleSet] = {}
    if tests:
        names = _eval_names(cfg.test_datasets or [])
        evals = {name: entry.store for name, entry in zip(names, tests, strict=True)}
    elif len(mixture.held_out):
        evals = {"eval": TokenView(stores, mixture.held_out)}
    _account_mixture(trains, mixture)
    ledger = Ledger([entry.account for entry in (*trains, *tests)])
    ledger.check()
    conversations = _conversations(list(evals.values()))
    return PreparedData(
        train=TokenView(stores, mixture.train),
        evals=dict(evals),
        ledger=ledger,
        cache_note="\n".join(entry.note for entry in (*trains, *tests)),
        eval_conversations=[conversation["messages"] for conversation in conversations],
        eval_tools=[conversation["tools"] for conversation in conversations],
    )


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
    template = _template_of(spec, cfg, tokenizer)
    key = _key_of(spec, cfg, tokenizer, template)
    folder = cache.store_folder(location, key)
    store = cache.reusable(folder)
    note = f"{spec.path}: reused {folder}"
    if store is None:
        cache.create_location(location)
        cache.remove_abandoned(location)
        with cache.exclusive(folder, lambda: report(f"{spec.path}: another process is preparing it", 0, None)):
            store = cache.reusable(folder)  # the other process may have finished it meanwhile
            if store is None:
                damaged = cache.discard_damaged(folder)
                why = "its files were damaged" if damaged else cache.why_not_reused(location, spec.path, key)
                note = f"{spec.path}: tokenised into {folder} ({why})"
                store = _build(folder, key, spec, cfg, tokenizer, template, report)
    for section, names in ((spec, store.meta["keys_read"]["spec"]), (cfg, store.meta["keys_read"]["cfg"])):
        for name in names:
            # The pass that made the store read these keys; they had their effect on a reused one, too (E8).
            getattr(section, name)
    account = SourceLedger.from_json(store.meta["ledger"])
    account.split = split
    return _Prepared(store, account, note)


@contextmanager
def _reads_of(section: Section) -> Iterator[set[str]]:
    """The keys of `section` that are read inside; reads from before are kept."""
    # Nested entries (`datasets` of the whole config) are forgotten along with the section, so remember theirs, too.
    before = [(part, part.keys_read()) for part in (section, *(nested for _, nested in section.nested_sections()))]
    section.forget_reads()
    reads: set[str] = set()
    try:
        yield reads
        reads |= section.keys_read()
    finally:
        for part, names in before:
            for name in names:
                getattr(part, name)


def _build(
    folder: Path,
    key: StoreKey,
    spec: DatasetConfig,
    cfg: DataConfig,
    tokenizer: Any,
    template: str | None,
    report: Progress,
) -> TokenStore:
    try:
        with atomic.new_folder(folder) as temporary, StoreWriter(temporary) as writer:
            with _reads_of(spec) as spec_reads, _reads_of(cfg) as cfg_reads:
                account = write_entry(writer, spec, cfg, tokenizer, template, report)
            account.check()
            reads = {"spec": sorted(spec_reads), "cfg": sorted(cfg_reads)}
            writer.finish({"name": spec.path, "key": key, "keys_read": reads, "ledger": account.to_json()})
    except FileExistsError:
        pass  # without locks another process was faster; equal keys give equal stores
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        raise DataError(
            f"{folder.parent}: prepared data cannot be written there ({error.strerror}); free some space, or set "
            "dataset_prepared_path to another folder"
        ) from error
    return open_store(folder)


def _is_dotted(spec: DatasetConfig) -> bool:
    return spec.type is not None and ":" in spec.type


def _template_of(spec: DatasetConfig, cfg: DataConfig, tokenizer: Any) -> str | None:
    """The template's text, for formats that give conversations."""
    if spec.type != "chat_template" and not _is_dotted(spec):
        return None
    chosen = spec.chat_template or cfg.chat_template
    if _is_dotted(spec) and chosen == "tokenizer_default" and not tokenizer.chat_template:
        return None  # the user's function may well give segments or ids; if it gives turns, `encode_examples` objects
    return resolve_template(tokenizer, chosen, cfg.chat_template_jinja if chosen == "jinja" else None)


def _key_of(spec: DatasetConfig, cfg: DataConfig, tokenizer: Any, template: str | None) -> StoreKey:
    """What decides the bytes of the store. A user's function counts with its file; what that imports does not."""
    # `model_dump` does not count as reading a key (E8): whether the format uses it shows when rows are tokenised.
    function = None
    if _is_dotted(spec):
        module = importlib.import_module(cast("str", spec.type).split(":")[0])
        function = hash_file(Path(inspect.getfile(module)))
    return {
        "store version": STORE_VERSION,
        "masking version": MASKING_VERSION,
        "rows": source_fingerprint(spec),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "template": None if template is None else hash_bytes(template.encode()),
        "function": function,
        "train_on_inputs": cfg.model_dump(include={"train_on_inputs"})["train_on_inputs"],
        "sequence_len": cfg.sequence_len,
        "excess_length_strategy": cfg.excess_length_strategy,
        "min_sample_len": cfg.min_sample_len,
        "malformed_rows": cfg.malformed_rows,
        **{f"datasets.{name}": value for name, value in spec.model_dump(mode="json").items()},
    }


# ---- all entries ---------------------------------------------------------------------------------------------------


def _eval_names(specs: list[DatasetConfig]) -> list[str]:
    """`eval` for a single one, else each one's `name` or file stem, numbered where several share it."""
    if len(specs) == 1:
        return ["eval"]
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
        for reason, indices in (("duplicate", mixture.duplicates), ("held_out_duplicate", mixture.held_out_duplicates)):
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


def _conversations(evals: list[SampleSet]) -> list[dict[str, Any]]:
    """Conversations from the start of each held-out set, an equal number of each."""
    found: list[dict[str, Any]] = []
    for dataset in evals:
        share = min(MAX_CONVERSATIONS // len(evals), len(dataset))
        found += [conversation for index in range(share) if (conversation := dataset.conversation(index)) is not None]
    return found
