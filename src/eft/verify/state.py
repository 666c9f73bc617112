"""Fingerprints of everything that a run's next step depends on, and losing all of it on purpose."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from eft.core.hashing import hash_bytes, hash_json
from eft.runtime.rng import capture_rng, seed_everything
from eft.runtime.weights import live_weights
from eft.trainer.trainer import EftTrainer


def fingerprints(trainer: EftTrainer) -> dict[str, str]:
    """Of every tensor and state by name: weights, optimizer, learning rates, schedule, generators."""
    state = {name: _fingerprint(tensor) for name, tensor in _stored_tensors(trainer)}
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    optimizer = trainer.plain_optimizer()
    for parameter, values in optimizer.state.items():
        for key, value in values.items():
            state[f"optimizer {names[id(parameter)]} {key}"] = _fingerprint(value)
    state["learning rates"] = repr([group["lr"] for group in optimizer.param_groups])
    state["schedule"] = repr(trainer.lr_scheduler.last_epoch)
    generators = capture_rng()
    state["generators"] = hash_json(generators.plain)
    state.update({f"generator {name}": _fingerprint(tensor) for name, tensor in generators.tensors.items()})
    return state


def spoil(trainer: EftTrainer) -> None:
    """Lose everything that a checkpoint must bring back."""
    with torch.no_grad():
        for _, tensor in _stored_tensors(trainer):
            tensor.zero_()
    optimizer = trainer.plain_optimizer()
    optimizer.state.clear()
    for group in optimizer.param_groups:
        group["lr"] = -1.0
    trainer.lr_scheduler.last_epoch = -1
    seed_everything(0)


def _stored_tensors(trainer: EftTrainer) -> Iterator[tuple[str, Tensor]]:
    """Names and live memory of what a checkpoint stores of the weights."""
    for file, tensors in live_weights(trainer.model).items():
        for name, tensor in tensors.items():
            yield f"weights {file} {name}", tensor


def _fingerprint(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    raw = value.detach().contiguous().reshape(-1).cpu().view(torch.uint8)
    return f"{value.dtype} {list(value.shape)} {hash_bytes(raw.numpy().tobytes())}"
