"""Checks of a live model that cost seconds: boundaries, dtypes, and which tensors training really changes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from eft.core.errors import PromiseBroken
from eft.core.records import PromiseResult
from eft.models.attention import BoundarySupport, base_of, measure_boundaries

_CHECKSUM_CHUNK = 1 << 22
"""Elements that are widened to int64 at once, so that a large tensor's checksum needs 32 MiB of its own."""
_SAMPLE_SIZE = 1024
_NAMED_TENSORS = 8
_INTEGER_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def boundary_probe(
    model: nn.Module, support: BoundarySupport, *, autocast_dtype: torch.dtype | None = None
) -> PromiseResult:
    """E1 on this very model, in the way `support` will be used: three tiny documents, one perturbed, each also alone.

    Modes, gradients and random generators stay as they are. `autocast_dtype` is the dtype that training runs under.
    Numbers: `leak` and `difference`, shares of the largest logit.
    """
    title = "packed documents do not see each other"
    if support.mode == "refused":
        return PromiseResult("E1", title, "not applicable", f"rows hold one document each: {support.reason}")
    measured = measure_boundaries(model, support, autocast_dtype=autocast_dtype)
    fault = measured.fault()
    detail = fault or (
        f"leak {measured.leak:.1e}, packed against alone {measured.difference:.1e} of the largest logit "
        f"(limits {measured.leak_limit:.0e}, {measured.difference_limit:.0e}; {support.mode} boundaries)"
    )
    numbers = {"leak": measured.leak, "difference": measured.difference}
    return PromiseResult("E1", title, "fail" if fault else "pass", detail, numbers)


def select_logits_kwargs(model: nn.Module) -> bool:
    """Whether the model's forward computes logits of chosen positions only (`logits_to_keep`, an index tensor).

    Read off the signature of the model inside any peft wrapper: `**kwargs` alone would swallow the argument unused.
    """
    return "logits_to_keep" in inspect.signature(base_of(model).forward).parameters


@dataclass(frozen=True)
class DtypeRow:
    """One line of the start table."""

    trainable: bool
    dtype: str
    """torch's name without `torch.`."""
    tensors: int
    parameters: int
    bytes: int

    def __str__(self) -> str:
        kind = "trained" if self.trainable else "frozen"
        return f"{kind} {self.dtype}: {self.parameters:,} parameters, {self.bytes / 2**20:,.1f} MiB"


def dtype_table(model: nn.Module) -> list[DtypeRow]:
    """Parameters by (trainable, dtype), trainable and large first; tied tensors count once, shards as held here."""
    groups: dict[tuple[bool, torch.dtype], list[Tensor]] = {}
    for parameter in model.parameters():
        groups.setdefault((parameter.requires_grad, parameter.dtype), []).append(_local(parameter))
    rows = [
        DtypeRow(
            trainable,
            str(dtype).removeprefix("torch."),
            len(tensors),
            sum(tensor.numel() for tensor in tensors),
            sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        )
        for (trainable, dtype), tensors in groups.items()
    ]
    return sorted(rows, key=lambda row: (not row.trainable, -row.bytes))


class TrainedTensorAudit:
    """After some optimizer steps, every trainable tensor has changed and no frozen one has.

    Check after step 3, not 1: LoRA's B starts at 0, so A has no gradient in the first step, and a warm-up's first
    learning rate may be 0. Costs two passes over the weights and 8 KiB per tensor.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._before: dict[str, Tensor] = {}
        self.idle: list[str] = []
        """Names of the trainable tensors that the last check found unchanged, and that had reason to change."""
        self._rows = _trained_rows(model)

    def start(self) -> None:
        """Remember a checksum of every parameter; from now on, note whether single trained tokens occur."""
        for rows in self._rows:
            rows.start()
        self._before = {name: _checksum(parameter) for name, parameter in _parameters(self._model)}

    def close(self) -> None:
        """Leave the model as it was; nothing to check any more."""
        for rows in self._rows:
            rows.stop()

    def check(self) -> PromiseResult:
        """Compare with `start()`. Fails by the names of idle trainable tensors and of changed frozen ones."""
        assert self._before, "start() comes before check()"
        idle: list[str] = []
        moved: list[str] = []
        trainable = frozen = 0
        parameters = dict(_parameters(self._model))
        flags = [not torch.equal(_checksum(parameter), self._before[name]) for name, parameter in parameters.items()]
        found = _on_any_rank([*flags, *(rows.occurred() for rows in self._rows)])
        unseen = {rows.name for rows, seen in zip(self._rows, found[len(flags) :], strict=True) if not seen}
        waiting = 0
        for (name, parameter), changed in zip(parameters.items(), found, strict=False):
            trainable += parameter.requires_grad
            frozen += not parameter.requires_grad
            if parameter.requires_grad and not changed:
                if name.rpartition(".")[0] in unseen:
                    waiting += 1
                else:
                    idle.append(name)
            elif changed and not parameter.requires_grad:
                moved.append(name)
        self.idle = idle
        faults = []
        if not trainable:
            faults.append("nothing is trainable")
        if idle:
            faults.append(f"{len(idle)} of {trainable} trainable tensors did not change: {_some(idle)}")
        if moved:
            faults.append(f"{len(moved)} of {frozen} frozen tensors changed: {_some(moved)}")
        passed = f"{trainable - waiting} trainable tensors changed, {frozen} frozen ones did not"
        if waiting:
            passed += f"; {waiting} could not yet: the single tokens that it trains did not occur in these steps"
        return PromiseResult(
            "trained tensors",
            "every trainable tensor changes, no frozen one does",
            "fail" if faults else "pass",
            "; ".join(faults) or passed,
            {"trainable": trainable, "frozen": frozen, "idle": len(idle), "moved": len(moved), "waiting": waiting},
        )


class _TrainedRows:
    """Whether one of the tokens whose embeddings are trained (`peft_trainable_token_indices`) went into the model.

    An embedding's rows have no gradient but from their own tokens; a head's get one from every token.
    """

    def __init__(self, name: str, layers: list[TrainableTokensLayer]) -> None:
        self.name = name
        self._layers = layers
        self._seen: Tensor | None = None
        self._hooks: list[RemovableHandle] = []

    def start(self) -> None:
        """Look at every input from now on, on its own device."""
        self._hooks = [layer.register_forward_pre_hook(self._look) for layer in self._layers]

    def _look(self, layer: Any, args: tuple[Any, ...]) -> None:
        ids = args[0]
        if ids.is_floating_point():  # hidden states: the layer is a head
            seen = torch.ones((), dtype=torch.bool, device=ids.device)
        else:
            wanted = [index for indices in layer.token_indices.values() for index in indices]
            seen = torch.isin(ids, torch.tensor(wanted, device=ids.device)).any()
        self._seen = seen if self._seen is None else self._seen | seen

    def occurred(self) -> bool:
        """Whether one came so far."""
        return self._seen is not None and bool(self._seen)

    def stop(self) -> None:
        """Stop looking."""
        for hook in self._hooks:
            hook.remove()


def _trained_rows(model: nn.Module) -> list[_TrainedRows]:
    # A tied head holds its embedding's rows: one tensor, by its first name as in `named_parameters`.
    found: dict[int, tuple[str, list[TrainableTokensLayer]]] = {}
    for path, module in model.named_modules():
        if isinstance(module, TrainableTokensLayer):
            rows = module.trainable_tokens_delta
            found.setdefault(id(rows), (f"{path}.trainable_tokens_delta", []))[1].append(module)
    return [_TrainedRows(name, layers) for name, layers in found.values()]


def require_gradients(loss: Tensor, model: nn.Module) -> None:
    """Raise PromiseBroken for a loss to train on that depends on no trained tensor: its backward would only say so."""
    if not torch.is_grad_enabled() or loss.requires_grad:
        return
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    cut = f"the loss depends on none of the {len(names)} trainable tensors: {_some(names)}" if names else ""
    raise PromiseBroken(f"trained tensors: {cut or 'nothing is trainable'}")


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Named parameters that have elements, here or on another process."""
    named = model.named_parameters()
    return ((name, parameter) for name, parameter in named if getattr(parameter, "ds_numel", parameter.numel()))


def _on_any_rank(flags: list[bool]) -> list[bool]:
    """Which of the flags some process raised: its shard of a tensor may be the only one that changed."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return flags
    # int32: what every backend can compare.
    raised = torch.tensor(flags, dtype=torch.int32)
    if dist.get_backend() == "nccl":
        raised = raised.cuda()
    dist.all_reduce(raised, dist.ReduceOp.MAX)
    return [bool(flag) for flag in raised.tolist()]


def _local(parameter: Tensor) -> Tensor:
    # Under ZeRO-3 the parameter itself is empty between uses.
    here: Tensor = getattr(parameter, "ds_tensor", parameter)
    return here.to_local() if isinstance(here, DTensor) else here


def _checksum(parameter: Tensor) -> Tensor:
    """int64 [1 + sample]: the sum of all bit patterns, then evenly spaced bit patterns themselves.

    Bits instead of values: NaN equals itself, and a change of one last place counts as much as any other.
    """
    values = _local(parameter).detach().reshape(-1)
    bits = values.view(_INTEGER_OF_SIZE[values.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for chunk in torch.split(bits, _CHECKSUM_CHUNK):
        total += chunk.sum(dtype=torch.int64)
    sample = bits[:: max(1, bits.numel() // _SAMPLE_SIZE)][:_SAMPLE_SIZE].to(torch.int64)
    return torch.cat([total[None], sample]).cpu()


def _some(names: list[str]) -> str:
    rest = len(names) - _NAMED_TENSORS
    return ", ".join(names[:_NAMED_TENSORS]) + (f" and {rest} more" if rest > 0 else "")
