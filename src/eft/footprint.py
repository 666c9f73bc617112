"""What each process of a run will hold at its fullest moment, from the config alone: no weights are read.

Weights, gradients and optimizer state are counted on a model of the meta device; activations are what autograd would
save in a forward pass of the longest row. Of a step's moments, and the start before them, the fullest counts.
It is an estimate: on the CPU what malloc keeps is fitted to measured processes (`benchmarks/footprint.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from eft.config.root import TrainConfig
from eft.data.balance import bin_costs, share_step
from eft.data.plan import Plan
from eft.loss.linear import CHUNK_BYTES, plain_linear
from eft.models.adapters import apply_adapter, apply_freezing, set_dtypes
from eft.models.attention import base_of
from eft.models.load import check_causal_lm, describe_model
from eft.models.location import resolve_location
from eft.models.saved_tensors import saved_sizes
from eft.optim.optimizers import build_optimizer
from eft.optim.state_size import gradient_bytes, optimizer_state_bytes
from eft.parallel.plan import Degrees, batch_of
from eft.runtime.env import Environment, resolve_precision
from eft.runtime.memory import HostMemory

_MEASURED_STEPS = 256

_PROCESS = 88 << 20
"""Kernels, threads and gloo's buffers: what a process takes beside its tensors once it trains."""
_ROWS_SHORTER = 0.98
"""Rows so much shorter than the longest are the rule: tensors of the longest that are just above malloc's limit lie in
its heap when they are of those."""
_HOLES: dict[tuple[str, bool], tuple[int, float, float, float, float]] = {
    ("plain", False): (0, 0.0, 0.15, 0.63, 0.57),
    ("plain", True): (85 << 20, 0.0, 0.06, 0.75, 0.81),
    ("waiting", False): (0, 0.56, 0.45, 0.19, 0.0),
    ("waiting", True): (85 << 20, 0.44, 0.40, 0.31, 0.19),
    ("recomputed", False): (0, 1.65, 1.66, 0.0, 0.0),
    ("recomputed", True): (0, 2.35, 1.10, 0.0, 0.82),
    ("autocast", False): (0, 0.34, 0.0, 0.77, 0.0),
    ("autocast", True): (0, 0.37, 0.0, 1.88, 0.0),
    ("adapter", False): (0, 1.12, 0.73, 0.0, 0.01),
    ("adapter", True): (123 << 20, 0.88, 0.80, 0.0, 0.42),
}
"""Fitted, by what a run does and whether FSDP2 gathers layers meanwhile: bytes that are held in any case, and beyond
each byte of activations in malloc's heap, of those in mappings of their own, of gradients, of the heap's parameters."""
_MOST_OF_HEAP = 1.6
"""The first of these numbers is at most so much of the activations in the heap: they are what breaks it up."""
_BROADCAST = 2 * (250 << 20)
"""DDP sends the first process's weights to all others, frozen ones too, in flat copies of so many bytes: two of what
torch calls `broadcast_bucket_size`."""
_BROADCAST_ON_CPU = 1.5
"""Measured: what a byte of these copies takes there."""


@dataclass(frozen=True)
class Footprint:
    """Bytes of one process, and of what a run writes."""

    weights: int
    gradients: int
    buckets: int
    """DDP's copies of the gradients, by which it averages them."""
    optimizer: int
    activations: int
    """Kept for the backward pass of the longest micro-batch, with the loss's own."""
    gathered: int
    """What is held for a moment: whole layers of FSDP2, weights and gradients; copies in which weights are sent."""
    kept: int
    """What malloc does not give back between steps, and the process's own; 0 on an accelerator."""
    peak: int
    """At the fullest moment, with `kept`."""
    moment: str
    """Which one that is; `activations` and `gathered` are those of it."""
    tokens: int
    """Of that micro-batch."""
    checkpoint: int
    """On the disk, weights and optimizer state."""

    def or_at_start(self, copies: int, kept: int) -> Footprint:
        """Before the first step weights are shared out, by way of so many bytes of `copies`: that, if it is more."""
        peak = self.weights + copies + kept
        if peak <= self.peak:
            return self
        at_start = replace(self, moment="the start, when weights are shared out", kept=kept, peak=peak)
        return replace(at_start, gathered=copies, gradients=0, buckets=0, optimizer=0, activations=0)

    def rows(self, degrees: Degrees) -> list[tuple[str, str]]:
        """(quantity, value) to be shown."""
        parts = {
            "weights": self.weights,
            "gradients": self.gradients,
            "DDP's buckets": self.buckets,
            "optimizer": self.optimizer,
            "weights gathered or sent": self.gathered,
            f"activations and loss of {self.tokens:,} tokens": self.activations,
            "kept by malloc on the CPU": self.kept,
        }
        listed = " · ".join(f"{name} {_size(count)}" for name, count in parts.items() if count)
        return [
            ("processes", f"{degrees.world_size}: {degrees}"),
            (
                "memory of each",
                f"about {_size(self.peak)} at its fullest ({self.moment}), an estimate: {listed}",
            ),
            ("on the disk", f"{_size(self.checkpoint)} a checkpoint"),
        ]


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:,.1f} MiB"


def footprint(config: TrainConfig, plan: Plan, world_size: int) -> Footprint:
    """The footprint of a run over `plan` on `world_size` processes; the fullest of them.

    Raises ConfigError and ModelError where the run would, as far as that is known without weights.
    """
    degrees = Degrees.resolve(world_size, config)
    model = _meta_model(config)
    tokens, trained = _longest_micro_batch(plan, config, degrees)
    tokens, trained = -(-tokens // degrees.cp), -(-trained // degrees.cp)
    here = Environment.detect()
    precision = resolve_precision(config, here)
    parts = degrees.dp_shard * degrees.cp if degrees.sharded else 1
    share = parts * degrees.tp
    quantised = _quantised(model, config)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    weights -= sum(layer.weight.nbytes - _packed_bytes(layer.weight, config) for layer in quantised)
    for layer in quantised:
        layer.weight.data = layer.weight.data.to(precision.compute_dtype)  # autocast makes no copy that is kept
    gradients = gradient_bytes(model)
    state = optimizer_state_bytes(lambda module: build_optimizer(config, module, seed=config.seed), model)
    buckets = gradients if parts == 1 and degrees.gradient_ranks > 1 else 0
    # Between micro-batches FSDP2 keeps gradients whole, and shards them after the last one.
    waiting = gradients // degrees.tp if batch_of(config, world_size).accumulation > 1 else 0
    sizes = saved_sizes(model, tokens, precision.autocast_dtype if precision.autocast else None)
    saved = _Saved.of(sizes, model, tokens, recomputed=config.gradient_checkpointing).divided_by(degrees.tp)
    head = _head_bytes(model, trained, precision.compute_dtype)
    embedding, output = (nbytes // degrees.tp for nbytes in _ends(model))
    # Gathered: a weight and the buffer it came in; at the end a gradient, what is sent, and gloo's copy of that.
    gathered_head, gathered_end, pair = 0, 0, 0
    if parts > 1:
        gathered_head, pair = 2 * output, _two_layers(model) // degrees.tp
        if base_of(model).get_input_embeddings().weight.requires_grad:
            gathered_end = (3 if here.device.type == "cpu" else 2) * embedding
    moments = [
        _Moment("the loss", waiting, saved.held + head, gathered_head),
        _Moment("the last layer's backward pass", waiting, saved.held + saved.again + head // 2, pair),
        _Moment("the first layer's backward pass", waiting or gradients // share, saved.of_layer, pair),
        _Moment("the end of the backward pass", waiting or gradients // share, 0, gathered_end),
    ]
    fullest = max(moments, key=lambda moment: moment.total)
    kept = 0
    if here.device.type == "cpu":
        held = moments[0].activations
        kinds = {
            "waiting": waiting > 0,
            "recomputed": config.gradient_checkpointing,
            "autocast": precision.autocast,
            "adapter": config.adapter is not None,
        }
        numbers = saved.in_heap, held - saved.in_heap, gradients // share, _small(model) // degrees.tp
        kept = _PROCESS + _holes([kind for kind, applies in kinds.items() if applies], parts > 1, *numbers)
    held_in_steps = Footprint(
        weights=weights // share,
        gradients=gradients // share,
        buckets=buckets // share,
        optimizer=state // share,
        activations=fullest.activations,
        gathered=fullest.gathered,
        kept=kept,
        peak=(weights + buckets + state) // share + fullest.total + kept,
        moment=fullest.name,
        tokens=tokens,
        checkpoint=_saved_weights(model) + state,
    )
    copies = _copies_at_start(weights // degrees.tp, degrees, sharded=parts > 1, on_cpu=here.device.type == "cpu")
    return held_in_steps.or_at_start(copies, min(kept, _PROCESS))


@dataclass(frozen=True)
class _Moment:
    """Of a step; beside weights, buckets and optimizer state, which are always there."""

    name: str
    gradients: int
    activations: int
    gathered: int

    @property
    def total(self) -> int:
        return self.gradients + self.activations + self.gathered


@dataclass(frozen=True)
class _Saved:
    """Bytes that autograd keeps."""

    held: int
    """From the forward to the backward pass."""
    again: int
    """Of one layer that is computed again; 0 where none is."""
    of_layer: int
    """In the backward pass of one layer, when all others are done."""
    in_heap: int
    """Of `held`: in tensors so small that malloc's heap holds them, of this row or of one a little shorter."""

    @classmethod
    def of(cls, sizes: Sequence[int], model: PreTrainedModel, tokens: int, *, recomputed: bool) -> _Saved:
        """Out of the `sizes` of all that a forward pass would keep without recomputation."""
        text = base_of(model).config.get_text_config()
        layers, total = int(text.num_hidden_layers), sum(sizes)
        in_heap = sum(size for size in sizes if size * _ROWS_SHORTER < HostMemory.MAPPED_FROM)
        if not recomputed:
            return cls(total, 0, total // layers, in_heap)
        an_input = tokens * int(text.hidden_size) * 4
        # While a layer is computed again and differentiated, gradients of its widest tensors are on their way.
        layer = total // layers + 2 * max(sizes)
        return cls(layers * an_input, layer, layer + an_input, in_heap // layers)

    def divided_by(self, count: int) -> _Saved:
        """One of so many equal parts."""
        return _Saved(self.held // count, self.again // count, self.of_layer // count, self.in_heap // count)


def _copies_at_start(weights: int, degrees: Degrees, *, sharded: bool, on_cpu: bool) -> int:
    """Beside one process's part of `weights`, while all get theirs; of the device that trains."""
    if sharded:
        # Each process has loaded the whole model into the host's memory and keeps it until its parts are cut out.
        return weights if on_cpu and not degrees.in_parts else 0
    if degrees.gradient_ranks == 1:
        return 0
    return int(min(weights, _BROADCAST) * (_BROADCAST_ON_CPU if on_cpu else 1))


def _holes(kinds: list[str], sharded: bool, *num_bytes: int) -> int:
    """What malloc keeps of rows of other lengths, by `_HOLES`: it does not fit the tensors of this one. The most of
    what each of `kinds` would keep: several at once have not been measured."""
    kept = []
    for kind in kinds or ["plain"]:
        anyway, *parts = _HOLES[kind, sharded]
        of_bytes = sum(part * count for part, count in zip(parts, num_bytes, strict=True))
        kept.append(min(anyway, _MOST_OF_HEAP * num_bytes[0]) + of_bytes)
    return int(max(kept))


def _small(model: nn.Module) -> int:
    """Bytes of parameters that lie in malloc's heap (`HostMemory.map_large_blocks`)."""
    sizes = (parameter.nbytes for parameter in model.parameters())
    return sum(size for size in sizes if size < HostMemory.MAPPED_FROM)


def _meta_model(config: TrainConfig) -> PreTrainedModel:
    """The model as it will be trained, without weights."""
    location = resolve_location("base_model", config.base_model)
    options: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    if config.gguf_file is not None:
        options["gguf_file"] = config.gguf_file
    else:
        check_causal_lm(location, config)
    loaded = AutoConfig.from_pretrained(location, **options)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(loaded, trust_remote_code=config.trust_remote_code)
        apply_freezing(model, config)
        model = apply_adapter(model, config, seed=config.seed)
    set_dtypes(model, pure_bf16=config.bfloat16)
    return model.train()


def _quantised(model: PreTrainedModel, config: TrainConfig) -> list[nn.Linear]:
    """The layers that bitsandbytes will pack: frozen linear ones, the head apart."""
    if not (config.load_in_4bit or config.load_in_8bit):
        return []
    base = base_of(model)
    head, skipped = base.get_output_embeddings(), (config.bnb_config_kwargs or {}).get("llm_int8_skip_modules") or []
    return [
        module
        for name, module in base.named_modules()
        if type(module) is nn.Linear and module is not head and not module.weight.requires_grad
        if not any(part in name for part in skipped)
    ]


def _packed_bytes(weight: Tensor, config: TrainConfig) -> int:
    """Of a quantised matrix: in 8 bits one fp32 scale a row, in 4 bits one for every 64 numbers, itself in 8 bits."""
    if config.load_in_8bit:
        return weight.numel() + 4 * len(weight)
    twice = (config.bnb_config_kwargs or {}).get("bnb_4bit_use_double_quant", True)
    blocks = -(-weight.numel() // 64)
    return weight.numel() // 2 + (blocks + 4 * (-(-blocks // 256)) if twice else 4 * blocks)


def _longest_micro_batch(plan: Plan, config: TrainConfig, degrees: Degrees) -> tuple[int, int]:
    """(tokens, trained tokens) of the micro-batch with most tokens, over evenly spaced steps and all ranks."""
    batch, best = batch_of(config, degrees.world_size), (0, 0)
    cost_ratio = float(describe_model(_meta_model(config))["attention_cost_ratio"])
    for number in range(0, plan.total_steps, max(1, plan.total_steps // _MEASURED_STEPS)):
        step = plan.step(number)
        costs = bin_costs(plan.dataset.lengths, step.bins, cost_ratio)
        for rank in share_step(step, costs, degrees.dp, batch.accumulation, batch.micro_batch_size):
            for bins in rank:
                found = tuple(
                    sum(int(values[ids].sum()) for ids in bins)
                    for values in (plan.dataset.lengths, plan.dataset.trainable_counts)
                )
                best = max(best, (found[0], found[1]))
    return best


def _head_bytes(model: PreTrainedModel, trained: int, dtype: torch.dtype) -> int:
    """The loss's own: hidden states and their gradient, a chunk of logits, the gradient of the head's weight.

    A head that an adapter has wrapped is differentiated by autograd (`loss.linear.module_cross_entropy`): a chunk's
    logits and their gradient lie side by side.
    """
    head = base_of(model).get_output_embeddings()
    rows, hidden = head.weight.shape
    trains = head.weight.requires_grad
    by_autograd = plain_linear(head) is None
    most = CHUNK_BYTES if trains and not by_autograd else CHUNK_BYTES // 4
    chunk = min(trained * rows * dtype.itemsize, most) * (2 if by_autograd else 1)
    of_weight = head.weight.numel() * 4 if trains else 0
    cast = head.weight.numel() * dtype.itemsize if head.weight.dtype != dtype else 0
    return int(2 * trained * hidden * 4 + chunk + of_weight + cast)


def _ends(model: PreTrainedModel) -> tuple[int, int]:
    """Bytes of the embedding and of the head; both where one is the other."""
    base = base_of(model)
    modules = (base.get_input_embeddings(), base.get_output_embeddings())
    embedding, head = (sum(parameter.nbytes for parameter in module.parameters()) for module in modules)
    return embedding, head


def _two_layers(model: PreTrainedModel) -> int:
    """What FSDP2 gathers of decoder layers: one at work, with its gradients, and one on its way."""
    base = base_of(model)
    layers = [module for module in base.modules() if type(module).__name__ in (base._no_split_modules or ())]
    return max((_bytes_of_two(layer) for layer in layers), default=0)


def _bytes_of_two(layer: nn.Module) -> int:
    """Twice the weights and once their gradients."""
    return sum(parameter.nbytes * (2 + parameter.requires_grad) for parameter in layer.parameters())


def _saved_weights(model: nn.Module) -> int:
    """An adapter alone, else all weights."""
    parameters = list(model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    is_adapter = any("lora_" in name for name, _ in model.named_parameters())
    return sum(parameter.nbytes for parameter in (trained if is_adapter else parameters))
