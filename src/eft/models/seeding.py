"""Random initialisation that depends on the seed alone and leaves no trace in the global generators."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def seeded_rng(seed: int, model: nn.Module | None = None) -> Iterator[None]:
    """Inside, torch's generators start from `seed`; afterwards they are as before.

    Covers the CPU generator and those of the CUDA devices that hold parameters of `model`.
    """
    parameters = model.parameters() if model is not None else ()
    devices = sorted({parameter.device.index for parameter in parameters if parameter.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
