"""`eft merge`: base + adapter as one plain model, a tensor at a time, so that no shard is ever in memory as a whole.

The sum is formed in fp32 by peft's own `merge` of each layer and rounded once, so that no row loses its change (see
`rounding`). The files keep the names, the layout and the shards of the base's. A 4- or 8-bit base is merged at its full
precision, unless asked for as it was in training.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from eft.core.atomic import new_folder, write_json
from eft.core.constants import MANIFEST_NAME
from eft.core.errors import ConfigError
from eft.core.hashing import hash_file
from eft.core.records import PromiseResult
from eft.models.base_files import base_files
from eft.models.empty_base import AdapterFacts, adapter_facts, empty_adapted, empty_base
from eft.models.export import mend_generation_config
from eft.models.merge_probe import compare_merged
from eft.models.merge_targets import MergePlan, plan_merge, with_rows
from eft.models.rounding import round_keeping_change
from eft.models.shards import Shards, write_shard

MERGE_FILE = "merge.json"
"""What the merge changed, tensor by tensor."""


@dataclass(frozen=True)
class TensorChange:
    """What became of one tensor of the files."""

    name: str
    change: float
    """‖merged - base‖ ÷ ‖base‖, before rounding."""
    largest: float
    """max |merged - base|, before rounding."""
    lost: float
    """1 - ⟨rounded - base, change⟩ ÷ ‖change‖²: the part of the change that rounding to the saved dtype took away."""


@dataclass(frozen=True)
class Merge:
    """A finished merge."""

    folder: Path
    dtype: torch.dtype
    tensors: int
    """In the files."""
    changes: list[TensorChange]
    promises: list[PromiseResult]


def merge_adapter(
    source: Path,
    out: Path,
    *,
    save_dtype: torch.dtype | None = None,
    as_trained: bool = False,
    overwrite: bool = False,
    ids: list[int] | None = None,
) -> Merge:
    """Merge the adapter of folder `source` into its base, write a plain model to `out`, and compare the two.

    Args:
        save_dtype: of the files; None: that of each of the base's tensors.
        as_trained: of a 4- or 8-bit base take the weights that it stood for in training, not those of its files.
        overwrite: replace what lies in `out`.
        ids: document for the comparison of logits.

    Raises:
        ConfigError: `out` is not empty, or `as_trained` has no meaning here.
        ModelError: there is no adapter, its base cannot be found, or no plain model can hold the two.
    """
    facts = adapter_facts(source)
    if out.exists() and any(out.iterdir()) and not overwrite:
        raise ConfigError(f"{out} is not empty; choose another folder with --output-dir, or pass --overwrite")
    if as_trained and facts.quantisation is None:
        raise ConfigError(f"{source} was trained over a base that is not quantised; leave --as-trained out")
    with base_files(facts, quantised=as_trained) as base, _replaced(out), new_folder(out) as folder:
        plan = plan_merge(empty_adapted(facts, base), empty_base(base, facts.rows), Shards(base))
        assert plan is not None, "base_files has looked"
        changes = _write_shards(plan, folder, save_dtype)
        dtype = _write_rest(facts, base, folder, save_dtype)
        compared = replace(facts, quantisation=None) if as_trained else facts
        promises = compare_merged(compared, base, folder, dtype, ids)
        write_json(folder / MERGE_FILE, {"tensors": [asdict(change) for change in changes]})
        _write_manifest(facts, folder, dtype)
    return Merge(out, dtype, len(plan.shards.file_of), changes, promises)


@contextmanager
def _replaced(out: Path) -> Iterator[None]:
    """Move what lies in `out` aside; delete it once its successor is there, or put it back."""
    if not out.exists():
        yield
        return
    aside = out.with_name(f"{out.name}.replaced")
    shutil.rmtree(aside, ignore_errors=True)
    out.rename(aside)
    try:
        yield
    except BaseException:
        aside.rename(out)
        raise
    shutil.rmtree(aside)


def _write_shards(plan: MergePlan, folder: Path, save_dtype: torch.dtype | None) -> list[TensorChange]:
    """Write the base's files anew, with the adapter in them; the memory of a few tensors at a time."""
    changes: list[TensorChange] = []
    total = 0
    for file in plan.shards.files:
        layout: dict[str, tuple[torch.dtype, torch.Size]] = {}
        for name, (stored_as, shape) in plan.shards.layout(file).items():
            dtype = save_dtype if save_dtype is not None and stored_as.is_floating_point else stored_as
            layout[name] = dtype, plan.shape(name, shape)

        def tensors(wanted: dict[str, tuple[torch.dtype, torch.Size]] = layout) -> Iterator[Tensor]:
            for name, (dtype, _) in wanted.items():
                stored = plan.shards.read(name)
                if name not in plan.targets:
                    yield stored.to(dtype)
                    continue
                merged = plan.merged(name, stored)
                base = with_rows(stored.float(), merged.shape)
                rounded = round_keeping_change(merged, base, dtype, name)
                changes.append(_change(name, base, merged, rounded))
                yield rounded

        total += write_shard(folder / file, layout, tensors())
    plan.shards.close()
    if len(plan.shards.files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": plan.shards.file_of}
        write_json(folder / SAFE_WEIGHTS_INDEX_NAME, index)
    return changes


def _change(name: str, base: Tensor, merged: Tensor, rounded: Tensor) -> TensorChange:
    change = merged - base
    size = float(change.norm())
    lost = float(((merged - rounded.float()) * change).sum()) / size**2 if size else 0.0
    return TensorChange(name, size / max(float(base.norm()), 1e-30), float(change.abs().max()), lost)


def _write_rest(facts: AdapterFacts, base: Path, folder: Path, save_dtype: torch.dtype | None) -> torch.dtype:
    """Config, generation config and tokenizer; returns the dtype of the files."""
    model = empty_base(base, facts.rows)
    dtype = save_dtype or recorded_dtype(base)
    model.config.dtype = dtype
    model.config.save_pretrained(folder)
    tokenizer = _tokenizer_of(facts)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if model.generation_config is not None:
        if tokenizer is not None:
            mend_generation_config(model, tokenizer)
        model.generation_config.save_pretrained(folder)
    return dtype


def recorded_dtype(base: Path) -> torch.dtype:
    """What most of the weights in the files are in."""
    shards = Shards(base)
    sizes: Counter[torch.dtype] = Counter()
    for file in shards.files:
        for dtype, shape in shards.layout(file).values():
            sizes[dtype] += shape.numel()
    return sizes.most_common(1)[0][0]


def _tokenizer_of(facts: AdapterFacts) -> PreTrainedTokenizerBase | None:
    """The adapter's own, else the one beside its checkpoint, else the base's."""
    for place in (facts.folder, facts.folder.parent, Path(facts.base)):
        if (place / "tokenizer_config.json").is_file():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(place)
            return tokenizer
    return None


def _write_manifest(facts: AdapterFacts, folder: Path, dtype: torch.dtype) -> None:
    manifest: dict[str, Any] = {
        "kind": "export",
        "dtype": str(dtype).removeprefix("torch."),
        "vocabulary_rows": facts.rows,
        "content": "model",
        "base_model": facts.base,
        "files": {
            path.name: {"sha256": hash_file(path), "size": path.stat().st_size} for path in sorted(folder.iterdir())
        },
    }
    write_json(folder / MANIFEST_NAME, manifest)
