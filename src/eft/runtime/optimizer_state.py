"""Optimizer and schedule state by parameter name: tensors in safetensors, scalars in JSON, no pickle.

Not `torch.distributed.checkpoint.state_dict`: that fills missing state by running an optimizer step (refused or counted
by schedule-free optimizers) and loads through `Optimizer.load_state_dict`, which casts state to the parameter's dtype.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from eft.core.atomic import write_json
from eft.core.errors import CheckpointError
from eft.runtime.draft import Draft
from eft.runtime.sharding import ONE_PROCESS, Sharding
from eft.runtime.tensors import TensorFiles, check_names

TENSOR_FILE = "optimizer.safetensors"
SCALAR_FILE = "optimizer.json"
SCHEDULER_FILE = "scheduler.json"

_NOT_STORED = ("params", "param_names")
_KERNEL = frozenset({"fused", "foreach"})
"""Group entries that say how the update is computed, not what: tensors in parts have other kernels than whole ones."""
_MOVING = frozenset({"lr", "step", "k", "weight_sum", "lr_max", "scheduled_lr", "train_mode"})
"""Group entries that an optimizer or a schedule changes as it runs; all others are settings."""


def save_optimizer(folder: Path, optimizer: Optimizer, model: nn.Module) -> None:
    """Write what `add_optimizer` gathers into `folder`, at once; raises CheckpointError also where a file reads back
    differently."""
    draft = Draft()
    add_optimizer(draft, optimizer, model)
    draft.write(folder)


def add_optimizer(draft: Draft, optimizer: Optimizer, model: nn.Module) -> None:
    """Add the state of `optimizer` over the parameters of the unwrapped `model`.

    Raises:
        CheckpointError: a parameter that the model does not have, or state of a type without an exact form.
    """
    with draft.sharding.by_parameter(optimizer) as whole:
        _add_optimizer(draft, whole, model)


def _add_optimizer(draft: Draft, optimizer: Optimizer, model: nn.Module) -> None:
    names = _names(model)
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    groups = []
    for group in optimizer.param_groups:
        members = [_name_of(parameter, names) for parameter in group["params"]]
        options = {key: _to_json(key, value) for key, value in group.items() if key not in _NOT_STORED}
        groups.append({"params": members, "options": options})
        for name, parameter in zip(members, group["params"], strict=True):
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"{name}/{key}"] = value
                else:
                    scalars.setdefault(name, {})[key] = _to_json(key, value)
    draft.add_tensors(TENSOR_FILE, tensors)
    draft.add_json(SCALAR_FILE, {"class": _class_name(optimizer), "groups": groups, "scalars": scalars})


def load_optimizer(
    folder: Path,
    optimizer: Optimizer,
    model: nn.Module,
    *,
    sharding: Sharding = ONE_PROCESS,
    allow_change: bool = False,
) -> None:
    """Restore this process's part of what `save_optimizer` wrote, bit for bit, replacing all state of `optimizer`.

    Args:
        sharding: how the parameters lie here; state of a parameter's shape lies as the parameter does.
        allow_change: settings that differ (weight decay, betas) keep the live value instead of being an error.

    Raises:
        CheckpointError: files missing or broken, another optimizer, parameters or settings than this run's.
    """
    with sharding.by_parameter(optimizer) as whole:
        _load_optimizer(folder, whole, model, sharding, allow_change)


def _load_optimizer(
    folder: Path, optimizer: Optimizer, model: nn.Module, sharding: Sharding, allow_change: bool
) -> None:
    path = folder / SCALAR_FILE
    saved = _read_json(path)
    files = TensorFiles(folder / TENSOR_FILE)
    if saved["class"] != _class_name(optimizer):
        raise CheckpointError(f"{path}: written by {saved['class']}; this run's optimizer is {_class_name(optimizer)}.")
    names = _names(model)
    live = [[_name_of(parameter, names) for parameter in group["params"]] for group in optimizer.param_groups]
    if len(live) != len(saved["groups"]):
        raise CheckpointError(f"{path}: has {len(saved['groups'])} parameter groups, this run has {len(live)}.")
    for members, stored, group in zip(live, saved["groups"], optimizer.param_groups, strict=True):
        check_names(path, stored["params"], members, "parameter")
        _restore_options(path, group, stored["options"], allow_change)
    optimizer.state.clear()
    for members, group in zip(live, optimizer.param_groups, strict=True):
        parameters = dict(zip(members, group["params"], strict=True))
        for name, values in saved["scalars"].items():
            if name in parameters:
                optimizer.state[parameters[name]].update({key: _from_json(value) for key, value in values.items()})
        for entry in files.names:
            name, key = entry.rsplit("/", 1)
            if name in parameters:
                optimizer.state[parameters[name]][key] = _read_state(files, entry, parameters[name], group, sharding)


def save_scheduler(folder: Path, scheduler: LambdaLR) -> None:
    """Write the step that `scheduler` is at."""
    write_json(folder / SCHEDULER_FILE, {"step": scheduler.last_epoch})


def load_scheduler(folder: Path, scheduler: LambdaLR) -> None:
    """Put `scheduler` and its optimizer's learning rates at the saved step, by the closed form (E7).

    Raises:
        CheckpointError: the file is missing or broken.
    """
    path = folder / SCHEDULER_FILE
    step = _read_json(path).get("step")
    if not isinstance(step, int) or step < 0:
        raise CheckpointError(f"{path}: `step` must be a whole number of at least 0, got {step!r}.")
    place_scheduler(scheduler, step)


def place_scheduler(scheduler: LambdaLR, step: int) -> None:
    """Put `scheduler` and its optimizer's learning rates after `step` steps, by the closed form of its own settings."""
    factors = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    rates = [base * factor(step) for base, factor in factors]
    state = {**scheduler.state_dict(), "last_epoch": step, "_step_count": step + 1, "_last_lr": rates}
    scheduler.load_state_dict(state)
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _restore_options(path: Path, group: dict[str, Any], stored: dict[str, Any], allow_change: bool) -> None:
    label = group.get("name", "0")
    for key, encoded in stored.items():
        value = _from_json(encoded)
        if key in _KERNEL:
            continue
        if key in _MOVING or key not in group:
            group[key] = value
        elif group[key] != value and not allow_change:
            setting = "learning_rate" if key == "initial_lr" else key
            raise CheckpointError(
                f"{path}: written with {setting} {value!r} in group {label!r}, but this run has {group[key]!r}; "
                "set it back, or start a new run from the checkpoint's weights."
            )


def _read_state(
    files: TensorFiles, entry: str, parameter: nn.Parameter, group: dict[str, Any], sharding: Sharding
) -> Tensor:
    """Where the optimizer keeps it: beside the parameter; step counts on the host, unless the kernel reads them."""
    name, key = entry.rsplit("/", 1)
    if key == "step" and not (group.get("fused") or group.get("capturable")):
        return files.read(entry)
    if files.shape(entry) == sharding.whole_shape(name, parameter):
        return sharding.like(entry, parameter, files.read(entry, sharding.part(entry, parameter)))
    return files.read(entry).to(parameter.device)


def _names(model: nn.Module) -> dict[int, str]:
    return {id(parameter): name for name, parameter in model.named_parameters()}


def _name_of(parameter: nn.Parameter, names: dict[int, str]) -> str:
    if id(parameter) not in names:
        raise CheckpointError(
            f"The optimizer updates a parameter of shape {list(parameter.shape)} that the model does not have; "
            "it was built for another model."
        )
    return names[id(parameter)]


def _class_name(optimizer: Optimizer) -> str:
    return type(optimizer).__name__


def _to_json(key: str, value: Any) -> Any:
    """Exact: JSON keeps every finite double by its repr, Python's NaN and Infinity, and int apart from float."""
    if isinstance(value, tuple | list):
        return {"tuple": [_to_json(key, item) for item in value]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise CheckpointError(f"The optimizer keeps a {type(value).__name__} under {key!r}; it cannot be stored exactly.")


def _from_json(value: Any) -> Any:
    return tuple(_from_json(item) for item in value["tuple"]) if isinstance(value, dict) else value


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path}: missing; a checkpoint of `save_only_model` cannot be resumed, only started from (`base_model`)."
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{path}: broken: {error}") from error
    return value
