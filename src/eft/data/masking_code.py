"""Which code decides ids, labels and weights: part of every store's key, so that no store outlives what made it.

It is named by its source text: a change that alters nothing (a comment) costs one preparation; one that alters a single
label can never be served from an old store.
"""

from __future__ import annotations

from functools import cache
from importlib import metadata, resources

from eft.core.hashing import hash_bytes

DECIDING = (
    "alignment",
    "block_encoder",
    "bpe",
    "bpe_classes",
    "bpe_kernels",
    "bpe_merges",
    "bpe_words",
    "conversation_text",
    "conversations",
    "encoded",
    "fast_tokenizer",
    "formats",
    "formats.chat",
    "formats.example",
    "formats.fields",
    "formats.instruct",
    "formats.marks",
    "formats.own",
    "formats.plain",
    "given_tokens",
    "jinja_environment",
    "json_rows",
    "masks",
    "readers",
    "rows",
    "seen",
    "skeletons",
    "sources",
    "splits",
    "template_reading",
    "token_facts",
    "tokenize",
    "turns",
)
"""Modules of `eft.data` between the rows and the arrays of a store."""
_LIBRARIES = ("jinja2", "tokenizers", "transformers")
"""They render and encode; what they are given is in the key, how they do it is not."""


@cache
def masking_code() -> str:
    """SHA-256 (hex) of the sources of DECIDING."""
    root = resources.files("eft.data")
    return hash_bytes(*(_source(root, name) for name in DECIDING))


def _source(root: resources.abc.Traversable, name: str) -> bytes:
    path = root.joinpath(*name.split("."))
    return (path / "__init__.py" if path.is_dir() else root / f"{name.replace('.', '/')}.py").read_bytes()


@cache
def libraries() -> str:
    """Their versions: `jinja2 3.1.6, tokenizers 0.22.2, …`."""
    return ", ".join(f"{name} {metadata.version(name)}" for name in _LIBRARIES)
