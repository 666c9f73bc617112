"""Where a model keeps packed documents apart: natively, through a prebuilt mask, or not at all.

Nothing here goes by a model's name: a tiny packed row is run through the model itself, and what comes out decides.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.masking_utils import create_causal_mask, create_masks_for_generate

from eft.core.errors import ModelError
from eft.models.attention_record import AttentionRecord, record_attention
from eft.models.document_attention import NO_MASK, PACKED_ATTENTION, packed_forward, register
from eft.models.layer_outputs import first_layer_apart, record_layers
from eft.models.row_length import row_length_fault

__all__ = [
    "PACKED_ATTENTION",
    "BoundarySupport",
    "base_of",
    "boundary_inputs",
    "install_attention",
    "measure_boundaries",
    "packed_forward",
    "packed_mask",
    "packing_support",
    "register",
]

_BOUNDARY_KEYS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
_PROBE_LENGTHS = (7, 5, 7)
"""Documents of the probe's row: the first is perturbed, and two share a length, so that grouping is exercised."""
_PROBE_SEED = 20_240_817
_DIFFERENCE_FP32 = 1e-5
"""Packed against alone, as a share of the largest logit (E1)."""
_DIFFERENCE_EPS = 8
"""The same in half precision, in units of the format's spacing at 1."""
_LEAK_EXPERTS_FP32 = 1e-6
"""Expert matrix products change shape with the routing of other documents, so their rounding may (E1)."""
_PLAIN_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")

MaskForm = Literal["", "by_layer_type", "by_config", "causal"]


@dataclass(frozen=True)
class BoundarySupport:
    """How a model keeps packed documents apart, and the measurements that say so (shares of the largest logit)."""

    mode: Literal["native", "mask", "refused"]
    reason: str
    leak: float
    """Largest change of other documents' logits when one document is perturbed."""
    difference: float
    """Largest difference between a document's logits in the packed row and alone."""
    mask_form: MaskForm = ""
    """For `mask`: one per layer type of the config, one as the config's window says, or one plain causal."""
    passes_no_mask: bool = False
    """For `native`: whether `NO_MASK` goes with the boundaries."""


@dataclass(frozen=True)
class BoundaryMeasurement:
    """One run of the probe. `leak` and `difference` are shares of the largest logit."""

    leak: float
    difference: float
    own_change: float
    """Change of the perturbed document itself; 0 would mean that the probe sees nothing."""
    leak_limit: float
    difference_limit: float
    packed: AttentionRecord
    """Calls of our attention function in the packed run, and the masks that we built for it."""
    alone: AttentionRecord
    """The same in the runs of single documents, with the masks that the model built."""
    leak_place: str
    """`, first in model.layers.1`: where other documents begin to change; empty if no layer is found."""
    difference_place: str
    """The same for where packed documents begin to differ from the same ones alone."""

    def fault(self) -> str | None:
        """What is wrong, or None. Written so that NaN is wrong."""
        if not self.own_change > 0:
            return "the model's logits do not depend on its input, so nothing can be proven"
        if not self.leak <= self.leak_limit:
            return f"documents see each other (leak {self.leak:.1e} of the largest logit{self.leak_place})"
        if not self.difference <= self.difference_limit:
            amount = f"{self.difference:.1e} of the largest logit{self.difference_place}"
            return f"a packed document differs from the same one alone ({amount})"
        return None


def base_of(model: nn.Module) -> PreTrainedModel:
    """The transformers model itself, also inside DDP, DeepSpeed's engine and a peft wrapper."""
    if not isinstance(model, PreTrainedModel | PeftModel):
        model = getattr(model, "module", model)  # of a wrapper
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(base, PreTrainedModel):
        raise ModelError(f"model: {type(base).__name__} is no transformers model (PreTrainedModel), nor one in peft")
    return base


def install_attention(model: nn.Module, implementation: str) -> None:
    """Let the model, peft-wrapped or not, compute its attention by `implementation` (`attn_implementation`).

    A family that never calls a registered function stays on its own; `packing_support` finds out. Raises ModelError
    where the implementation cannot run here, such as flash attention without its package.
    """
    register()
    base = base_of(model)
    try:
        base.set_attn_implementation(implementation)
    except (ImportError, ValueError) as error:
        raise ModelError(
            f"attn_implementation: {implementation} cannot be used with {type(base).__name__} here ({error}); "
            f"`{PACKED_ATTENTION}` runs everywhere"
        ) from error


def packed_mask(model: nn.Module, position_ids: Tensor, form: MaskForm = "by_config") -> Tensor | dict[str, Tensor]:
    """The block-diagonal causal mask of a packed row, for families that ignore boundaries.

    position_ids int64 [1, T], restarting at 0 for each document → the mask [1, 1, T, T] in the dtype that the model's
    attention implementation reads, or one such mask per layer type (`by_layer_type`). Costs T² memory. Raises
    ModelError where the implementation has no masks of that kind.
    """
    base = base_of(model)
    config = base.config.get_text_config()
    embedding = base.get_input_embeddings().weight
    rows = torch.empty((1, position_ids.shape[1], 0), dtype=embedding.dtype, device=position_ids.device)
    settings = {
        "config": config,
        "inputs_embeds": rows,
        "attention_mask": None,
        "past_key_values": None,
        "position_ids": position_ids,
        # A row of one document needs no mask where the kernel can be causal by itself, and then none is made. One more
        # rule, which forbids nothing, makes the mask that a family in this mode is to be given always.
        "and_mask_function": _allowed,
    }
    mask = create_causal_mask(**settings) if form == "causal" else create_masks_for_generate(**settings)
    found = list(mask.values()) if isinstance(mask, dict) else [mask]
    # `[1, 1, T, T]` is what every family understands as prebuilt.
    if not all(isinstance(entry, Tensor) and entry.ndim == 4 for entry in found):
        raise ModelError(
            f"packing: no mask [1, 1, T, T] can be made for every layer (`{config._attn_implementation}` attention)"
        )
    if form != "by_layer_type" and len(found) > 1:
        raise ModelError(f"packing: {type(base).__name__} has layers of several kinds, one mask cannot serve them all")
    return dict(mask) if form == "by_layer_type" else found[0]


def _allowed(batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> Any:
    """A mask rule that is always true (transformers asks with index tensors)."""
    return q_idx >= 0


def boundary_inputs(support: BoundarySupport, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments for a forward from a collator's batch, boundaries in the form the model understands.

    Call `model(**inputs, use_cache=False)` in `packed_forward()`. A padded batch (without `cu_seq_lens_q`) keeps its
    `attention_mask`. Labels are not passed: the trainer owns the loss. Raises ModelError for a packed batch on a
    refused model.
    """
    wanted: dict[str, Any] = {name: batch[name] for name in ("input_ids", "position_ids") if name in batch}
    if "cu_seq_lens_q" not in batch:
        wanted["attention_mask"] = batch["attention_mask"]
    elif support.mode == "native":
        wanted |= {name: batch[name] for name in _BOUNDARY_KEYS if name in batch}
        if support.passes_no_mask:
            wanted["attention_mask"] = NO_MASK
    elif support.mode == "mask":
        wanted["attention_mask"] = packed_mask(model, batch["position_ids"], support.mask_form)
    else:
        raise ModelError(f"sample_packing: this model cannot be packed: {support.reason}")
    return {name: value for name, value in wanted.items() if forward_accepts(model, name)}


def forward_accepts(model: nn.Module, name: str) -> bool:
    """Whether the model's forward takes a keyword argument `name`, by itself or among others."""
    names, takes_others = _forward_arguments(type(base_of(model)))  # type: ignore[arg-type]  # untyped class
    return takes_others or name in names


@cache
def _forward_arguments(model_class: type[nn.Module]) -> tuple[frozenset[str], bool]:
    """(argument names, whether any other is taken) of a class's forward; asked for every micro-batch, hence kept."""
    parameters = inspect.signature(model_class.forward).parameters
    return frozenset(parameters), any(entry.kind is entry.VAR_KEYWORD for entry in parameters.values())


def packing_support(
    model: nn.Module,
    *,
    autocast_dtype: torch.dtype | None = None,
    longest_document: int | None = None,
    longest_row: int | None = None,
) -> BoundarySupport:
    """How this model keeps packed documents apart, found by running it on a row of three tiny documents.

    Tried in order: the boundaries as arguments (with our attention: called with them in every attention layer, and
    with the same look-back as the model's own masks), then prebuilt masks that look back as far as the model's own.
    The model's modes and every random generator stay as they are. `autocast_dtype` is what training will run under;
    lengths are in tokens, None for any: some families compute something else once rows are long enough.
    """
    too_long = row_length_fault(base_of(model).config.get_text_config(), longest_document, longest_row)
    if too_long is not None:
        return BoundarySupport("refused", too_long, float("nan"), float("nan"))
    faults: dict[str, list[str]] = {}
    native = BoundarySupport("native", "boundaries reach every attention layer", 0.0, 0.0)
    attempts = [native]
    if base_of(model).config.get_text_config()._attn_implementation == PACKED_ATTENTION:
        attempts.insert(0, replace(native, passes_no_mask=True))
    by_type = getattr(base_of(model).config.get_text_config(), "layer_types", None) is not None
    forms: list[MaskForm] = ["by_layer_type", "by_config", "causal"] if by_type else ["by_config", "causal"]
    attempts += [BoundarySupport("mask", "", 0.0, 0.0, form) for form in forms]
    leak, difference = float("nan"), float("nan")
    for attempt in attempts:
        # A foreign forward may raise anything on arguments it does not know; the text is the reason we give.
        try:
            measured = measure_boundaries(model, attempt, autocast_dtype=autocast_dtype)
            leak, difference = measured.leak, measured.difference
            fault = measured.fault() or _look_back_fault(model, attempt, measured)
        except Exception as error:
            text = str(error).strip().splitlines()[0] if str(error) else ""
            fault = text if isinstance(error, ModelError) else f"{type(error).__name__}: {text}"
        if fault is None:
            reason = attempt.reason if attempt.mode == "native" else _told(faults)
            return replace(attempt, reason=reason, leak=leak, difference=difference)
        if not attempt.passes_no_mask:  # said once: the next attempt differs in nothing else
            way = "boundaries as arguments" if attempt.mode == "native" else f"mask {attempt.mask_form}"
            faults.setdefault(fault, []).append(way)
    return BoundarySupport("refused", _told(faults), leak, difference)


def _told(faults: dict[str, list[str]]) -> str:
    """Each fault once, after the ways that have it."""
    return "; ".join(f"{', '.join(ways)}: {fault.removeprefix('packing: ')}" for fault, ways in faults.items())


def measure_boundaries(
    model: nn.Module, support: BoundarySupport, *, autocast_dtype: torch.dtype | None = None
) -> BoundaryMeasurement:
    """Run three tiny documents packed in the way of `support`, packed with the first perturbed, and alone."""
    base = base_of(model)
    vocabulary = int(base.config.get_text_config().vocab_size)
    # A generator of its own: the run's dropout masks must not depend on whether a probe ran.
    generator = torch.Generator().manual_seed(_PROBE_SEED)
    ids = torch.randint(0, vocabulary, (sum(_PROBE_LENGTHS),), generator=generator)
    first = _PROBE_LENGTHS[0]
    perturbed = ids.clone()
    perturbed[:first] = (ids[:first] + torch.randint(1, vocabulary, (first,), generator=generator)) % vocabulary
    device = base.get_input_embeddings().weight.device

    with probing(model, autocast_dtype) as precision:
        with record_attention() as packed_record, record_layers(model) as packed_layers:
            packed = _packed_logits(model, support, ids.to(device))
        with record_layers(model) as changed_layers:
            changed = _packed_logits(model, support, perturbed.to(device))
        with record_attention() as alone_record, record_layers(model) as alone_layers:
            alone = torch.cat(
                [_alone_logits(model, part.to(device)) for part in torch.split(ids, list(_PROBE_LENGTHS))]
            )
    scale = alone.abs().max().clamp_min(torch.finfo(alone.dtype).tiny)
    change = (changed - packed).abs() / scale
    full = precision in (torch.float32, torch.float64)
    limit = _DIFFERENCE_FP32 if full else _DIFFERENCE_EPS * torch.finfo(precision).eps
    leak_limit = (_LEAK_EXPERTS_FP32 if full else limit) if _has_experts(base.config.get_text_config()) else 0.0
    return BoundaryMeasurement(
        leak=float(change[first:].max()),
        difference=float(((packed - alone).abs() / scale).max()),
        own_change=float(change[:first].max()),
        leak_limit=leak_limit,
        difference_limit=limit,
        packed=packed_record,
        alone=alone_record,
        leak_place=first_layer_apart(packed_layers, changed_layers, limit=leak_limit, start=first),
        difference_place=first_layer_apart(packed_layers, alone_layers, limit=limit),
    )


def _packed_logits(model: nn.Module, support: BoundarySupport, ids: Tensor) -> Tensor:
    """int64 [T] → the probe row's logits, float32 or wider [T, V]."""
    bounds = torch.tensor([0, *accumulate(_PROBE_LENGTHS)], dtype=torch.int32, device=ids.device)
    lengths = torch.tensor(_PROBE_LENGTHS, device=ids.device)
    batch = {
        "input_ids": ids[None],
        "position_ids": torch.cat([torch.arange(length, device=ids.device) for length in _PROBE_LENGTHS])[None],
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": max(_PROBE_LENGTHS),
        "max_length_k": max(_PROBE_LENGTHS),
        "seq_idx": torch.repeat_interleave(torch.arange(len(lengths), device=ids.device), lengths).int()[None],
    }
    inputs = boundary_inputs(support, model, batch)
    if support.mode == "native" and "cu_seq_lens_q" not in inputs:
        raise ModelError("its forward takes no document boundaries")
    with packed_forward():
        return _wide(model(**inputs, **_no_cache(model)).logits[0])


def _alone_logits(model: nn.Module, ids: Tensor) -> Tensor:
    """int64 [L] → logits of one document by itself, as plain transformers runs it, float32 or wider [L, V]."""
    return _wide(model(input_ids=ids[None], **_no_cache(model)).logits[0])


def _no_cache(model: nn.Module) -> dict[str, bool]:
    return {"use_cache": False} if forward_accepts(model, "use_cache") else {}


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


@contextmanager
def probing(model: nn.Module, autocast_dtype: torch.dtype | None) -> Iterator[torch.dtype]:
    """Evaluation mode without gradients; afterwards every module's mode and the random generators are as before.

    Yields the precision of the forward. Parameters of several floating dtypes (fp32 trained, bf16 frozen) only work
    together under autocast, as in training.
    """
    dtypes = {parameter.dtype for parameter in model.parameters()} & set(_PLAIN_DTYPES)
    coarsest = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
    if autocast_dtype is None and len(dtypes) > 1:
        autocast_dtype = coarsest
    device = base_of(model).get_input_embeddings().weight.device
    modes = {module: module.training for module in model.modules()}
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng(devices=[device] if device.type == "cuda" else []))
        if autocast_dtype is not None:
            stack.enter_context(torch.autocast(device.type, dtype=autocast_dtype))
        model.eval()
        try:
            yield autocast_dtype or coarsest
        finally:
            for module, training in modes.items():
                module.training = training


def _look_back_fault(model: nn.Module, support: BoundarySupport, measured: BoundaryMeasurement) -> str | None:
    """What logits of tiny documents cannot show, since they are shorter than any real window; None if all is well."""
    config = base_of(model).config.get_text_config()
    if support.mode == "mask":
        return _mask_fault(config, support.mask_form, measured)
    ours = config._attn_implementation == PACKED_ATTENTION or measured.packed.calls
    return _call_fault(config, measured) if ours else None


def _call_fault(config: PretrainedConfig, measured: BoundaryMeasurement) -> str | None:
    """Layers that our function did not run, or whose arguments and masks disagree on how far they look back."""
    expected = _attention_layers(config)
    bounded = sum(call.bounded for call in measured.packed.calls)
    if bounded < expected:
        return f"{bounded} of {expected} attention layers ran per document"
    masks, calls = measured.alone.masks, measured.alone.calls
    for call in calls:
        if call.mask in masks and masks[call.mask] != call.span:
            return f"a layer looks back {call.span} tokens by its arguments but {masks[call.mask]} by its mask"
    unnamed = set(masks.values()) - {call.span for call in calls}
    if unnamed and any(call.mask not in masks for call in calls):
        return f"a mask for a look-back of {unnamed.pop()} tokens is built, but no layer names it"
    return None


def _mask_fault(config: PretrainedConfig, form: MaskForm, measured: BoundaryMeasurement) -> str | None:
    """Whether prebuilt masks look back as far as the model's own; without a record of those, the config's word."""
    own, built = set(measured.alone.masks.values()), set(measured.packed.masks.values())
    if own:
        same = built <= own if form == "by_layer_type" else built == own
        return None if same else f"it looks back {built} tokens, the model's own masks {own}"
    limits = [getattr(config, key, None) for key in ("sliding_window", "attention_chunk_size")]
    if form == "causal" and any(limits):
        return f"it has no limit, but the config names a look-back of {next(filter(None, limits))} tokens"
    return None


def _attention_layers(config: PretrainedConfig) -> int:
    """Decoder layers that have softmax attention; hybrids say which ones, all others have it everywhere."""
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return int(config.num_hidden_layers)
    return sum(("attention" in kind and kind != "linear_attention") or "hybrid" in kind for kind in kinds)


def _has_experts(config: PretrainedConfig) -> bool:
    """By the config or one inside it (DBRX keeps its experts in a config of their own)."""
    configs = [config, *(value for value in vars(config).values() if isinstance(value, PretrainedConfig))]
    return any((getattr(entry, key, None) or 0) > 1 for entry in configs for key in _EXPERT_KEYS)
