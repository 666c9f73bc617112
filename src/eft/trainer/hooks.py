"""What the mixins share: the typed base, and which class owns which hook of `transformers.Trainer`.

A mixin is a thin adapter from its own Trainer hooks to a component that has never heard of Trainer. It reads
`self.parts.<its own>`, defines no `__init__`, and imports no other mixin. One owner per hook, so that no mixin can
shadow another (tests/architecture).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import Trainer

    from eft.trainer.parts import TrainerParts

    class TrainerHooks(Trainer):
        """What a mixin may use of the trainer it is mixed into."""

        parts: TrainerParts
        plan: Any
        optimizer: Any
        lr_scheduler: Any
        control: Any

        def plain_optimizer(self) -> Any: ...

else:

    class TrainerHooks:
        """At run time a plain object: `transformers.Trainer` comes last in the trainer's bases."""


HOOK_OWNERS: dict[str, tuple[str, ...]] = {
    "PackingMixin": ("get_train_dataloader", "get_eval_dataloader", "get_test_dataloader"),
    "SchedulerMixin": ("create_scheduler",),
    "OptimizerMixin": ("create_optimizer",),
    "RngLoaderMixin": ("_load_rng_state",),
    "CheckpointSaveMixin": (
        "_maybe_log_save_evaluate",
        "_save_checkpoint",
        "_load_from_checkpoint",
        "_load_optimizer_and_scheduler",
        "_load_scaler",
        "_load_best_model",
    ),
    "ActivationOffloadingMixin": ("compute_loss_context_manager",),
    "DistributedParallelMixin": ("_build_accelerator_args", "_prepare_for_training", "_save"),
    "EftTrainer": (
        "train",
        "compute_loss",
        "_get_num_items_in_batch",
        "evaluate",
        "_evaluate",
        "evaluation_loop",
        "log",
        "_load_callback_state",
        "floating_point_ops",
        "training_step",
        "_prepare_inputs",
        "_clip_grad_norm",
        "_get_grad_norm",
        "_run_epoch",
    ),
}
