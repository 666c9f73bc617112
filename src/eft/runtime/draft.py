"""What a checkpoint will hold: gathered at one moment, written afterwards, perhaps beside the next steps.

The step waits only while tensors are copied within memory (or from the device). Serialising, flushing to the disk,
reading back and hashing take many times as long, and need nothing that training changes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor

from eft.core.atomic import write_text
from eft.runtime.sharding import ONE_PROCESS, Sharding
from eft.runtime.tensors import INDEX_SUFFIX, save_tensors

SHARD_BYTES = 2 * 2**30
"""Bytes of tensors in one file at most, unless one tensor alone is larger."""


class TensorCopies:
    """Host memory for the copies of one draft at a time, kept for the next: touching new pages costs more than copying.

    As large as what this process copies; page-locked where that comes from a CUDA device.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str], Tensor] = {}

    def take(self, file: str, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Contiguous host copies, one after the other. Those of CUDA tensors are valid after `finish`; all until the
        next `take`."""
        return {name: self._copy((file, name), tensor.detach()) for name, tensor in tensors}

    def finish(self) -> None:
        """Wait for the copies from CUDA devices, since the next step overwrites what they read."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()

    def _copy(self, key: tuple[str, str], tensor: Tensor) -> Tensor:
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda)
            self._buffers[key] = buffer
        return buffer.copy_(tensor, non_blocking=True)


@dataclass
class _File:
    """One file of tensors."""

    name: str
    tensors: Mapping[str, Tensor]
    """Live, or copies."""
    is_live: bool
    is_mine: bool
    """Whether this process writes it."""


class Draft:
    """The files of a folder that is yet to be written, as far as this process writes them.

    With several processes every one of them fills its own draft, by the same calls in the same order.
    """

    def __init__(
        self,
        copies: TensorCopies | None = None,
        sharding: Sharding = ONE_PROCESS,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        """With `copies` the tensors may change after they were added; without, `write` stores what they hold then."""
        self.sharding = sharding
        self._copies = copies
        self._shard_bytes = shard_bytes
        self._files: list[_File] = []
        self._texts: dict[str, str] = {}
        self._others: list[Callable[[Path], Any]] = []

    def add_tensors(self, file: str, tensors: Mapping[str, Tensor], *, sharded: bool = True) -> None:
        """Whole tensors in a safetensors file; in several with an index where they are too large for one.

        Which tensor goes where depends on names, shapes and dtypes alone, not on the processes, which share the files
        out. `sharded` False: one file, whatever its size, for libraries that read no index.
        """
        shapes = {name: self.sharding.whole_shape(name, tensor) for name, tensor in tensors.items()}
        sizes = {name: prod(shapes[name]) * tensors[name].element_size() for name in sorted(tensors)}
        parts = partition(sizes, self._shard_bytes) if sharded else [sorted(tensors)]
        path = PurePath(file)
        files = [f"{path.stem}-{number:05}-of-{len(parts):05}{path.suffix}" for number in range(1, len(parts) + 1)]
        if len(parts) == 1:
            files = [file]
        else:
            weight_map = {name: part_file for part_file, names in zip(files, parts, strict=True) for name in names}
            total = {"total_size": sum(sizes.values())}
            self.add_json(file + INDEX_SUFFIX, {"metadata": total, "weight_map": weight_map})
        for number, (part_file, names) in enumerate(zip(files, parts, strict=True)):
            mine = number % self.sharding.world_size == self.sharding.rank
            self._add(_File(part_file, {name: tensors[name] for name in names}, is_live=True, is_mine=mine))

    def add_own_tensors(self, file: str, tensors: Mapping[str, Tensor]) -> None:
        """A safetensors file of this process alone, of a name that no other process uses."""
        copied = tensors if self._copies is None else self._copies.take(file, tensors.items())
        self._files.append(_File(file, copied, is_live=False, is_mine=True))

    def add_json(self, file: str, value: Any) -> None:
        """A JSON file with what `value` holds now, the same on every process; the first one writes it."""
        if self.sharding.rank == 0:
            self.add_own_json(file, value)

    def add_own_json(self, file: str, value: Any) -> None:
        """A JSON file of this process alone."""
        self._texts[file] = json.dumps(value, indent=2, ensure_ascii=False) + "\n"

    def add_files(self, write: Callable[[Path], Any]) -> None:
        """Files that `write` makes in the folder, of something that training does not change; by the first process."""
        if self.sharding.rank == 0:
            self._others.append(write)

    @property
    def num_bytes(self) -> int:
        """What this process will write, known before: tensors and texts."""
        tensors = (tensor for file in self._files if file.is_mine for tensor in file.tensors.values())
        return sum(tensor.nbytes for tensor in tensors) + sum(len(text) for text in self._texts.values())

    def finish(self) -> None:
        """Everything was added: from here on the live state may change, where there are copies."""
        if self._copies is not None:
            self._copies.finish()

    def write(self, folder: Path | None) -> None:
        """Write all of it into `folder`, which exists. None: only take part in gathering what others write.

        Without copies, tensors are gathered here, one file at a time.

        Raises:
            CheckpointError: a tensor file reads back differently.
            OSError, SafetensorError: the disk is full or the folder cannot be written.
        """
        for file in self._files:
            self._write_tensors(file, folder)
        if folder is None:
            return
        for name, text in self._texts.items():
            write_text(folder / name, text)
        for write in self._others:
            write(folder)

    def _write_tensors(self, file: _File, folder: Path | None) -> None:
        """Apart, so that the tensors of a file are gone before those of the next are gathered."""
        tensors = dict(self._wholes(file)) if file.is_live else file.tensors
        if file.is_mine and folder is not None:
            save_tensors(folder / file.name, tensors)

    def _add(self, file: _File) -> None:
        if self._copies is not None:
            file.tensors, file.is_live = self._copies.take(file.name, self._wholes(file)), False
        self._files.append(file)

    def _wholes(self, file: _File) -> Iterator[tuple[str, Tensor]]:
        """The whole tensors of a file of this process, one at a time; of another's none, but gathering needs all."""
        for name, tensor in file.tensors.items():
            whole = self.sharding.whole(name, tensor)
            if file.is_mine:
                yield name, whole


def partition(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """The names in their order, cut where the sum of sizes would exceed `limit`; at least one part."""
    parts: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if parts[-1] and filled + size > limit:
            parts.append([])
            filled = 0
        parts[-1].append(name)
        filled += size
    return parts
