"""E6: an export is what was trained and loads anywhere; a checkpoint brings everything back, bit for bit."""

from __future__ import annotations

from pathlib import Path

import torch

from eft.core.errors import EftError
from eft.core.records import PromiseResult
from eft.models.export import check_saved_tensors, export_model, verify_export
from eft.run_state import ExportSettings
from eft.runtime.checkpoint import CheckpointStore, verify_manifest
from eft.trainer.trainer import EftTrainer
from eft.verify.excerpt import first_documents
from eft.verify.state import fingerprints, spoil
from eft.verify.verification import Verification

PROBE_TOKENS = 64


def check_export(verification: Verification, trainer: EftTrainer) -> list[PromiseResult]:
    """Export into the temporary folder, read every tensor back, and load it in a fresh process."""
    folder = verification.folder / "export"
    with trainer.parts.evaluation_weights(trainer.plain_optimizer()):
        dtype = write_export(verification, folder)
        return judge_export(verification, folder, dtype)


def write_export(verification: Verification, folder: Path) -> torch.dtype:
    """The export of a run with this config; returns the dtype it is saved in."""
    settings = ExportSettings.of(verification.config)
    manifest = export_model(
        verification.model,
        verification.tokenizer,
        folder,
        save_dtype=settings.dtype,
        gguf_file=settings.gguf_file,
    )
    saved: torch.dtype = getattr(torch, manifest["dtype"])
    return saved


def judge_export(verification: Verification, folder: Path, dtype: torch.dtype) -> list[PromiseResult]:
    """COMPLETE and VERIFIED of an export that lies in `folder`."""
    probe = first_documents(verification.plan, 1, PROBE_TOKENS)[0]
    ids = [int(token) for token in probe.input_ids]
    return [
        check_saved_tensors(folder, verification.model, dtype),
        verify_export(folder, verification.model, verification.tokenizer, ids),
    ]


def check_checkpoint(verification: Verification, trainer: EftTrainer) -> PromiseResult:
    """Write a checkpoint, spoil everything in memory that it holds, load it, and compare every bit.

    Afterwards the model is what the checkpoint gave back, so this check comes last.
    """
    title = "a checkpoint brings weights, optimizer, schedule and generators back"
    trainer.parts.checkpoint = CheckpointStore(verification.folder / "there-and-back", save_total_limit=None)
    before = fingerprints(trainer)
    try:
        trainer._save_checkpoint(trainer.model)
        path = trainer.parts.checkpoint.path(trainer.state.global_step)
        manifest = verify_manifest(path)
        spoil(trainer)
        trainer.parts.checkpoint.load_weights(path, trainer.model)
        if manifest["resumable"]:
            trainer._load_optimizer_and_scheduler(str(path))
            trainer._load_rng_state(str(path))
    except EftError as error:
        return PromiseResult("E6", title, "fail", str(error))
    compared = before if manifest["resumable"] else {n: v for n, v in before.items() if n.startswith("weights ")}
    after = fingerprints(trainer)
    changed = sorted(name for name in compared if after.get(name) != compared[name])
    size = sum(entry["bytes"] for entry in manifest["files"].values()) / 2**20
    numbers = {"entries": float(len(compared)), "changed": float(len(changed)), "mebibytes": size}
    if changed:
        detail = f"{len(changed)} of {len(compared)} came back different: {', '.join(changed[:3])}"
        return PromiseResult("E6", title, "fail", detail, numbers)
    only = "" if manifest["resumable"] else " (weights only, by `save_only_model`)"
    detail = f"{len(compared)} tensors and states bit-equal after loading{only}, {size:,.1f} MiB"
    return PromiseResult("E6", title, "pass", detail, numbers)
