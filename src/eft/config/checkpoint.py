"""What is saved, when, and where a run continues."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import field_validator

from eft.config.section import Section, key


class CheckpointConfig(Section):
    """Checkpoints (resumable) and the export (the final weights)."""

    output_dir: str = key("./model-out", "Folder of everything the run writes.", min_length=1)
    save_strategy: Literal["epoch", "steps", "no", "best"] | None = key(
        None, "When to write checkpoints; default: `steps` if `save_steps` is set, else `epoch`."
    )
    save_steps: float | None = key(None, "Write a checkpoint every N steps; below 1: a share of all steps.", gt=0.0)
    saves_per_epoch: int | None = key(None, "Checkpoints per epoch; excludes `save_steps`.", ge=1)
    save_first_step: bool = key(False, "Write a checkpoint after the first step.")
    save_total_limit: int = key(4, "Keep the newest N checkpoints and the best one; 0 keeps all.", ge=0)
    save_keep_every: int | None = key(
        None, "Never remove checkpoints whose step is a multiple of N, beside the newest and the best.", ge=1
    )
    save_asynchronously: bool = key(
        True, "Copy the state within memory, and write the checkpoint beside the next steps; off: write, then go on."
    )
    save_only_model: bool = key(False, "Leave optimizer and RNG out of checkpoints; they cannot be resumed.")
    save_dtype: Literal["float32", "bfloat16", "float16"] | None = key(
        None, "Dtype of the export; default: the base checkpoint's."
    )
    verify_saves: Literal["always", "ends", "never"] = key(
        "ends",
        "A fresh process loads saves with plain transformers and compares logits (E6): `ends` an export of the "
        "untrained model beside the first steps, and the finished one; `always` every checkpoint too.",
    )
    resume_from_checkpoint: str | bool | None = key(
        None, "Checkpoint to continue from; true: the newest complete one in `output_dir`."
    )
    auto_resume_from_checkpoints: bool = key(
        True,
        "Continue an unfinished run of the same config in `output_dir` by itself.",
        axolotl="Off in Axolotl.",
    )
    stop_file: str | None = key(
        None,
        "When this file appears, the run finishes its step, writes a checkpoint, removes the file and stops; default: "
        "`STOP` in `output_dir`.",
        min_length=1,
    )

    @field_validator("output_dir", "resume_from_checkpoint", "stop_file", mode="after")
    @classmethod
    def _home_is_expanded(cls, value: str | bool | None) -> str | bool | None:
        """Here and not where folders are opened: Trainer expands `~` by itself, and a run must not have two folders."""
        if isinstance(value, str) and value.startswith("~"):
            return str(Path(value).expanduser())
        return value
