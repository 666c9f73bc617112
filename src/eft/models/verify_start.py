"""The save at the end, tried before the first step: one that cannot work fails in the first minute, not after days."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eft.core.errors import PromiseBroken
from eft.core.records import PromiseResult
from eft.models.export import check_saved_tensors, export_model
from eft.models.verify_export import take_probe

TITLE = "a save before the first step: every tensor read back, loaded by a fresh process"


def rehearse_export(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    ids: list[int],
    *,
    save_dtype: torch.dtype | None,
    gguf_file: str | None,
    record: Callable[[PromiseResult], None],
) -> Callable[[], None] | None:
    """Export the untrained model into the new `folder` and compare it with the live one (COMPLETE).

    Returns:
        What is left to do, beside the training: ask a fresh process (VERIFIED), remove the folder, `record` the result.
        None where there is nothing to ask: the base of the adapter exists in memory only.

    Raises:
        PromiseBroken: the files do not hold the model; what is returned raises it, too.
    """
    started = time.monotonic()
    shutil.rmtree(folder, ignore_errors=True)
    try:
        manifest = export_model(model, tokenizer, folder, save_dtype=save_dtype, gguf_file=gguf_file)
        dtype: torch.dtype = getattr(torch, manifest["dtype"])
        _conclude(check_saved_tensors(folder, model, dtype), record if _is_in_memory(model) else _nothing)
        if _is_in_memory(model):
            shutil.rmtree(folder)
            return None
        probe = take_probe(model, tokenizer, ids, dtype)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    blocked = time.monotonic() - started

    def finish() -> None:
        try:
            result = probe.check(folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        _conclude(replace(result, numbers={**result.numbers, "blocked_seconds": round(blocked, 3)}), record)

    return finish


def _is_in_memory(model: PreTrainedModel | PeftModel) -> bool:
    return isinstance(model, PeftModel) and not model.get_base_model().config.name_or_path


def _nothing(result: PromiseResult) -> None:
    """For the first of two results, which the second one repeats."""


def _conclude(result: PromiseResult, record: Callable[[PromiseResult], None]) -> None:
    if result.status == "fail":
        raise PromiseBroken(f"{result.promise} {TITLE}: {result.detail}")
    record(replace(result, title=TITLE))
