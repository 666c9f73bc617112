"""Named tensors to and from safetensors files: every bit, dtype and shape, proved by reading the files back."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from eft.core.errors import CheckpointError, nearest
from eft.runtime.sharding import Index, Sharding

INDEX_SUFFIX = ".index.json"
"""`model.safetensors.index.json` lists which of `model-00001-of-00003.safetensors` … holds which tensor."""
_SHOWN = 5


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write `tensors` to `path`, then read the file back from the disk and compare it with them, bit for bit (E6).

    Any dtype and shape that safetensors knows, 0-d included; tensors may share memory, each is stored.

    Raises:
        CheckpointError: what was read back differs.
        OSError, SafetensorError: the file cannot be written.
    """
    save_file(_separate(tensors), path, metadata={"format": "pt"})
    # safetensors leaves the file readable by its owner only, whatever the umask says.
    path.chmod(path.parent.stat().st_mode & 0o666)
    _drop_from_page_cache(path)
    stored = read_tensors(path)
    for name, tensor in tensors.items():
        if not same_bits(tensor, stored[name]):
            raise CheckpointError(f"{path}: {name} read back from the disk differs from the tensor that was written.")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors in the one file `path`, memory-mapped on the CPU.

    Raises:
        CheckpointError: the file is missing or broken.
    """
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: missing.") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: broken: {error}") from error
    return tensors


class TensorFiles:
    """Tensors that were saved under one name: `model.safetensors`, or its shards with their index. Reads slices."""

    def __init__(self, path: Path) -> None:
        """Open what `path` names; nothing is read but the names.

        Raises:
            CheckpointError: a file is missing or broken.
        """
        self.path = path
        files, index = [path], path.with_name(path.name + INDEX_SUFFIX)
        if not path.is_file() and index.is_file():
            files = [path.with_name(name) for name in sorted(set(_weight_map(index).values()))]
        self._opened: dict[str, Any] = {}
        for file in files:
            opened = _open(file)
            self._opened.update(dict.fromkeys(opened.keys(), opened))
        if files != [path]:
            check_names(index, self._opened, _weight_map(index), "tensor")

    @property
    def names(self) -> list[str]:
        """Of all tensors, sorted."""
        return sorted(self._opened)

    def shape(self, name: str) -> torch.Size:
        """Of the whole tensor."""
        return torch.Size(self._opened[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Of the tensor."""
        part = (slice(0, 0),) * len(self.shape(name))
        return self.read(name, part).dtype

    def read(self, name: str, part: Index = ()) -> Tensor:
        """The whole tensor, or the part of it, in memory of its own on the CPU.

        Raises:
            CheckpointError: the file is broken.
        """
        if isinstance(part, slice):
            return self._flat(name, part)
        for dim, pieces in enumerate(part):
            if isinstance(pieces, tuple):
                return torch.cat([self.read(name, (*part[:dim], piece, *part[dim + 1 :])) for piece in pieces], dim)
        try:
            tensor: Tensor = self._opened[name].get_slice(name)[part] if part else self._opened[name].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.path}: {name}: broken: {error}") from error
        return tensor.clone()

    def _flat(self, name: str, part: slice) -> Tensor:
        """Of the flattened numbers; no more is read than the rows that they are in."""
        shape = self.shape(name)
        if not shape:
            return self.read(name).flatten()[part]
        row = prod(shape[1:]) or 1
        first, last = part.start // row, -(-part.stop // row)
        rows = self.read(name, (slice(first, last),))
        return rows.flatten()[part.start - first * row : part.stop - first * row]


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: missing.") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: broken: {error}") from error


def _weight_map(index: Path) -> dict[str, str]:
    try:
        names: dict[str, str] = json.loads(index.read_text())["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index}: broken: {type(error).__name__} {error}") from error
    return names


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Whether both hold the same bits in the same dtype and shape; NaN equals the same NaN, 0 does not equal -0."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return torch.equal(_bytes(left), _bytes(right))


def copy_exactly(saved: TensorFiles, live: Mapping[str, Tensor], sharding: Sharding) -> None:
    """Copy this process's part of every tensor of `saved` into `live` in place, and check that it arrived.

    Names, whole shapes and dtypes must all agree; nothing is changed where one does not.

    Raises:
        CheckpointError: a name is missing or too many, or a shape or dtype differs.
    """
    check_names(saved.path, saved.names, live, "tensor")
    for name, target in live.items():
        shape = sharding.whole_shape(name, target)
        if saved.shape(name) != shape or saved.dtype(name) != target.dtype:
            raise CheckpointError(
                f"{saved.path}: {name} is {_kind(saved.dtype(name), saved.shape(name))}, but the model's is "
                f"{_kind(target.dtype, shape)}; it was written by a run with another model or other dtype settings."
            )
    with torch.no_grad():
        for name, target in live.items():
            part, local = saved.read(name, sharding.part(name, target)), sharding.local(name, target)
            local.copy_(part)
            assert same_bits(local, part), f"{name} was loaded into a copy instead of the live tensor"


def check_names(path: Path, saved: Iterable[str], live: Iterable[str], noun: str) -> None:
    """Raise CheckpointError when the two sets of names differ, naming the first few and the nearest."""
    saved_names, live_names = set(saved), set(live)
    missing, unknown = sorted(live_names - saved_names), sorted(saved_names - live_names)
    if not missing and not unknown:
        return
    parts = [f"{path}: does not belong to this model and config."]
    if missing:
        close = nearest(missing[0], unknown)
        parts.append(f"It lacks {_listed(missing, noun)}" + (f" (nearest: {close})." if close else "."))
    if unknown:
        parts.append(f"The run has no {_listed(unknown, noun)}.")
    raise CheckpointError(" ".join(parts))


def _listed(names: list[str], noun: str) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{len(names)} {noun}{'s' if len(names) > 1 else ''}: {', '.join(names[:_SHOWN])}{more}"


def _kind(dtype: torch.dtype, shape: torch.Size) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors of which no two share memory, as safetensors wants them."""
    separate: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().contiguous()
        storage = plain.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != plain.nbytes:
            plain = plain.clone()
        seen.add(plain.untyped_storage().data_ptr())
        separate[name] = plain
    return separate


def _drop_from_page_cache(path: Path) -> None:
    # Without this the check would compare our memory with our memory. Best effort: where it has no effect (tmpfs,
    # network file systems) the check is still one of the format.
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)
