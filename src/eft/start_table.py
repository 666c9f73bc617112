"""The derived quantities that are shown before the first step, so that a wrong config is caught in time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eft.config.root import TrainConfig
from eft.data.balance import Balance
from eft.data.dataset_meta import DatasetMeta
from eft.data.ledger import SourceLedger
from eft.data.plan import Plan
from eft.data.stream_plan import StreamPlan
from eft.models.probes import dtype_table
from eft.optim.in_backward import UpdatesInBackward
from eft.optim.optimizers import optimizer_groups
from eft.optim.param_groups import group_lines
from eft.optim.schedulers import learning_rates, schedule_name, warmup_of
from eft.optim.state_size import gradient_bytes, optimizer_state_bytes
from eft.parallel.plan import batch_of
from eft.trainer.flow import Flow
from eft.trainer.trainer import EftTrainer

Rows = list[tuple[str, str]]
"""(quantity, value) in reading order."""

_SHOWN_STEPS = 6


def start_rows(config: TrainConfig, trainer: EftTrainer, meta: DatasetMeta) -> Rows:
    """Everything worth a look before a training: model, data, steps, saves."""
    assert isinstance(trainer.plan, Plan | StreamPlan)
    plan = plan_rows(config, trainer.plan, trainer.flow, meta, trainer.args.world_size)
    return [*_model_rows(config, trainer), *plan, ("output", config.output_dir)]


def plan_rows(
    config: TrainConfig,
    plan: Plan | StreamPlan,
    flow: Flow,
    meta: DatasetMeta,
    world_size: int,
    balance: Balance | None = None,
) -> Rows:
    """What can be said without a model; `balance` is that of several ranks."""
    summary = plan.summary()
    idle = [] if balance is None else [("idle", _idle_text(balance))]
    return [*_data_rows(summary, meta), *_step_rows(config, summary, world_size), *idle, *_flow_rows(flow)]


def _idle_text(balance: Balance) -> str:
    return (
        f"{100 * balance.idle:.2f} % of the time ranks wait for the slowest of {balance.world_size}; "
        f"no sharing of these steps could bring it below {100 * balance.least_idle:.2f} %"
    )


def _model_rows(config: TrainConfig, trainer: EftTrainer) -> Rows:
    parameters = list(trainer.model.parameters())
    total = sum(parameter.numel() for parameter in parameters)
    trainable = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    autocast = "bf16" if trainer.args.bf16 else "fp16" if trainer.args.fp16 else "none"
    return [
        ("model", f"{config.base_model} · {type(trainer.model).__name__}"),
        ("parameters", f"{total:,} · trained {trainable:,} ({100 * trainable / total:.2f} %)"),
        *(("weights", str(row)) for row in dtype_table(trainer.model)),
        *(("updated", line) for line in group_lines(optimizer_groups(config, trainer.model))),
        *_arithmetic_rows(config),
        ("memory", _memory_text(config, trainer)),
        ("device", f"{trainer.args.device} · {_count(trainer.args.world_size, 'process')} · autocast {autocast}"),
    ]


def _memory_text(config: TrainConfig, trainer: EftTrainer) -> str:
    """What stays for the whole run; the preflight measures the activations."""
    weights = sum(parameter.nbytes for parameter in trainer.model.parameters())
    gradients = gradient_bytes(trainer.model)
    state = trainer.parts.optimizer
    build = state.build if isinstance(state, UpdatesInBackward) else state
    kept = "one gradient at a time" if config.optimizer_in_backward else f"gradients {_mebibytes(gradients)}"
    return (
        f"weights {_mebibytes(weights)} · {kept} · optimizer state "
        f"{_mebibytes(optimizer_state_bytes(build, trainer.model))} · activations on top"
    )


def _mebibytes(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"


def _arithmetic_rows(config: TrainConfig) -> Rows:
    """How bf16 weights are updated and what is compiled, where that is asked for."""
    rows = []
    if config.bfloat16:
        texts = {
            "stochastic_rounding": "stochastic rounding of fp32 updates; optimizer state fp32",
            "fp32_master": "fp32 master weights in the optimizer's state (4 more bytes per trained parameter)",
        }
        rows.append(("bf16 update", texts[config.bf16_update]))
    if config.torch_compile:
        rows.append(("compiled", f"each decoder layer, by {config.torch_compile_backend}, in the first steps"))
    return rows


def _data_rows(summary: dict[str, Any], meta: DatasetMeta) -> Rows:
    is_stream = "streaming" in summary
    rows = _stream_rows(summary) if is_stream else _sample_rows(summary)
    if meta.ledger is not None and not is_stream and any(source.epochs != 1.0 for source in meta.ledger.of("train")):
        rows.append(("mixture", mixture_text(meta.ledger.of("train"))))
    evals = meta.eval_dataset
    if evals is not None:
        named = evals if isinstance(evals, dict) else {"": evals}
        counts = (f"{name + ': ' if name else ''}{_count(len(data), 'sample')}" for name, data in named.items())
        rows.append(("held out", ", ".join(counts)))
    if meta.gates is not None:
        rows.append(("data gates", meta.gates.line()))
    if meta.cache_note:
        rows.append(("data cache", meta.cache_note))
    return rows


def _stream_rows(summary: dict[str, Any]) -> Rows:
    shares = ", ".join(f"{name} {100 * share:.1f} %" for name, share in summary["shares"].items())
    return [
        ("stream", f"{shares} of the tokens · packed {_count(summary['buffer_samples'], 'sample')} at a time"),
        ("budget", f"{summary['capacity_tokens']:,} tokens of capacity"),
    ]


def _sample_rows(summary: dict[str, Any]) -> Rows:
    tokens, trained = summary["tokens_per_epoch"], summary["trainable_tokens_per_epoch"]
    return [
        ("samples", f"{summary['samples_per_epoch']:,} per epoch"),
        ("tokens", f"{tokens:,} per epoch · trained {trained:,} ({100 * trained / tokens:.1f} %)"),
        (
            "fill",
            f"{summary['fill_percent']:.2f} % of bins of {summary['capacity']:,} tokens, "
            f"{summary['fill_of_possible_percent']:.2f} % of what any packing could reach",
        ),
        ("packing", f"{summary['strategy']}: {summary['strategy_reason']}"),
    ]


def mixture_text(sources: Sequence[SourceLedger]) -> str:
    """Share of the tokens and number of epochs of each data set, per epoch of the mixture."""
    total = sum(source.trainable + source.context for source in sources)
    return " · ".join(
        f"{source.name} {100 * (source.trainable + source.context) / total:.2f} % of the tokens, "
        f"{source.epochs:.3g} epochs of it"
        for source in sources
    )


def _step_rows(config: TrainConfig, summary: dict[str, Any], world_size: int) -> Rows:
    total, per_step = summary["total_steps"], summary.get("tokens_per_step")
    by = f" (by {summary['decided_by']}; the epochs alone give {summary['plan_steps']:,})"
    accumulation = batch_of(config, world_size, summary["global_batch_size"]).accumulation
    return [
        ("steps", f"{total:,}{by if summary['plan_steps'] != total else ''}"),
        (
            "batch",
            f"{_count(summary['global_batch_size'], 'bin')} per step = micro-batch {config.micro_batch_size} × "
            f"accumulation {accumulation} × {_count(world_size, 'process')}",
        ),
        ("tokens per step", _tokens_text(summary["capacity_tokens_per_step"] if per_step is None else per_step)),
        (
            "learning rate",
            f"{config.learning_rate:g} · {schedule_name(config).value} · {_warmup_text(config, total)}",
        ),
        ("optimizer", config.optimizer),
    ]


def _tokens_text(per_step: dict[str, Any] | int) -> str:
    if isinstance(per_step, int):
        return f"up to {per_step:,}"
    return f"{per_step['min']:,} to {per_step['max']:,}, median {per_step['median']:,.0f}"


def _flow_rows(flow: Flow) -> Rows:
    best = " · after every evaluation that is the best so far" if flow.save_best else ""
    return [
        ("checkpoints", (f"after step {_steps(flow.save_at)}" if flow.save_at else "none") + best),
        ("evaluations", f"after step {_steps(flow.evaluate_at)}" if flow.evaluate_at else "none"),
    ]


def _steps(steps: frozenset[int]) -> str:
    shown = ", ".join(f"{step:,}" for step in sorted(steps)[:_SHOWN_STEPS])
    return f"{shown}, … {max(steps):,} ({len(steps)} times)" if len(steps) > _SHOWN_STEPS else shown


def _count(number: int, noun: str) -> str:
    plural = noun if number == 1 else noun + ("es" if noun.endswith("s") else "s")
    return f"{number:,} {plural}"


def _warmup_text(config: TrainConfig, total_steps: int) -> str:
    warmup = warmup_of(config, total_steps)
    text = f"warm-up {_count(warmup, 'step')}"
    if warmup < total_steps:
        return text
    highest = max(learning_rates(config, total_steps))
    return f"{text}: the run ends before it does, the highest rate is {highest:.3g}"
