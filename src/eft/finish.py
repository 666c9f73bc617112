"""The end of a run: export, proofs, summary; and the rehearsal of the export at its start."""

from __future__ import annotations

import logging
import math
import resource
from dataclasses import asdict
from typing import Any

import torch
from transformers import PreTrainedModel

from eft.core import constants
from eft.core.atomic import TEMPORARY_MARK, write_json
from eft.core.records import PromiseResult
from eft.data.ledger import Ledger
from eft.data.stream_plan import StreamPlan
from eft.inputs import load_trainable_model
from eft.models.export import check_saved_tensors, export_model, verify_export
from eft.models.verify_start import rehearse_export
from eft.parallel.group import is_first_rank
from eft.parallel.state_dict import fill_whole, is_sharded
from eft.run_state import Run
from eft.runtime.env import versions

logger = logging.getLogger(__name__)


def finish_run(run: Run, result: Any, seconds: float) -> None:
    """Export and verify a finished run; write what is known of any."""
    interrupted = run.outcome.is_interrupted
    if not interrupted:
        if not math.isfinite(result.training_loss):
            logger.warning("the training loss is not a number: what is exported is of little use")
        run.outcome.promises.extend(_export(run))
    run.outcome.promises.append(_schedule_promise(run, result.global_step))
    if not is_first_rank():
        return
    _write_stream_ledger(run, result.global_step)
    write_json(run.path / constants.PROMISES_FILE, [asdict(promise) for promise in run.outcome.promises])
    if run.trainer.parts.watchdog.left_out:
        ledger = run.meta.ledger.to_json() if run.meta.ledger is not None else {}
        write_json(run.path / constants.LEDGER_FILE, {**ledger, "steps_left_out": run.trainer.guard.ledger()})
    write_json(run.path / constants.SUMMARY_FILE, _summary(run, result, seconds))
    run.folder.mark("interrupted" if interrupted else "finished", step=result.global_step, reason=run.outcome.reason)


def _write_stream_ledger(run: Run, step: int) -> None:
    """Where the rows of a stream went; prepared data have their ledger from the start."""
    plan = run.trainer.plan
    if not isinstance(plan, StreamPlan) or run.meta.ledger is None:
        return
    ledger = Ledger([*plan.ledger_at(step).sources, *run.meta.ledger.of("eval")])
    ledger.check()
    write_json(run.path / constants.LEDGER_FILE, ledger.to_json())
    run.outcome.promises.append(
        PromiseResult("E5", "every raw token accounted for", "pass", "the ledger balances for every source read")
    )


def _export(run: Run) -> list[PromiseResult]:
    """Write the final weights at the top of the output folder and prove that they are what was trained (E6).

    The answers after the training are theirs, too.
    """
    trainer, export = run.trainer, run.export
    with trainer.parts.evaluation_weights(trainer.optimizer):
        model = _whole_model(run)
        if model is None:
            return []
        if run.samples is not None:
            run.samples.finish(model)
        manifest = export_model(
            model,
            run.tokenizer,
            run.path,
            save_dtype=export.dtype,
            gguf_file=export.gguf_file,
            processor=run.meta.processor,
        )
        results = [check_saved_tensors(run.path, model, getattr(torch, manifest["dtype"]))]
        if export.verify:
            results.append(verify_export(run.path, model, run.tokenizer, _probe_document(run)))
    return results


def rehearse_run_export(run: Run) -> None:
    """Try the save of the end before the first step; the fresh process loads it beside the training."""
    finish = rehearse_export(
        run.model,
        run.tokenizer,
        run.path / f"{TEMPORARY_MARK}rehearsal",
        _probe_document(run),
        save_dtype=run.export.dtype,
        gguf_file=run.export.gguf_file,
        record=run.outcome.promises.append,
    )
    if finish is not None:
        run.trainer.parts.checkpoint.beside(finish)


def _whole_model(run: Run) -> PreTrainedModel | None:
    """The trained model as one process has it, on rank 0; None on the others, which only give their shards."""
    if not is_sharded(run.model):
        return run.model if is_first_rank() else None
    whole = load_trainable_model(run.config, run.tokenizer) if is_first_rank() else None
    fill_whole(run.model, whole)
    return whole


def _probe_document(run: Run) -> list[int]:
    """A short document of the user's own data; of rows with images its text alone."""
    left_out = set() if run.meta.processor is None else set(run.tokenizer.all_special_ids)
    ids = run.meta.train_dataset.sample(0).input_ids.tolist()
    return [int(token) for token in ids if token not in left_out][:64]


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
        "save_verify_seconds": round(sum(save.verify_s for save in saves), 3),
        "peak_memory_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "parameters_total": sum(parameter.numel() for parameter in parameters),
        "parameters_trainable": sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        "exit_reason": run.outcome.reason,
        "environment": versions(),
    }
