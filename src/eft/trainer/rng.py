"""RngLoaderMixin: every random generator restored exactly, without pickles."""

from __future__ import annotations

from pathlib import Path

from eft.trainer.hooks import TrainerHooks


class RngLoaderMixin(TrainerHooks):
    """Restores the generators before the first resumed micro-batch is drawn; `CheckpointSaveMixin` saves them."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Put every generator back to where it was when the checkpoint was written."""
        if checkpoint is not None:
            self.parts.load_rng(Path(checkpoint))
