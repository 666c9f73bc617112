"""`torch_compile`: every decoder layer by itself, in place, for rows of any length.

`nn.Module.compile()` compiles what `layer(...)` runs and renames nothing, so that state dicts, adapters and saves see
the same model. All layers of one kind share their graphs. Our attention reads the documents' lengths on the host
and stays outside (one break in each layer); what a compiler can fuse lies between the matrix products anyway.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch._dynamo.utils import counters
from transformers import PreTrainedModel

from eft.config.kernels import KernelConfig
from eft.core.errors import ConfigError
from eft.models.adapter_targets import decoder_layers
from eft.models.plain import base_model_of

_CXX_COMPILERS = ("g++", "clang++")
_C_COMPILERS = ("gcc", "clang", "cc")


def check_compiler(cfg: KernelConfig, device: torch.device) -> None:
    """Look for what the backend needs before anything is loaded.

    Raises:
        ConfigError: inductor writes C++ (CPU) or Triton (CUDA) code, and this machine cannot build it.
    """
    if not cfg.torch_compile or cfg.torch_compile_backend != "inductor":
        return
    on_cpu = device.type == "cpu"
    variable, names = ("CXX", _CXX_COMPILERS) if on_cpu else ("CC", _C_COMPILERS)
    wanted = (os.environ[variable],) if os.environ.get(variable) else names
    if not any(shutil.which(name) for name in wanted):
        raise ConfigError(
            f"torch_compile: needs a {'C++' if on_cpu else 'C'} compiler, and there is no {' or '.join(wanted)} here. "
            f"Install g++, name yours in {variable}, or remove `torch_compile`."
        )
    if not on_cpu and find_spec("triton") is None:
        raise ConfigError("torch_compile: needs the package triton on CUDA; install it, or remove `torch_compile`.")


def compile_layers(model: PreTrainedModel | PeftModel, cfg: KernelConfig, *, recomputed: bool) -> None:
    """Compile the decoder layers of `model`, in place, where `torch_compile` says so. Nothing is traced yet.

    Args:
        recomputed: activation checkpointing is on. It happens inside a layer's call and cannot be traced around our
            attention, so that the layer's parts are compiled instead of the layer.
    """
    if not cfg.torch_compile:
        return
    mode = cfg.torch_compile_mode if cfg.torch_compile_backend == "inductor" else None
    for part in _parts(model, recomputed):
        part.compile(backend=cfg.torch_compile_backend, mode=mode, dynamic=True)


def _parts(model: PreTrainedModel | PeftModel, recomputed: bool) -> Iterator[nn.Module]:
    _, layers = decoder_layers(base_model_of(model))
    for layer in layers:
        yield from layer.children() if recomputed else (layer,)


def without_compilation() -> AbstractContextManager[Any]:
    """While active, compiled layers run as they were written: for probes and for generation, token by token."""
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


@dataclass(frozen=True)
class CompileCounts:
    """What torch has compiled in this process so far."""

    graphs: int
    breaks: Counter[str]
    """First line of why a graph had to end → how often. Our attention counts once for each function around it."""

    @classmethod
    def now(cls) -> CompileCounts:
        """Read torch's own counters (`torch._dynamo.utils.counters`, the only place that has them)."""
        breaks: Counter[str] = Counter()
        for reason, count in counters["graph_break"].items():
            breaks[str(reason).strip().partition("\n")[0]] += count
        return cls(int(counters["stats"]["unique_graphs"]), breaks)

    def since(self, start: CompileCounts) -> CompileCounts:
        """What was added after `start`."""
        return CompileCounts(self.graphs - start.graphs, self.breaks - start.breaks)
