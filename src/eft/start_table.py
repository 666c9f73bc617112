"""The derived quantities that are shown before the first step, so that a wrong config is caught in time."""

from __future__ import annotations

from typing import Any

from eft.config.root import TrainConfig
from eft.data.dataset_meta import DatasetMeta
from eft.data.plan import Plan
from eft.models.probes import dtype_table
from eft.optim.schedulers import learning_rates, schedule_name, warmup_of
from eft.parallel.plan import batch_of
from eft.trainer.flow import Flow
from eft.trainer.trainer import EftTrainer

Rows = list[tuple[str, str]]
"""(quantity, value) in reading order."""

_SHOWN_STEPS = 6


def start_rows(config: TrainConfig, trainer: EftTrainer, meta: DatasetMeta) -> Rows:
    """Everything worth a look before a training: model, data, steps, saves."""
    assert isinstance(trainer.plan, Plan)
    plan = plan_rows(config, trainer.plan, trainer.flow, meta, trainer.args.world_size)
    return [*_model_rows(config, trainer), *plan, ("output", config.output_dir)]


def plan_rows(config: TrainConfig, plan: Plan, flow: Flow, meta: DatasetMeta, world_size: int) -> Rows:
    """What can be said without a model."""
    summary = plan.summary()
    return [*_data_rows(summary, meta), *_step_rows(config, summary, world_size), *_flow_rows(flow)]


def _model_rows(config: TrainConfig, trainer: EftTrainer) -> Rows:
    parameters = list(trainer.model.parameters())
    total = sum(parameter.numel() for parameter in parameters)
    trainable = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    autocast = "bf16" if trainer.args.bf16 else "fp16" if trainer.args.fp16 else "none"
    return [
        ("model", f"{config.base_model} · {type(trainer.model).__name__}"),
        ("parameters", f"{total:,} · trained {trainable:,} ({100 * trainable / total:.2f} %)"),
        *(("weights", str(row)) for row in dtype_table(trainer.model)),
        ("device", f"{trainer.args.device} · {_count(trainer.args.world_size, 'process')} · autocast {autocast}"),
    ]


def _data_rows(summary: dict[str, Any], meta: DatasetMeta) -> Rows:
    tokens, trained = summary["tokens_per_epoch"], summary["trainable_tokens_per_epoch"]
    rows = [
        ("samples", f"{summary['samples_per_epoch']:,} per epoch"),
        ("tokens", f"{tokens:,} per epoch · trained {trained:,} ({100 * trained / tokens:.1f} %)"),
        ("fill", f"{summary['fill_percent']:.2f} % of bins of {summary['capacity']:,} tokens"),
    ]
    evals = meta.eval_dataset
    if evals is not None:
        named = evals if isinstance(evals, dict) else {"": evals}
        counts = (f"{name + ': ' if name else ''}{_count(len(data), 'sample')}" for name, data in named.items())
        rows.append(("held out", ", ".join(counts)))
    if meta.cache_note:
        rows.append(("data cache", meta.cache_note))
    return rows


def _step_rows(config: TrainConfig, summary: dict[str, Any], world_size: int) -> Rows:
    total, per_step = summary["total_steps"], summary["tokens_per_step"]
    by = f" (by {summary['decided_by']}; the epochs alone give {summary['plan_steps']:,})"
    accumulation = batch_of(config, world_size).accumulation
    return [
        ("steps", f"{total:,}{by if summary['plan_steps'] != total else ''}"),
        (
            "batch",
            f"{_count(summary['global_batch_size'], 'bin')} per step = micro-batch {config.micro_batch_size} × "
            f"accumulation {accumulation} × {_count(world_size, 'process')}",
        ),
        ("tokens per step", f"{per_step['min']:,} to {per_step['max']:,}, median {per_step['median']:,.0f}"),
        (
            "learning rate",
            f"{config.learning_rate:g} · {schedule_name(config).value} · {_warmup_text(config, total)}",
        ),
        ("optimizer", config.optimizer),
    ]


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
