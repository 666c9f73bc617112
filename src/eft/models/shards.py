"""The tensors of a model's safetensors files, one at a time, so that a large model is never in memory as a whole."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from eft.core.errors import ModelError

_MAPPED_BYTES = 1 << 28
"""What may be read through one mapping of a file: its pages count as the process's memory until it is closed."""


_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""What the format calls a dtype."""
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


class Shards:
    """Names, shapes and values of the tensors in a folder of `model*.safetensors`."""

    def __init__(self, folder: Path) -> None:
        """Read the index; raises ModelError when the folder holds no safetensors model."""
        self.folder = folder
        index = folder / SAFE_WEIGHTS_INDEX_NAME
        if index.is_file():
            names: dict[str, str] = json.loads(index.read_text())["weight_map"]
        elif (folder / SAFE_WEIGHTS_NAME).is_file():
            with safe_open(folder / SAFE_WEIGHTS_NAME, framework="pt") as file:
                names = dict.fromkeys(file.keys(), SAFE_WEIGHTS_NAME)
        else:
            raise ModelError(f"{folder} holds no {SAFE_WEIGHTS_NAME} and no {SAFE_WEIGHTS_INDEX_NAME}")
        self.file_of = names
        """File by tensor name."""
        self._open: tuple[str, object] | None = None
        self._read = 0

    @property
    def files(self) -> list[str]:
        """The file names, in order."""
        return sorted(set(self.file_of.values()))

    def names_in(self, file: str) -> list[str]:
        """The tensors of one file."""
        return [name for name, holder in self.file_of.items() if holder == file]

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU, in the file's dtype. Its memory may be the mapped file: do not keep it."""
        file = self.file_of[name]
        if self._open is None or self._open[0] != file or self._read > _MAPPED_BYTES:
            self._open, self._read = (file, safe_open(self.folder / file, framework="pt")), 0
        tensor: Tensor = self._open[1].get_tensor(name)  # type: ignore[attr-defined]  # safetensors has no types
        self._read += tensor.nbytes
        return tensor

    def layout(self, file: str) -> dict[str, tuple[torch.dtype, torch.Size]]:
        """Dtype and shape of every tensor of one file, without reading them."""
        with safe_open(self.folder / file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in self.names_in(file)}
            return {name: (_DTYPES[part.get_dtype()], torch.Size(part.get_shape())) for name, part in slices.items()}

    def close(self) -> None:
        """Let go of the mapped file."""
        self._open = None


def write_shard(path: Path, layout: Mapping[str, tuple[torch.dtype, torch.Size]], tensors: Iterable[Tensor]) -> int:
    """Write a safetensors file from tensors that come one at a time, in the order of `layout`; returns their bytes.

    safetensors' own `save_file` takes all of them at once and copies them. The format: an 8-byte length, a JSON header,
    the data (https://github.com/huggingface/safetensors#format).
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in layout.items():
        start, end = end, end + shape.numel() * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, (dtype, shape)), tensor in zip(layout.items(), tensors, strict=True):
            assert (tensor.dtype, tensor.shape) == (dtype, shape), (name, tensor.dtype, tensor.shape)
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return end
