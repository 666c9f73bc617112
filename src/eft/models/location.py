"""Where a model, tokenizer or adapter lies: a folder on this machine or a hub id, decided before anything is loaded."""

from __future__ import annotations

from pathlib import Path

from eft.core.errors import ModelError, nearest


def resolve_location(key: str, value: str) -> str:
    """The absolute path of `value` if it is a folder here, else `value` itself as a hub id (`org/name` or `name`).

    Raises ModelError when `value` can only be meant as a path and there is no such folder; the message names the
    nearest folder beside it.
    """
    path = Path(value).expanduser()
    if path.is_dir():
        return str(path.resolve())
    if path.is_file():
        raise ModelError(f"{key}: {value} is a file; expected the folder that holds it{_gguf_advice(path)}")
    looks_like_path = value.startswith((".", "/", "~")) or value.count("/") > 1 or "\\" in value
    if looks_like_path:
        raise ModelError(f"{key}: there is no folder {path}{nearest_folder(path)}")
    return value


def is_local(location: str) -> bool:
    """Whether `resolve_location` found a folder rather than a hub id."""
    return Path(location).is_absolute()


def nearest_folder(path: Path) -> str:
    """`; did you mean …?` naming the existing folder most like `path`, or what the parent holds; may be empty."""
    parent = path.parent
    while not parent.is_dir() and parent != parent.parent:
        path, parent = parent, parent.parent
    folders = sorted(entry.name for entry in parent.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    close = nearest(path.name, folders)
    if close is not None:
        return f"; did you mean {parent / close}?"
    return f"; {parent} holds {', '.join(folders[:8])}" if folders else f"; {parent} holds no folders"


def _gguf_advice(path: Path) -> str:
    return f" (base_model: {path.parent}, gguf_file: {path.name})" if path.suffix == ".gguf" else f" ({path.parent})"
