"""The end of a run: export, proofs, summary; and the rehearsal of the export at its start."""

from __future__ import annotations

import json
import logging
import math
import resource
from dataclasses import asdict
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from eft.core import constants
from eft.core.atomic import TEMPORARY_MARK, write_json
from eft.core.records import PromiseResult
from eft.data.ledger import Ledger
from eft.data.stream_plan import StreamPlan
from eft.inputs import load_trainable_model
from eft.models.auto_class import is_vision_language
from eft.models.export import check_saved_tensors, export_model, verify_export
from eft.models.load import base_dtype
from eft.models.model_card import Receipt, config_yaml, is_hub_id, license_of, source_digest, write_card
from eft.models.plain import base_model_of
from eft.models.verify_start import rehearse_export
from eft.parallel.group import is_first_rank
from eft.parallel.state_dict import fill_whole, is_sharded, keep_in_file
from eft.run_state import Run
from eft.runtime.env import Environment, resolve_precision, versions

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
    ledger = _final_ledger(run, result.global_step)
    write_json(run.path / constants.PROMISES_FILE, [asdict(promise) for promise in run.outcome.promises])
    if run.trainer.parts.watchdog.left_out:
        accounts = run.meta.ledger.to_json() if run.meta.ledger is not None else {}
        write_json(run.path / constants.LEDGER_FILE, {**accounts, "steps_left_out": run.trainer.guard.ledger()})
    summary = _summary(run, result, seconds)
    write_json(run.path / constants.SUMMARY_FILE, summary)
    if not interrupted:
        write_card(run.path, _receipt(run, ledger, summary))
    run.folder.mark("interrupted" if interrupted else "finished", step=result.global_step, reason=run.outcome.reason)


def _final_ledger(run: Run, step: int) -> Ledger | None:
    """Where the rows went. That of a stream is written and checked now; prepared data have theirs from the start."""
    plan = run.trainer.plan
    if not isinstance(plan, StreamPlan) or run.meta.ledger is None:
        return run.meta.ledger
    ledger = Ledger([*plan.ledger_at(step).sources, *run.meta.ledger.of("eval")])
    ledger.check()
    write_json(run.path / constants.LEDGER_FILE, ledger.to_json())
    run.outcome.promises.append(
        PromiseResult("E5", "every raw token accounted for", "pass", "the ledger balances for every source read")
    )
    return ledger


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
    whole = load_trainable_model(run.config, run.tokenizer, whole=True) if is_first_rank() else None
    if whole is not None and not isinstance(whole, PeftModel):
        # An adapter's base stays in the files that it was read from.
        own, wanted = base_dtype(whole), run.export.dtype
        keep_in_file(whole, run.path, lambda tensor: wanted or own if tensor.dtype == own else tensor.dtype)
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


def _receipt(run: Run, ledger: Ledger | None, summary: dict[str, Any]) -> Receipt:
    """What the model card says of the run."""
    manifest = json.loads((run.path / constants.MANIFEST_NAME).read_text())
    base, config = manifest["base_model"], base_model_of(run.model).config
    gguf_file, revision = run.export.gguf_file, run.config.revision_of_model
    return {
        "title": run.path.resolve().name,
        "content": manifest["content"],
        "adapter": run.config.adapter,
        "auto_class": f"AutoModelFor{'ImageTextToText' if is_vision_language(config.to_dict()) else 'CausalLM'}",
        "base_model": {
            "name": base,
            "gguf_file": gguf_file,
            "revision": revision,
            "license": license_of(base, gguf_file, revision),
            "rows": manifest["vocabulary_rows"],
            "resized": bool(
                run.config.tokens or run.config.special_tokens or run.config.resize_token_embeddings_to_32x
            ),
            "quantization": manifest.get("quantization"),
        },
        "config": config_yaml(run.config),
        "data": _data_facts(run, ledger),
        "results": _results(run, summary),
        "promises": [asdict(promise) for promise in run.outcome.promises],
        "versions": versions(),
        "code": source_digest(),
    }


def _data_facts(run: Run, ledger: Ledger | None) -> dict[str, Any]:
    evals = run.meta.eval_dataset
    held_out = evals if isinstance(evals, dict) else {"held-out rows": evals}
    stores = {"training data": run.meta.train_dataset, **held_out}
    sources = [] if ledger is None else ledger.sources
    columns = ("name", "split", "rows", "samples", "trainable", "context")
    specs = [*run.config.datasets, *(run.config.test_datasets or [])]
    return {
        "sources": [
            {**{column: getattr(source, column) for column in columns}, "dropped": source.dropped_rows}
            for source in sources
        ],
        "hub": sorted({spec.path for spec in specs if is_hub_id(spec.path)}),
        "sha256": {name: store.fingerprint for name, store in stores.items() if store is not None},
        "gates": None if run.meta.gates is None else run.meta.gates.line(),
    }


def _results(run: Run, summary: dict[str, Any]) -> dict[str, str]:
    """Label to text."""
    losses = [row["loss"] for row in run.trainer.state.log_history if "loss" in row]
    here = Environment.detect()
    results = {
        "steps": f"{summary['steps']:,} ({summary['exit_reason']})",
        "loss": f"{losses[0]:.4g} → {losses[-1]:.4g}" if losses else f"{summary['training_loss']:.4g} on average",
    }
    if summary["eval_loss"] is not None:
        results["held-out loss"] = f"{summary['eval_loss_first']:.4g} → {summary['eval_loss']:.4g}"
    return results | {
        "tokens": f"{summary['tokens']:,}, of them {summary['trained_tokens']:,} trained",
        "parameters": f"{summary['parameters_total']:,}, of them {summary['parameters_trainable']:,} trained",
        "precision": resolve_precision(run.config, here).reason,
        "machine": f"{here.world_size} × {here.device_name}",
        "time": f"{summary['seconds']:,.0f} s, {summary['tokens_per_second']:,.0f} tokens/s",
    }
