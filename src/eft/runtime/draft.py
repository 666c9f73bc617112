"""What a checkpoint will hold: gathered at one moment, written afterwards, perhaps beside the next steps.

The step waits only while tensors are copied within memory (or from the device). Serialising, flushing to the disk,
reading back and hashing take many times as long, and need nothing that training changes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eft.core.atomic import write_text
from eft.runtime.tensors import save_tensors


class TensorCopies:
    """Host memory for the copies of one draft at a time, kept for the next: touching new pages costs more than copying.

    As large as the state that is copied; page-locked where that comes from a CUDA device.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str], Tensor] = {}

    def take(self, file: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Contiguous host copies. Those of CUDA tensors are valid after `finish`; all until the next `take`."""
        return {name: self._copy((file, name), tensor.detach()) for name, tensor in tensors.items()}

    def finish(self) -> None:
        """Wait for the copies from CUDA devices, since the next step overwrites what they read."""
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()

    def _copy(self, key: tuple[str, str], tensor: Tensor) -> Tensor:
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda)
            self._buffers[key] = buffer
        return buffer.copy_(tensor, non_blocking=True)


class Draft:
    """The files of a folder that is yet to be written."""

    def __init__(self, copies: TensorCopies | None = None) -> None:
        """With `copies` the tensors may change after they were added; without, `write` stores what they hold then."""
        self._copies = copies
        self._tensors: dict[str, Mapping[str, Tensor]] = {}
        self._texts: dict[str, str] = {}
        self._others: list[Callable[[Path], Any]] = []

    def add_tensors(self, file: str, tensors: Mapping[str, Tensor]) -> None:
        """A safetensors file."""
        self._tensors[file] = tensors if self._copies is None else self._copies.take(file, tensors)

    def add_json(self, file: str, value: Any) -> None:
        """A JSON file with what `value` holds now."""
        self._texts[file] = json.dumps(value, indent=2, ensure_ascii=False) + "\n"

    def add_files(self, write: Callable[[Path], Any]) -> None:
        """Files that `write` makes in the folder, of something that training does not change."""
        self._others.append(write)

    def finish(self) -> None:
        """Everything was added: from here on the live state may change."""
        if self._copies is not None:
            self._copies.finish()

    def write(self, folder: Path) -> None:
        """Write all of it into `folder`, which exists.

        Raises:
            CheckpointError: a tensor file reads back differently.
            OSError, SafetensorError: the disk is full or the folder cannot be written.
        """
        for file, tensors in self._tensors.items():
            save_tensors(folder / file, tensors)
        for file, text in self._texts.items():
            write_text(folder / file, text)
        for write in self._others:
            write(folder)
