"""A whole run, top to bottom: data → model → trainer → training → export → verified export → report."""

from __future__ import annotations

import logging
import math
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from eft.builder import HFCausalTrainerBuilder, as_config, require_trackers
from eft.callbacks import RunOutcome
from eft.config.dump import show_config
from eft.config.load import LoadedConfig
from eft.config.root import TrainConfig
from eft.config.usage import KEYS_OF_RUN, keys_read
from eft.core import constants
from eft.core.atomic import write_json, write_text
from eft.core.errors import ConfigError, PromiseBroken
from eft.core.records import PromiseResult
from eft.data.chat_template import stop_token_of, template_of
from eft.data.dataset_meta import DatasetMeta
from eft.data.entry import Progress
from eft.data.plan import Plan, build_plan
from eft.data.prepare import prepare_datasets
from eft.models.adapters import apply_adapter, apply_freezing
from eft.models.compile import check_compiler
from eft.models.cost import attention_cost_ratio
from eft.models.export import check_saved_tensors, export_model, verify_export
from eft.models.kernels import check_liger
from eft.models.load import load_model
from eft.models.tokenizer import load_tokenizer, resize_embeddings
from eft.optim.schedulers import schedule_options
from eft.parallel.plan import batch_of
from eft.resume import checkpoint_to_resume, folder_request
from eft.runtime.env import Environment, resolve_precision, versions
from eft.runtime.run_folder import RunFolder, check_run_folder, claim_run_folder
from eft.samples import SampleAnswers
from eft.start_table import Rows, start_rows
from eft.trainer.trainer import EftTrainer

logger = logging.getLogger(__name__)

OnFinish = Callable[[Path], None]
OnStart = Callable[[Rows, DatasetMeta], None]


def prepare_tokenizer(config: TrainConfig) -> PreTrainedTokenizerBase:
    """The config's tokenizer with the config's chat template, as it trains and as it is exported."""
    tokenizer = load_tokenizer(config)
    is_changed = config.chat_template_kwargs or config.chat_template_date is not None
    if config.chat_template != "tokenizer_default" or is_changed:
        tokenizer.chat_template = template_of(tokenizer, config)
    return tokenizer


def load_datasets(
    cfg: TrainConfig | Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    progress: Progress | None = None,
) -> DatasetMeta:
    """Prepare the config's data (or find them prepared) and count the steps they give.

    Raises:
        DataError: a row, file or data set is wrong; the message names it.
    """
    config = as_config(cfg)
    prepared = prepare_datasets(config, tokenizer or prepare_tokenizer(config), progress=progress)
    evals: Any = prepared.evals
    if len(evals) <= 1:
        evals = next(iter(evals.values()), None)
    plan = plan_of(config, prepared.train, Environment.detect().world_size)
    return DatasetMeta(
        prepared.train,
        evals,
        plan.total_steps,
        ledger=prepared.ledger,
        eval_conversations=prepared.eval_conversations,
        eval_tools=prepared.eval_tools,
        cache_note=prepared.cache_note,
        keys_read=keys_read(config),
    )


def plan_of(config: TrainConfig, dataset: Any, world_size: int) -> Plan:
    """The plan that a run of this config over `dataset` follows on `world_size` ranks."""
    return build_plan(
        dataset,
        capacity=config.sequence_len,
        packed=config.sample_packing,
        sequential=config.sample_packing_sequentially,
        shuffle=not config.curriculum_sampling,
        global_batch_size=batch_of(config, world_size).global_batch_size,
        num_epochs=config.num_epochs,
        max_steps=config.max_steps,
        seed=config.seed,
        strategy=config.sample_packing_strategy,
        bin_samples=config.sample_packing_bin_size,
        balance_buffer=config.balance_buffer_steps,
        cost_ratio=0.0 if config.balance_buffer_steps is None else attention_cost_ratio(config),
    )


def check_before_start(config: TrainConfig, *, overwrite: bool) -> None:
    """What can be known before any row is read: the output folder, the schedule's and the batch's arithmetic.

    Raises:
        ConfigError, CheckpointError: as `train` would, only earlier.
    """
    check_run_folder(folder_request(config, overwrite))
    require_trackers(config)
    schedule_options(config)
    environment = Environment.detect()
    batch_of(config, environment.world_size)
    check_compiler(config, environment.device)
    check_liger(config, environment.device)


def load_trainable_model(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The base model with its new tokens, its adapter or its frozen part."""
    compute_dtype = resolve_precision(config, Environment.detect()).compute_dtype
    model = load_model(config, compute_dtype=compute_dtype, seed=config.seed)
    resize_embeddings(model, tokenizer, config, seed=config.seed)
    apply_freezing(model, config)
    return apply_adapter(model, config, seed=config.seed)


def setup_trainer(
    cfg: TrainConfig | Mapping[str, Any],
    train_dataset: Any,
    eval_dataset: Any,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    processor: None = None,
    total_num_steps: int | None = None,
    model_ref: PreTrainedModel | None = None,
    peft_config: Any = None,
) -> EftTrainer:
    """Route to the causal-LM builder.

    Args:
        model_ref: reference model of preference methods; must be None.
        peft_config: accepted for callers that pass it; what counts is whether `model` is wrapped.

    Raises:
        ConfigError: the config asks for reinforcement learning (`rl`), which is not part of eft.
    """
    method = cfg.get("rl") if isinstance(cfg, Mapping) else None
    if method or model_ref is not None:
        asked = f"rl: {method}" if method else "model_ref: a reference model"
        raise ConfigError(
            f"{asked} asks for preference or reinforcement learning, which is not part of eft: it does supervised "
            "fine-tuning only. Leave it out, or use a trainer made for it."
        )
    builder = HFCausalTrainerBuilder(cfg, model, tokenizer, processor)
    builder.train_dataset, builder.eval_dataset = train_dataset, eval_dataset
    return builder.build(total_num_steps)


@dataclass(frozen=True)
class ExportSettings:
    """How the final weights are written; read when the run is set up, so that E8 sees the keys are in use."""

    dtype: torch.dtype | None
    verify: bool
    gguf_file: str | None

    @classmethod
    def of(cls, config: TrainConfig) -> ExportSettings:
        """The config's settings."""
        dtype = getattr(torch, config.save_dtype) if config.save_dtype is not None else None
        return cls(dtype, config.verify_saves == "ends", config.gguf_file)


@dataclass
class Run:
    """What the phases of one run share."""

    config: TrainConfig
    folder: RunFolder
    tokenizer: PreTrainedTokenizerBase
    meta: DatasetMeta
    model: PreTrainedModel
    trainer: EftTrainer
    console: Console | None
    outcome: RunOutcome
    export: ExportSettings
    samples: SampleAnswers | None
    """Held-out prompts answered before and after; None without `generate_samples`."""

    @property
    def path(self) -> Path:
        """The output folder."""
        return self.folder.path


def train(
    cfg: TrainConfig | Mapping[str, Any],
    dataset_meta: DatasetMeta | None = None,
    *,
    overwrite: bool = False,
    console: Console | None = None,
    origins: Mapping[str, str] | None = None,
    on_start: OnStart | None = None,
    on_finish: OnFinish | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, EftTrainer]:
    """Fine-tune as the config says and leave a folder that plain transformers loads.

    Args:
        cfg: the config, or a mapping with its keys.
        dataset_meta: prepared data; None: prepare them here.
        overwrite: delete an earlier run in `output_dir` first.
        console: where the progress line goes; None: nowhere.
        origins: where each config value comes from, for config.yaml.
        on_start: called with the derived quantities before the first step.
        on_finish: called with the output folder at the very end, also after an interruption.

    Returns:
        (model, tokenizer, trainer), after training.

    Raises:
        EftError: the config, the data or the model is wrong, or a promise does not hold.
    """
    config = as_config(cfg)
    _check_single_process()
    folder = claim_run_folder(folder_request(config, overwrite))
    try:
        set_seed(config.seed)
        run = _assemble(config, folder, dataset_meta, console)
        _write_start(run, origins or {})
        if on_start is not None:
            on_start(start_rows(config, run.trainer, run.meta), run.meta)
        checkpoint = checkpoint_to_resume(config, folder, console)
        if run.samples is not None:
            run.samples.start(model=run.model, resumed=checkpoint is not None)
        started = time.time()
        result = run.trainer.train(resume_from_checkpoint=checkpoint)
        _finish(run, result, time.time() - started)
    finally:
        folder.release()
    # The report first: a run that broke a promise needs it most.
    if on_finish is not None:
        on_finish(run.path)
    _raise_broken(run.outcome.promises)
    return run.model, run.tokenizer, run.trainer


def _check_single_process() -> None:
    world_size = Environment.detect().world_size
    if world_size > 1:
        raise ConfigError(
            f"WORLD_SIZE: {world_size} processes were started, but a run takes one process for now. Start it without "
            "torchrun or accelerate launch."
        )


def _assemble(config: TrainConfig, folder: RunFolder, meta: DatasetMeta | None, console: Console | None) -> Run:
    tokenizer = prepare_tokenizer(config)
    if meta is None:
        meta = load_datasets(config, tokenizer)
    if meta.ledger is not None:
        meta.ledger.check()
    _warn_without_end_token(config, tokenizer)
    model = load_trainable_model(config, tokenizer)
    builder = HFCausalTrainerBuilder(config, model, tokenizer)
    builder.console = console
    builder.keys_read_before, builder.keys_of_others = meta.keys_read, KEYS_OF_RUN
    builder.train_dataset, builder.eval_dataset = meta.train_dataset, meta.eval_dataset
    # The plan decides the steps; a number from elsewhere would only repeat it.
    trainer = builder.build(None)
    return Run(
        config,
        folder,
        tokenizer,
        meta,
        model,
        trainer,
        console,
        builder.outcome,
        ExportSettings.of(config),
        SampleAnswers.of(config, tokenizer, meta, folder.path) if config.generate_samples else None,
    )


def _warn_without_end_token(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """A template that ends the assistant's turn with no special token teaches a model never to stop."""
    chats = any(spec.type == "chat_template" and spec.chat_template is None for spec in config.datasets)
    if chats and tokenizer.chat_template and stop_token_of(tokenizer, tokenizer.chat_template) is None:
        logger.warning(
            "the chat template ends the assistant's turn with no special token, so the model cannot learn to stop: "
            "choose another with `chat_template`, such as `chatml`"
        )


def _write_start(run: Run, origins: Mapping[str, str]) -> None:
    """config.yaml, plan.json, ledger.json and the table of derived quantities, before the first step."""
    plan = run.trainer.make_plan()
    write_text(run.path / constants.CONFIG_FILE, _config_text(run.config, origins))
    write_json(run.path / constants.PLAN_FILE, plan.summary())
    if run.meta.ledger is not None:
        write_json(run.path / constants.LEDGER_FILE, run.meta.ledger.to_json())
        run.outcome.promises.append(
            PromiseResult("E5", "every raw token accounted for", "pass", "the ledger balances for every source")
        )


def _config_text(config: TrainConfig, origins: Mapping[str, str]) -> str:
    """The effective config as YAML, with each value's origin as a comment."""
    lines = show_config(LoadedConfig(config, dict(origins)))
    return "".join(f"{line.yaml}  # {origin}\n" if origin else f"{line.yaml}\n" for line, origin in lines)


def _finish(run: Run, result: Any, seconds: float) -> None:
    """Export and verify a finished run; write what is known of any."""
    early = result.global_step < run.trainer.args.max_steps
    interrupted = run.outcome.failed or (early and run.outcome.signal_number is not None)
    if not interrupted:
        if not math.isfinite(result.training_loss):
            logger.warning("the training loss is not a number: what is exported is of little use")
        run.outcome.promises.extend(_export(run))
    run.outcome.promises.append(_schedule_promise(run, result.global_step))
    write_json(run.path / constants.PROMISES_FILE, [asdict(promise) for promise in run.outcome.promises])
    write_json(run.path / constants.SUMMARY_FILE, _summary(run, result, seconds))
    run.folder.mark("interrupted" if interrupted else "finished", step=result.global_step, reason=run.outcome.reason)


def _raise_broken(promises: list[PromiseResult]) -> None:
    broken = [promise for promise in promises if promise.status == "fail"]
    if broken:
        raise PromiseBroken("; ".join(f"{promise.promise} {promise.title}: {promise.detail}" for promise in broken))


def _export(run: Run) -> list[PromiseResult]:
    """Write the final weights at the top of the output folder and prove that they are what was trained (E6).

    The answers after the training are theirs, too.
    """
    trainer, export = run.trainer, run.export
    with trainer.parts.evaluation_weights(trainer.optimizer):
        if run.samples is not None:
            run.samples.finish(run.model)
        manifest = export_model(run.model, run.tokenizer, run.path, save_dtype=export.dtype, gguf_file=export.gguf_file)
        results = [check_saved_tensors(run.path, run.model, getattr(torch, manifest["dtype"]))]
        if export.verify:
            results.append(verify_export(run.path, run.model, run.tokenizer, _probe_document(run)))
    return results


def _probe_document(run: Run) -> list[int]:
    """A short document of the user's own data."""
    return [int(token) for token in run.meta.train_dataset.sample(0).input_ids[:64]]


def _schedule_promise(run: Run, executed: int) -> PromiseResult:
    planned = int(run.trainer.args.max_steps)
    numbers = {"planned": float(planned), "executed": float(executed)}
    title = "steps printed = steps executed"
    if planned == executed:
        return PromiseResult("E7", title, "pass", f"{executed:,} steps", numbers)
    early = run.outcome.reason != "finished"
    detail = f"{executed:,} of {planned:,} steps: {run.outcome.reason}"
    return PromiseResult("E7", title, "not applicable" if early else "fail", detail, numbers)


def _summary(run: Run, result: Any, seconds: float) -> dict[str, Any]:
    rows = [row for row in run.trainer.state.log_history if "eval_loss" in row]
    parameters = list(run.model.parameters())
    meter, saves = run.trainer.totals, run.trainer.parts.checkpoint.times
    return {
        "steps": result.global_step,
        "training_loss": result.training_loss,
        "eval_loss_first": rows[0]["eval_loss"] if rows else None,
        "eval_loss": rows[-1]["eval_loss"] if rows else None,
        "seconds": round(seconds, 3),
        "tokens": meter["tokens"],
        "trained_tokens": meter["trained_tokens"],
        "training_seconds": round(meter["seconds"], 3),
        "tokens_per_second": round(meter["tokens"] / meter["seconds"], 1) if meter["seconds"] else 0.0,
        "saves": len(saves),
        "save_blocked_seconds": round(sum(save.blocked_s for save in saves), 3),
        "save_write_seconds": round(sum(save.write_s for save in saves), 3),
        "peak_memory_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "parameters_total": sum(parameter.numel() for parameter in parameters),
        "parameters_trainable": sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        "exit_reason": run.outcome.reason,
        "environment": versions(),
    }
