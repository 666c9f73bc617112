"""DistributedParallelMixin: what the parallel plan adds to the Accelerator, and full weights for every `save_model`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader

from eft.trainer.hooks import TrainerHooks


class DistributedParallelMixin(TrainerHooks):
    """The engine is accelerate's: what it is told comes from the parallel plan."""

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        """Upstream's arguments, overridden by the parallel plan's."""
        # Called from `Trainer.__init__`, after `EftTrainer.__init__` has set `parts`.
        arguments: dict[str, Any] = super()._build_accelerator_args(**kwargs)
        return {**arguments, **self.parts.parallel.arguments}

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: DataLoader[Any], resume_from_checkpoint: str | None
    ) -> tuple[nn.Module, DataLoader[Any]]:
        """Upstream's; under DeepSpeed it would look for DeepSpeed's own checkpoint, and ours is like any other."""
        if self.accelerator.is_fsdp2:
            # accelerate wraps the forward pass in autocast, but not for FSDP2: there it would have FSDP2's own policy
            # round the weights before they are gathered, norms and router too, which one process does not.
            self.accelerator.prepare_model(self.model, device_placement=False, evaluation_mode=True)
        ours = resume_from_checkpoint if self.is_deepspeed_enabled else None
        theirs = None if self.is_deepspeed_enabled else resume_from_checkpoint
        prepared: tuple[nn.Module, DataLoader[Any]]
        prepared = super()._prepare_for_training(max_steps, train_dataloader, theirs)
        if ours is not None:
            self._load_from_checkpoint(ours)
            self._load_optimizer_and_scheduler(ours)
        return prepared

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """`save_model`: gather the weights where no single rank holds them all; no pickled arguments beside them."""
        if state_dict is None and self.parts.state_dict is not None:
            state_dict = self.parts.state_dict(self.model)
        if self.args.should_save:
            folder = output_dir or self.args.output_dir
            with self.parts.evaluation_weights(self.optimizer):
                self.accelerator.unwrap_model(self.model).save_pretrained(folder, state_dict=state_dict)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)
