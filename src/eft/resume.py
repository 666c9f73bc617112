"""Where a run goes on: its claim on the output folder, and the checkpoint to continue from."""

from __future__ import annotations

import logging
from pathlib import Path

from rich.console import Console

from eft.config.identity import differences, identity, identity_hash
from eft.config.root import TrainConfig
from eft.core.errors import CheckpointError, ConfigError
from eft.runtime.checkpoint import CheckpointStore, verify_manifest
from eft.runtime.run_folder import FolderRequest, RunFolder, recorded_identity

logger = logging.getLogger(__name__)


def folder_request(config: TrainConfig, overwrite: bool) -> FolderRequest:
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
        None if cache is None else Path(cache).expanduser(),
    )


def checkpoint_to_resume(config: TrainConfig, folder: RunFolder, console: Console | None) -> str | None:
    """The checkpoint to continue from, or None for a fresh start.

    Raises:
        CheckpointError: `resume_from_checkpoint` names one that is damaged or of a run of another config.
        ConfigError: `resume_from_checkpoint` is true, and there is none.
    """
    wanted = config.resume_from_checkpoint
    if isinstance(wanted, str):
        _check_same_run(Path(wanted), config)
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
        console.print(
            f"Continuing the unfinished run in {folder.path} from {newest.name}.", highlight=False, soft_wrap=True
        )
    return str(newest)


def _check_same_run(checkpoint: Path, config: TrainConfig) -> None:
    """Raise CheckpointError where `checkpoint` is damaged or of a run of another config."""
    if verify_manifest(checkpoint).get("config") == identity_hash(config):
        return
    changed = differences(recorded_identity(checkpoint.parent), identity(config))
    raise CheckpointError(
        f"resume_from_checkpoint {checkpoint}: was written by a run of another config"
        + "".join(f"\n  {line}" for line in changed)
        + "\nGo back to its settings to continue it, or start a new run from its weights (`base_model`)."
    )
