"""A whole run, top to bottom: data → model → trainer → training → export → verified export → report."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, set_seed

from eft.builder import HFCausalTrainerBuilder, as_config
from eft.config.dump import show_config
from eft.config.load import LoadedConfig
from eft.config.root import TrainConfig
from eft.config.usage import KEYS_OF_RUN
from eft.core import constants
from eft.core.atomic import write_json, write_text
from eft.core.errors import ConfigError, PromiseBroken
from eft.core.records import PromiseResult
from eft.data.chat_template import stop_token_of
from eft.data.dataset_meta import DatasetMeta
from eft.data.stream_plan import StreamPlan
from eft.finish import finish_run, rehearse_run_export
from eft.inputs import load_datasets, load_trainable_model, prepare_tokenizer
from eft.models.compile import check_compiler
from eft.models.kernels import check_liger
from eft.optim.optimizers import check_optimizer
from eft.optim.schedulers import schedule_options
from eft.parallel.deepspeed import check_deepspeed
from eft.parallel.engine import check_device
from eft.parallel.group import from_first_rank, is_first_rank, process_group, share_threads, wait_for_all
from eft.parallel.plan import Degrees, batch_of
from eft.parallel.state_dict import is_sharded
from eft.parallel.watch import stall_watch
from eft.resume import checkpoint_to_resume, claim_for_all, folder_request, pinned_batch
from eft.run_state import ExportSettings, Run
from eft.runtime.disk import clear_disk_errors
from eft.runtime.env import Environment
from eft.runtime.run_folder import FolderRequest, RunFolder, check_finished, check_run_folder
from eft.samples import SampleAnswers
from eft.start_table import Rows, start_rows
from eft.trainer.trainer import EftTrainer
from eft.trainer.training_args import require_trackers

logger = logging.getLogger(__name__)

OnFinish = Callable[[Path], None]
OnStart = Callable[[Rows, DatasetMeta], None]


def check_before_start(
    config: TrainConfig, *, overwrite: bool, allow_change: bool = False, world_size: int | None = None
) -> None:
    """What can be known before any row is read: the output folder, the schedule's and the batch's arithmetic.

    Args:
        world_size: processes of the run; default: those that the launcher has started.

    Raises:
        ConfigError, CheckpointError: as `train` would, only earlier.
    """
    environment = Environment.detect()
    check_finished(folder_request(config, overwrite))
    if environment.rank == 0:
        check_run_folder(folder_request(config, overwrite, allow_change))
    require_trackers(config)
    schedule_options(config)
    check_optimizer(config, environment.device.type)
    degrees = Degrees.resolve(world_size or environment.world_size, config)
    check_deepspeed(degrees)
    check_device(degrees, environment.device.type)
    batch_of(config, world_size or environment.world_size)
    check_compiler(config, environment.device)
    check_liger(config, environment.device)


def setup_trainer(
    cfg: TrainConfig | Mapping[str, Any],
    train_dataset: Any,
    eval_dataset: Any,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    processor: ProcessorMixin | None = None,
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


def train(
    cfg: TrainConfig | Mapping[str, Any],
    dataset_meta: DatasetMeta | None = None,
    *,
    overwrite: bool = False,
    allow_change: bool = False,
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
        allow_change: continue an unfinished run also where settings differ; its plan must be the same.
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
    here = Environment.detect()
    request = folder_request(config, overwrite, allow_change)
    if here.rank == 0:
        check_run_folder(request)
    # Before there is a process group, so that nobody waits in a collective while rows are read.
    tokenizer = prepare_tokenizer(config)
    meta = load_datasets(config, tokenizer) if dataset_meta is None else dataset_meta
    share_threads(here.world_size, here.device)
    with (
        process_group(here.world_size, here.device, config.ddp_timeout),
        stall_watch(here.rank, here.world_size, config.stall_timeout),
        clear_disk_errors(Path(config.output_dir)),
    ):
        run = _train_in_group(config, request, tokenizer, meta, console, origins or {}, on_start)
    # The report first: a run that broke a promise needs it most.
    if on_finish is not None:
        on_finish(run.path)
    _raise_broken(run.outcome.promises)
    return run.model, run.tokenizer, run.trainer


def _train_in_group(
    config: TrainConfig,
    request: FolderRequest,
    tokenizer: PreTrainedTokenizerBase,
    meta: DatasetMeta,
    console: Console | None,
    origins: Mapping[str, str],
    on_start: OnStart | None,
) -> Run:
    """What every process of a run does; rank 0 alone writes what belongs to all."""
    folder = claim_for_all(request)
    try:
        checkpoint, pinned = from_first_rank(lambda: _where_to_go_on(config, folder, console, request.allow_change))
        set_seed(config.seed)
        run = _assemble(config, folder, tokenizer, meta, console, pinned)
        _write_start(run, origins)
        if on_start is not None:
            on_start(start_rows(config, run.trainer, run.meta), run.meta)
        run.trainer.parts.checkpoint.allow_change = request.allow_change
        if checkpoint is None and run.export.verify and is_first_rank() and not is_sharded(run.model):
            rehearse_run_export(run)
        if run.samples is not None:
            run.samples.start(model=run.model, resumed=checkpoint is not None)
        started = time.time()
        result = run.trainer.train(resume_from_checkpoint=checkpoint)
        finish_run(run, result, time.time() - started)
        wait_for_all()
    finally:
        folder.release()
    return run


def _where_to_go_on(
    config: TrainConfig, folder: RunFolder, console: Console | None, allow_change: bool
) -> tuple[str | None, int | None]:
    """The checkpoint to continue from, and its global batch; before the model is loaded."""
    checkpoint = checkpoint_to_resume(config, folder, console, allow_change)
    if checkpoint is None:
        return None, None
    return checkpoint, pinned_batch(config, checkpoint, Environment.detect().world_size, console)


def _assemble(
    config: TrainConfig,
    folder: RunFolder,
    tokenizer: PreTrainedTokenizerBase,
    meta: DatasetMeta,
    console: Console | None,
    pinned: int | None,
) -> Run:
    if meta.ledger is not None:
        meta.ledger.check()
    _warn_without_end_token(config, tokenizer)
    model = load_trainable_model(config, tokenizer)
    builder = HFCausalTrainerBuilder(config, model, tokenizer, meta.processor)
    builder.console, builder.pinned_global_batch_size = console, pinned
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
        SampleAnswers.of(config, tokenizer, meta, folder.path) if config.generate_samples and is_first_rank() else None,
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
    if not is_first_rank():
        return
    write_text(run.path / constants.CONFIG_FILE, _config_text(run.config, origins))
    write_json(run.path / constants.PLAN_FILE, plan.summary())
    if run.meta.ledger is not None:
        write_json(run.path / constants.LEDGER_FILE, run.meta.ledger.to_json())
    if run.meta.ledger is not None and not isinstance(plan, StreamPlan):
        run.outcome.promises.append(
            PromiseResult("E5", "every raw token accounted for", "pass", "the ledger balances for every source")
        )


def _config_text(config: TrainConfig, origins: Mapping[str, str]) -> str:
    """The effective config as YAML, with each value's origin as a comment."""
    lines = show_config(LoadedConfig(config, dict(origins)))
    return "".join(f"{line.yaml}  # {origin}\n" if origin else f"{line.yaml}\n" for line, origin in lines)


def _raise_broken(promises: list[PromiseResult]) -> None:
    broken = [promise for promise in promises if promise.status == "fail"]
    if broken:
        raise PromiseBroken("; ".join(f"{promise.promise} {promise.title}: {promise.detail}" for promise in broken))
