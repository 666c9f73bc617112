"""Where prepared stores lie, which of them may be reused, who may write them.

A store belongs to its `StoreKey`: the rows, the tokenizer, the template and the code that made it, by content. Options
count only where they had a say: a store remembers the values of those that its rows' format read, and how long its
samples were, so that `sequence_len` matters only where some sample is longer.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eft.config.data import DataConfig, DatasetConfig
from eft.core.errors import DataError
from eft.core.hashing import hash_json
from eft.data.block_encoder import Tally
from eft.data.seen import Seen
from eft.data.store import TokenStore, open_store
from eft.data.store_writer import META_FILE

StoreKey = Mapping[str, Any]
"""What every store is made of: flat, JSON-able."""

_KEY_CHARACTERS = 24
_OPTION_CHARACTERS = 8
_VALUE_CHARACTERS = 40
_PARTIAL = ".partial-"
_LOCK = ".lock-"
_ABANDONED_AFTER_S = 24 * 3600.0
_IN_KEY = {"path", "type"}
_IN_ENTRY = {"train_on_inputs"}
"""Global keys that are the default of an entry's key, which is what counts."""
_OF_PLACE = ("path", "name", "ds_type", "data_files", "revision", "split")
_OF_SHARE = ("weight", "token_share", "max_rows", "max_tokens")
_OF_MIXTURE = (
    "val_set_size",
    "shuffle_merged_datasets",
    "dataset_exact_deduplication",
    "seed",
    "dataset_prepared_path",
    "dataset_processes",
    "epoch_tokens",
    "data_gates",
    "data_gate_limits",
    "data_gate_conversations",
)
NO_SAY = frozenset(_OF_MIXTURE)
"""Keys that never decide what becomes of a row."""
LIMITS = ("sequence_len", "excess_length_strategy", "min_sample_len", "malformed_rows")
"""Keys that every preparation goes by, and that matter to a store only where they were met."""


def prepared_location(cfg: DataConfig) -> Path:
    """The folder of all prepared stores: `dataset_prepared_path`, else `$EFT_CACHE`, else `~/.cache/eft`."""
    chosen = cfg.dataset_prepared_path or os.environ.get("EFT_CACHE") or "~/.cache/eft"
    return Path(chosen).expanduser()


# ---- what a store depends on ----


@dataclass(frozen=True)
class Uses:
    """What of the config had a say in a store."""

    options: dict[str, Any]
    """Value of each key that decided something: `datasets.roles_to_train`, `train_on_inputs`."""
    longest: int | None
    """Tokens of the longest sample, where none was too long: any `sequence_len` from there on gives the same store."""
    shortest: int | None
    """Tokens of the shortest sample, where none was too short."""
    seen: Mapping[str, Any] | None = None
    """What its rows had that keys speak of, see `seen.Seen`; None: not known."""

    def to_json(self) -> dict[str, Any]:
        return dict(self.__dict__)


def values_of(spec: DatasetConfig, cfg: DataConfig) -> dict[str, Any]:
    """The values of all keys that may decide what becomes of a row, under the names that `Uses.options` has.

    Where the rows are does not count (their content does), nor how often they are trained. Does not count as reading
    the keys (E8).
    """
    own = spec.model_dump(mode="json", exclude={*_OF_PLACE, *_OF_SHARE})
    # What null means, so that writing it out changes nothing.
    own["train_on_eot"] = own["train_on_eot"] or own["train_on_eos"]
    if own["train_on_inputs"] is None:
        own["train_on_inputs"] = cfg.model_dump(include={"train_on_inputs"})["train_on_inputs"]
    names = set(DataConfig.model_fields) - {"datasets", "test_datasets", *NO_SAY}
    return {f"datasets.{name}": value for name, value in own.items()} | cfg.model_dump(mode="json", include=names)


def uses_of(tally: Tally, spec: DatasetConfig, cfg: DataConfig) -> Uses:
    """What had a say in the store of these rows."""
    values = values_of(spec, cfg)
    names = {f"datasets.{name}" for name in tally.spec_keys - _IN_KEY} | (tally.cfg_keys - {*LIMITS, *_IN_ENTRY})
    assert not tally.cfg_keys & NO_SAY, tally.cfg_keys
    dropped = tally.account.dropped
    too_long = tally.is_cut or tally.account.truncated_rows > 0 or "too_long" in dropped
    too_short = "too_short" in dropped
    if too_long:
        names |= {"sequence_len", "excess_length_strategy"}
    if too_short:
        names.add("min_sample_len")
    if "malformed" in dropped or "template" in dropped:
        names.add("malformed_rows")
    options = {name: values[name] for name in sorted(names)}
    lengths = (None if too_long else tally.longest, None if too_short else tally.shortest)
    return Uses(options, *lengths, tally.seen.to_json())


def obstacles(uses: Uses, values: Mapping[str, Any]) -> list[str]:
    """Why these values would give another store; empty where they give the same."""
    options = uses.options
    if uses.seen is not None:
        seen = Seen.from_json(uses.seen)
        options = {
            name: old
            for name, old in options.items()
            if old == values.get(name) or not seen.had_no_say(name, old, values.get(name))
        }
    found = _differences(options, {name: values.get(name) for name in options})
    if uses.longest is not None and values["sequence_len"] < uses.longest:
        found.append(f"sequence_len {values['sequence_len']} is below its longest sample, {uses.longest} tokens")
    if uses.shortest is not None and values["min_sample_len"] > uses.shortest:
        found.append(f"min_sample_len {values['min_sample_len']} is above its shortest sample, {uses.shortest} tokens")
    return found


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    changes = []
    for part in sorted({*old, *new}):
        before, after = (json.dumps(key.get(part), ensure_ascii=False, sort_keys=True) for key in (old, new))
        if before != after:
            short = max(len(before), len(after)) <= _VALUE_CHARACTERS
            changes.append(f"{part} {before} → {after}" if short else f"{part} changed")
    return changes


# ---- finding ----


def store_folder(location: Path, key: StoreKey, uses: Uses) -> Path:
    """The folder of a finished store."""
    return location / f"{hash_json(key)[:_KEY_CHARACTERS]}-{hash_json(uses.to_json())[:_OPTION_CHARACTERS]}"


def reusable(location: Path, key: StoreKey, values: Mapping[str, Any]) -> TokenStore | None:
    """A whole store of this key that these values would give; None where there is none."""
    for folder in _folders(location, key):
        meta = _meta(folder)
        if meta is not None and meta["key"] == key and not obstacles(Uses(**meta["uses"]), values):
            try:
                return open_store(folder)
            except DataError:
                continue
    return None


def _folders(location: Path, key: StoreKey) -> list[Path]:
    return sorted(location.glob(f"{hash_json(key)[:_KEY_CHARACTERS]}-*"))


def _meta(folder: Path) -> dict[str, Any] | None:
    try:
        meta: dict[str, Any] = json.loads((folder / META_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return meta if "uses" in meta else None


def discard_damaged(location: Path, key: StoreKey) -> bool:
    """Delete stores of this key whose files were changed from outside; whether there were any. Call it under the
    lock."""
    damaged = False
    for folder in _folders(location, key):
        try:
            open_store(folder)
        except DataError:
            damaged = True
            shutil.rmtree(folder)
    return damaged


def why_not_reused(location: Path, name: str, key: StoreKey, values: Mapping[str, Any]) -> str:
    """How the most similar store of the same rows, or of the data set `name`, differs, in words."""
    best: list[str] | None = None
    for path in sorted(location.glob(f"*/{META_FILE}")):
        meta = _meta(path.parent)  # another store's damage is its own next user's business
        if meta is None or (meta["name"] != name and meta["key"]["rows"] != key["rows"]):
            continue
        found = [*_differences(meta["key"], key), *obstacles(Uses(**meta["uses"]), values)]
        if found and (best is None or len(found) < len(best)):
            best = found
    return "no store of it yet" if best is None else ", ".join(best)


# ---- writing ----


def create_location(location: Path) -> None:
    """Make the folder of all stores. Raises DataError when nothing can be written there."""
    try:
        location.mkdir(parents=True, exist_ok=True)
        if not os.access(location, os.W_OK | os.X_OK):
            raise PermissionError(f"no permission to write in {location}")
    except OSError as error:
        raise DataError(
            f"{location}: prepared data cannot be written there ({error}); set dataset_prepared_path (or $EFT_CACHE) "
            "to a folder that you may write to"
        ) from error


@contextmanager
def exclusive(location: Path, key: StoreKey, values: Mapping[str, Any], on_wait: Callable[[], None]) -> Iterator[Path]:
    """Let one process at a time build the store of this key and these values; the others wait, and then find it built.

    Gives the folder to build it in, which may hold what a killed process had finished. The lock ends with its process,
    however that ends. On a file system without locks every process has a folder of its own: the work may be done twice.
    """
    name = hash_json([key, dict(values)])[:_KEY_CHARACTERS]
    partial = location / f"{_PARTIAL}{name}"
    with (location / f"{_LOCK}{name}").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
            partial = partial.with_name(f"{partial.name}.{os.getpid()}")
        yield partial


def remove_abandoned(location: Path) -> None:
    """Delete half-built stores that nobody has worked on for a day."""
    for partial in location.glob(f"{_PARTIAL}*"):
        name = partial.name.removeprefix(_PARTIAL)
        with (location / f"{_LOCK}{name}").open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                age = time.time() - partial.stat().st_mtime
            except OSError:
                continue
            if age > _ABANDONED_AFTER_S:
                shutil.rmtree(partial, ignore_errors=True)
