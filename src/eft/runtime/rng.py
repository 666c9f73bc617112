"""Every random generator of this process, captured and restored bit for bit; no pickle.

Python's, numpy's global one, torch's on the CPU and on every CUDA device. With another number of processes than the
checkpoint was written by there is no state to continue: each process then derives its own, reproducibly.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eft.core.errors import CheckpointError
from eft.core.hashing import hash_bytes, hash_json
from eft.runtime.draft import Draft
from eft.runtime.tensors import read_tensors

_CPU = "torch_cpu"
_CUDA = "torch_cuda_"


@dataclass(frozen=True)
class RngState:
    """The generators' states: JSON-able values, and tensors uint8 [bytes of the generator]."""

    plain: dict[str, Any]
    """`python` (version, words, cached gauss) and `numpy` (generator, words, position, cached gauss)."""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """`torch_cpu`, `torch_cuda_0`, …"""


def capture_rng() -> RngState:
    """The present state of every generator. Draws nothing."""
    version, words, gauss = random.getstate()
    numpy_state = np.random.get_state(legacy=False)
    assert isinstance(numpy_state, dict)
    inner = numpy_state["state"]
    plain = {
        "python": [version, list(words), gauss],
        "numpy": {
            "bit_generator": numpy_state["bit_generator"],
            "key": [int(word) for word in inner["key"]],
            "pos": int(inner["pos"]),
            "has_gauss": int(numpy_state["has_gauss"]),
            "gauss": float(numpy_state["gauss"]),
        },
    }
    tensors = {_CPU: torch.get_rng_state()}
    if torch.cuda.is_initialized():
        tensors.update({f"{_CUDA}{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())})
    return RngState(plain, tensors)


def restore_rng(state: RngState) -> None:
    """Put every generator back to `state`; CUDA devices that one of the two machines lacks are left alone."""
    version, words, gauss = state.plain["python"]
    random.setstate((version, tuple(words), gauss))
    saved = state.plain["numpy"]
    key = np.array(saved["key"], dtype=np.uint32)
    np.random.set_state(
        {
            "bit_generator": saved["bit_generator"],
            "state": {"key": key, "pos": saved["pos"]},
            "has_gauss": saved["has_gauss"],
            "gauss": saved["gauss"],
        }
    )
    torch.set_rng_state(state.tensors[_CPU].clone())
    for index in range(torch.cuda.device_count()):
        if f"{_CUDA}{index}" in state.tensors:
            torch.cuda.set_rng_state(state.tensors[f"{_CUDA}{index}"].clone(), index)


def save_rng(folder: Path, *, rank: int = 0, world_size: int = 1) -> None:
    """Write this process's state into `folder`, at once."""
    draft = Draft()
    add_rng(draft, rank=rank, world_size=world_size)
    draft.write(folder)


def add_rng(draft: Draft, *, rank: int = 0, world_size: int = 1) -> None:
    """Add this process's state as `rng_<rank>.json` and `rng_<rank>.safetensors`."""
    state = capture_rng()
    draft.add_own_tensors(f"rng_{rank}.safetensors", state.tensors)
    draft.add_own_json(f"rng_{rank}.json", {"world_size": world_size, **state.plain})


def load_rng(folder: Path, *, rank: int = 0, world_size: int = 1) -> bool:
    """Restore what this rank wrote; with another world size seed from the checkpoint and the rank instead.

    Returns:
        Whether the state was restored exactly.

    Raises:
        CheckpointError: a file is missing or broken.
    """
    own = _read(folder, rank if _read(folder, 0).plain["world_size"] == world_size else 0)
    if own.plain["world_size"] == world_size:
        restore_rng(own)
        return True
    parts = (hash_json(own.plain).encode(), own.tensors[_CPU].numpy().tobytes(), f"{rank}/{world_size}".encode())
    digest = hash_bytes(*parts)
    seed_everything(int(digest[:8], 16))
    return False


def seed_everything(seed: int) -> None:
    """Seed every generator; `seed` is below 2**32."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)  # CUDA too


def _read(folder: Path, rank: int) -> RngState:
    path = folder / f"rng_{rank}.json"
    try:
        plain = json.loads(path.read_text())
        missing = {"python", "numpy", "world_size"} - set(plain)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: missing; rank {rank}'s random generators were not saved.") from error
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: broken: {error}") from error
    if missing:
        raise CheckpointError(f"{path}: broken: lacks {', '.join(sorted(missing))}.")
    return RngState(plain, read_tensors(path.with_suffix(".safetensors")))
