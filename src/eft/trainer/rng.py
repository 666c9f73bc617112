"""RngLoaderMixin: every random generator restored exactly, without pickles."""

from __future__ import annotations

from pathlib import Path

from eft.trainer.hooks import TrainerHooks


class RngLoaderMixin(TrainerHooks):
    """Saves and restores the generators; called before the first resumed micro-batch is drawn."""

    def _save_rng_state(self, output_dir: str) -> None:
        """Write the state of every generator of this process into the checkpoint."""
        self.parts.save_rng(Path(output_dir))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Put every generator back to where it was when the checkpoint was written."""
        if checkpoint is not None:
            self.parts.load_rng(Path(checkpoint))
