"""Named tensors to and from a safetensors file: every bit, dtype and shape, proved by reading the file back."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from eft.core.errors import CheckpointError, nearest

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
    """The tensors in `path`, memory-mapped on the CPU.

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


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Whether both hold the same bits in the same dtype and shape; NaN equals the same NaN, 0 does not equal -0."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return torch.equal(_bytes(left), _bytes(right))


def copy_exactly(path: Path, saved: Mapping[str, Tensor], live: Mapping[str, Tensor]) -> None:
    """Copy `saved`, read from `path`, into the tensors of `live` in place; names, shapes and dtypes must all agree.

    Raises:
        CheckpointError: a name is missing or too many, or a shape or dtype differs.
    """
    check_names(path, saved, live, "tensor")
    for name, target in live.items():
        source = saved[name]
        if source.shape != target.shape or source.dtype != target.dtype:
            raise CheckpointError(
                f"{path}: {name} is {_kind(source)}, but the model's is {_kind(target)}; "
                "it was written by a run with another model or other dtype settings."
            )
    with torch.no_grad():
        for name, target in live.items():
            target.copy_(saved[name])


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


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


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
