"""The base of an adapter as plain safetensors files."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import snapshot_download

from eft.core.errors import ModelError
from eft.models.empty_base import AdapterFacts, empty_adapted, empty_base
from eft.models.load import base_dtype
from eft.models.merge_targets import plan_merge
from eft.models.plain import plain_base
from eft.models.shards import Shards
from eft.models.verify_child import load_base


@contextmanager
def base_files(facts: AdapterFacts, *, quantised: bool = False) -> Iterator[Path]:
    """A folder with the base's safetensors files, or with those of the weights that a quantised base stands for.

    A GGUF file, pickled weights, a layout of older days and a quantised base are first written out as plain files, for
    which the model has to fit into memory once.

    Raises ModelError when the base cannot be found or loaded.
    """
    folder = None if facts.gguf_file is not None or quantised else _located(facts)
    if folder is not None and _is_readable(facts, folder):
        yield folder
        return
    with tempfile.TemporaryDirectory() as place:
        try:
            model = load_base(facts.base, facts.gguf_file, facts.revision, facts.quantisation if quantised else None)
        except (OSError, ValueError) as error:
            raise ModelError(f"{facts.folder}: its base model {facts.base} could not be loaded: {error}") from error
        plain_base(model, base_dtype(model)).save_pretrained(place)
        del model
        yield Path(place)


def _located(facts: AdapterFacts) -> Path:
    path = Path(facts.base)
    if path.is_dir():
        return path
    try:
        return Path(snapshot_download(facts.base, revision=facts.revision, allow_patterns=["*.json", "*.safetensors"]))
    except (OSError, ValueError) as error:
        raise ModelError(f"{facts.folder}: its base model {facts.base} is neither here nor on the hub") from error


def _is_readable(facts: AdapterFacts, folder: Path) -> bool:
    """Whether every adapted parameter is in safetensors files under the name that transformers would give it there."""
    if not any(folder.glob("*.safetensors")):
        return False
    return plan_merge(empty_adapted(facts, folder), empty_base(folder, facts.rows), Shards(folder)) is not None
