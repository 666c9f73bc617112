"""The manifest of a folder: size and SHA-256 of every file. Written last, it tells a complete folder from any other."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eft.core.atomic import write_json
from eft.core.constants import MANIFEST_NAME
from eft.core.errors import CheckpointError
from eft.core.hashing import hash_file

MANIFEST_FORMAT = 1

Files = dict[str, dict[str, Any]]
"""File name to `bytes` and `sha256`."""


def write_manifest(
    folder: Path, *, kind: str, extra: Mapping[str, Any] | None = None, known: Mapping[str, Any] | None = None
) -> None:
    """Write the manifest of all files below `folder`: size and SHA-256 of each, `kind`, and the fields of `extra`.

    `known` are entries of files that whoever wrote them has hashed already.
    """
    files: Files = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != MANIFEST_NAME:
            own = (known or {}).get(name)
            files[name] = own or {"bytes": path.stat().st_size, "sha256": hash_file(path)}
    write_json(folder / MANIFEST_NAME, {"format": MANIFEST_FORMAT, "kind": kind, **(extra or {}), "files": files})


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of `folder`, not compared with the files.

    Raises:
        CheckpointError: it is missing, broken or of a newer format.
    """
    path = folder / MANIFEST_NAME
    try:
        manifest = json.loads(path.read_text())
        files = manifest["files"]
        entries = [(entry["bytes"], entry["sha256"]) for entry in files.values()]
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: missing; the folder was not written to its end, or not by eft.") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: broken: {type(error).__name__} {error}") from error
    # A process may have nothing of its own to write; a checkpoint is never empty.
    is_empty = not entries and manifest.get("kind") != "share"
    if manifest.get("format") != MANIFEST_FORMAT or is_empty:
        raise CheckpointError(f"{path}: format {manifest.get('format')!r}, {len(entries)} files; expected format 1.")
    result: dict[str, Any] = manifest
    return result


def verify_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of `folder`, after every file it lists was read and compared.

    Raises:
        CheckpointError: manifest missing or broken; a file missing, of another size or with another content.
    """
    manifest = read_manifest(folder)
    for name, entry in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path}: missing, though the manifest lists it.")
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise CheckpointError(f"{path}: has {size:,} bytes, the manifest says {entry['bytes']:,}.")
        if hash_file(path) != entry["sha256"]:
            raise CheckpointError(f"{path}: its content differs from the manifest's SHA-256; the file was altered.")
    return manifest


def sizes_agree(folder: Path) -> bool:
    """The quick form of `verify_manifest`, for counting."""
    try:
        files = read_manifest(folder)["files"]
    except CheckpointError:
        return False
    return all((folder / name).is_file() and (folder / name).stat().st_size == files[name]["bytes"] for name in files)
