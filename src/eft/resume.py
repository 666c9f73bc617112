"""Where a run goes on: its claim on the output folder, and the checkpoint to continue from."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from rich.console import Console

from eft.config.identity import differences, identity, identity_hash
from eft.config.root import TrainConfig
from eft.core.errors import CheckpointError, ConfigError
from eft.parallel.group import from_first_rank
from eft.parallel.plan import batch_of
from eft.runtime.checkpoint import CheckpointStore, verify_manifest
from eft.runtime.run_folder import FolderRequest, RunFolder, claim_run_folder, recorded_identity
from eft.trainer.checkpoint import PROGRESS_FILE
from eft.trainer.progress import GLOBAL_BATCH

logger = logging.getLogger(__name__)


def folder_request(config: TrainConfig, overwrite: bool, allow_change: bool = False) -> FolderRequest:
    """What a run of this config wants of its output folder."""
    # Out of a copy: looking at keys here must not count as using them (E8).
    values = config.model_dump()
    inputs = {key: values[key] for key in ("base_model", "tokenizer_config")}
    for key in ("datasets", "test_datasets"):
        inputs |= {f"{key}.{number}.path": source["path"] for number, source in enumerate(values[key] or [])}
    if isinstance(values["resume_from_checkpoint"], str):
        inputs["resume_from_checkpoint"] = values["resume_from_checkpoint"]
    cache = values["dataset_prepared_path"]
    return FolderRequest(
        Path(values["output_dir"]),
        identity(config),
        overwrite,
        differences,
        {key: Path(value).expanduser() for key, value in inputs.items() if value is not None},
        allow_change,
        None if cache is None else Path(cache).expanduser(),
        continues=values["auto_resume_from_checkpoints"],
    )


def claim_for_all(request: FolderRequest) -> RunFolder:
    """The output folder, taken by rank 0 for all processes of the run. Errors as `claim_run_folder`."""
    claimed: list[RunFolder] = []

    def claim() -> bool:
        claimed.append(claim_run_folder(request))
        return claimed[0].continues

    continues = from_first_rank(claim)
    return claimed[0] if claimed else RunFolder(request.path, continues, request.identity)


def checkpoint_to_resume(
    config: TrainConfig, folder: RunFolder, console: Console | None, allow_change: bool = False
) -> str | None:
    """The checkpoint to continue from, or None for a fresh start; with `allow_change` also of other settings, which are
    then said.

    Raises:
        CheckpointError: `resume_from_checkpoint` names one that is damaged or of a run of another config.
        ConfigError: `resume_from_checkpoint` is true, and there is none.
    """
    wanted = config.resume_from_checkpoint
    if isinstance(wanted, str):
        _check_same_run(Path(wanted), config, allow_change)
        return wanted
    automatic = config.auto_resume_from_checkpoints and folder.continues
    if wanted is not True and not automatic:
        return None
    found = CheckpointStore(folder.path, save_total_limit=None).newest_complete()
    newest = found.path
    for path, reason in found.skipped:
        logger.warning("skipping %s: %s", path, reason)
    if newest is None:
        if wanted is True:
            raise ConfigError(f"resume_from_checkpoint: true, but {folder.path} holds no complete checkpoint")
        return None
    if console is not None:
        changes = "".join(f"\n  {line}" for line in folder.changed)
        console.print(
            f"Continuing the unfinished run in {folder.path} from {newest.name}"
            + (f", with other settings from here on:{changes}" if changes else "."),
            highlight=False,
            soft_wrap=True,
        )
    return str(newest)


def pinned_batch(config: TrainConfig, checkpoint: str, world_size: int, console: Console | None) -> int | None:
    """The global batch of `checkpoint`, which the run keeps however many processes continue it (D2); said where the
    config alone would come to another. None: written before it was recorded.

    Raises:
        ConfigError: the processes cannot make it up, or the config asks for another.
    """
    pinned: int | None = json.loads(Path(checkpoint, PROGRESS_FILE).read_text()).get(GLOBAL_BATCH)
    if pinned is None:
        return None
    batch, own = batch_of(config, world_size, pinned), batch_of(config, world_size).global_batch_size
    if console is not None and own != pinned:
        console.print(
            f"The global batch stays {pinned}, as {Path(checkpoint).name} has it: accumulation {batch.accumulation} "
            f"(the config alone would make it {own} here).",
            highlight=False,
            soft_wrap=True,
        )
    return pinned


def _check_same_run(checkpoint: Path, config: TrainConfig, allow_change: bool) -> None:
    """Raise CheckpointError where `checkpoint` is damaged, or of a run of another config, unless that is allowed."""
    if verify_manifest(checkpoint).get("config") == identity_hash(config):
        return
    changed = differences(recorded_identity(checkpoint.parent), identity(config))
    if allow_change:
        logger.warning("%s is continued with other settings: %s", checkpoint, "; ".join(changed))
        return
    raise CheckpointError(
        f"resume_from_checkpoint {checkpoint}: was written by a run of another config"
        + "".join(f"\n  {line}" for line in changed)
        + "\nGo back to its settings to continue it, pass --allow-change to continue it with these, or start a new run "
        "from its weights (`base_model`)."
    )
