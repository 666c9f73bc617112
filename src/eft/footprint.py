"""What each process of a run will hold at its fullest moment, from the config alone: no weights are read.

Weights, gradients and optimizer state are counted on a model of the meta device; activations are what autograd saves
in a forward pass of the longest row there. The moments compared are the end of the forward pass and of the backward.
It is an estimate: on the CPU what malloc keeps is fitted to measured processes (`benchmarks/footprint.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv

from eft.config.root import TrainConfig
from eft.data.balance import bin_costs, share_step
from eft.data.plan import Plan
from eft.loss.linear import CHUNK_BYTES, plain_linear
from eft.models.adapters import apply_adapter, apply_freezing, set_dtypes
from eft.models.attention import base_of
from eft.models.load import check_causal_lm, describe_model
from eft.models.location import resolve_location
from eft.optim.optimizers import build_optimizer
from eft.optim.state_size import gradient_bytes, optimizer_state_bytes
from eft.parallel.plan import Degrees, batch_of
from eft.runtime.env import Environment, resolve_precision
from eft.runtime.memory import HostMemory

_TRACED = "eft_footprint"
_MEASURED_STEPS = 256

_PROCESS = 88 << 20
"""Kernels, threads and gloo's buffers: what a process takes beside its tensors once it trains."""
_ROWS_SHORTER = 0.98
"""Rows so much shorter than the longest are the rule: tensors of the longest that are just above malloc's limit lie in
its heap when they are of those."""
_HOLES = {
    (False, False): (0.0, 0.15, 0.63, 0.57),
    (False, True): (0.56, 0.45, 0.19, 0.0),
    (True, False): (0.5, 0.18, 0.49, 0.18),
    (True, True): (0.5, 0.35, 0.7, 0.4),
}
"""Fitted: bytes held beyond each byte of activations in malloc's heap, of those in mappings of their own, of gradients
and of parameters in the heap. By whether FSDP2 gathers layers meanwhile, and whether gradients wait for the next
micro-batch: else they come and go."""


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
    """Whole layers that FSDP2 holds for a moment: weights and gradients."""
    kept: int
    """What malloc does not give back between steps, and the process's own; 0 on an accelerator."""
    peak: int
    """At the fuller of the two moments, with `kept`."""
    tokens: int
    """Of that micro-batch."""
    checkpoint: int
    """On the disk, weights and optimizer state."""

    def rows(self, degrees: Degrees) -> list[tuple[str, str]]:
        """(quantity, value) to be shown."""
        parts = {
            "weights": self.weights,
            "gradients": self.gradients,
            "DDP's buckets": self.buckets,
            "optimizer": self.optimizer,
            "gathered layers": self.gathered,
            f"activations and loss of {self.tokens:,} tokens": self.activations,
            "kept by malloc on the CPU": self.kept,
        }
        listed = " · ".join(f"{name} {_size(count)}" for name, count in parts.items() if count)
        return [
            ("processes", f"{degrees.world_size}: {degrees}"),
            ("memory of each", f"about {_size(self.peak)} at the peak of a step, an estimate: {listed}"),
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
    saved, in_heap = _saved_bytes(model, tokens, config, precision.compute_dtype)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    gradients = gradient_bytes(model)
    state = optimizer_state_bytes(lambda module: build_optimizer(config, module, seed=config.seed), model)
    parts = degrees.dp_shard * degrees.cp if degrees.sharded else 1
    share = parts * degrees.tp
    head = _head_bytes(model, trained, precision.compute_dtype, in_parts=parts > 1)
    gathered = _gathered_bytes(model) // degrees.tp if parts > 1 else 0
    buckets = gradients if parts == 1 and degrees.gradient_ranks > 1 else 0
    resident = (weights + buckets + state) // share
    # Between micro-batches FSDP2 keeps gradients whole, and shards them after the last one.
    accumulated = gradients // degrees.tp if batch_of(config, world_size).accumulation > 1 else 0
    layers = base_of(model).config.get_text_config().num_hidden_layers
    activations = saved // degrees.tp + head
    forward = resident + accumulated + activations + gathered
    backward = resident + (accumulated or gradients // share) + saved // degrees.tp // layers + gathered
    kept = 0
    if here.device.type == "cpu":
        how = (parts > 1, accumulated > 0)
        in_heap //= degrees.tp
        kept = _PROCESS + _holes(how, in_heap, activations - in_heap, gradients // share, _small(model) // degrees.tp)
    return Footprint(
        weights=weights // share,
        gradients=gradients // share,
        buckets=buckets // share,
        optimizer=state // share,
        activations=activations,
        gathered=gathered,
        kept=kept,
        peak=max(forward, backward) + kept,
        tokens=tokens,
        checkpoint=_saved_weights(model) + state,
    )


def _holes(how: tuple[bool, bool], *num_bytes: int) -> int:
    """What malloc keeps of rows of other lengths, by `_HOLES`: it does not fit the tensors of this one."""
    return int(sum(part * count for part, count in zip(_HOLES[how], num_bytes, strict=True)))


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


def _saved_bytes(model: PreTrainedModel, tokens: int, config: TrainConfig, dtype: torch.dtype) -> tuple[int, int]:
    """What autograd keeps of the decoder's forward pass over a row of `tokens`, weights apart; and what of it is in
    tensors so small that malloc's heap holds them, of this row or of one a little shorter."""
    base = base_of(model)
    layers = int(base.config.get_text_config().num_hidden_layers)
    ids = torch.zeros((1, tokens), dtype=torch.int64, device="meta")
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = tensor
        return tensor

    with _traced_attention(base), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        # A prebuilt mask is taken as it is; without one the values of the positions are looked at.
        mask = torch.zeros((1, 1, 1, 1), device="meta")
        base.get_decoder()(input_ids=ids, position_ids=ids, attention_mask=mask, use_cache=False)
    sizes = [int(tensor.untyped_storage().nbytes()) for tensor in saved.values()]
    total, in_heap = sum(sizes), sum(size for size in sizes if size * _ROWS_SHORTER < HostMemory.MAPPED_FROM)
    if dtype != torch.float32:
        # Autocast keeps the operands of its products in half the bytes, and a cast copy of the weights.
        total = total // 2 + sum(parameter.numel() * dtype.itemsize for parameter in model.parameters())
        in_heap //= 2
    if config.gradient_checkpointing:
        inputs = int(layers * tokens * base.config.get_text_config().hidden_size * 4)
        return inputs + total // layers, in_heap // layers
    return total, in_heap


def _head_bytes(model: PreTrainedModel, trained: int, dtype: torch.dtype, *, in_parts: bool) -> int:
    """The loss's own: hidden states and their gradient, a chunk of logits, the gradient of the head's weight.

    A head that FSDP2 or an adapter has wrapped is differentiated by autograd (`loss.linear.module_cross_entropy`): a
    chunk's logits and their gradient lie side by side.
    """
    head = base_of(model).get_output_embeddings()
    rows, hidden = head.weight.shape
    trains = head.weight.requires_grad
    by_autograd = in_parts or plain_linear(head) is None
    most = CHUNK_BYTES if trains and not by_autograd else CHUNK_BYTES // 4
    chunk = min(trained * rows * dtype.itemsize, most) * (2 if by_autograd else 1)
    of_weight = head.weight.numel() * 4 if trains else 0
    return int(2 * trained * hidden * 4 + chunk + of_weight)


def _gathered_bytes(model: PreTrainedModel) -> int:
    """Embedding and head, and two decoder layers: one at work, with its gradients, and one on its way."""
    base = base_of(model)
    layers = [module for module in base.modules() if type(module).__name__ in (base._no_split_modules or ())]
    largest = max((_bytes_of_two(layer) for layer in layers), default=0)
    ends = {id(module): module for module in (base.get_input_embeddings(), base.get_output_embeddings())}
    return largest + sum(int(parameter.nbytes) for module in ends.values() for parameter in module.parameters())


def _bytes_of_two(layer: nn.Module) -> int:
    """Twice the weights and once their gradients."""
    return sum(parameter.nbytes * (2 + parameter.requires_grad) for parameter in layer.parameters())


def _saved_weights(model: nn.Module) -> int:
    """An adapter alone, else all weights."""
    parameters = list(model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    is_adapter = any("lora_" in name for name, _ in model.named_parameters())
    return sum(parameter.nbytes for parameter in (trained if is_adapter else parameters))


class _KeptByAttention(torch.autograd.Function):
    """Has the shape of attention and keeps what its kernels keep: queries, keys, values, output, one number a row."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty((*query.shape[:-1], value.shape[-1]))
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1]))
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        raise AssertionError("only the forward pass is traced")


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    groups = query.shape[1] // key.shape[1]
    output = _KeptByAttention.apply(query, repeat_kv(key, groups), repeat_kv(value, groups))  # type: ignore[no-untyped-call]  # torch's has no types
    return output.transpose(1, 2).contiguous(), None


@contextmanager
def _traced_attention(base: PreTrainedModel) -> Iterator[None]:
    before = base.config._attn_implementation
    AttentionInterface.register(_TRACED, _attention)
    AttentionMaskInterface.register(_TRACED, lambda *args, **kwargs: None)
    base.set_attn_implementation(_TRACED)
    try:
        yield
    finally:
        base.set_attn_implementation(before)
