"""Held-out loss, best model and early stopping."""

from __future__ import annotations

from typing import Literal

from eft.config.section import Section, key


class EvaluationConfig(Section):
    """When the held-out data are evaluated and what follows from it."""

    eval_strategy: Literal["epoch", "steps", "no"] | None = key(
        None, "When to evaluate; default: `steps` if `eval_steps` is set, else `epoch` if there are held-out data."
    )
    eval_steps: float | None = key(None, "Evaluate every N steps; below 1: a share of all steps.", gt=0.0)
    evals_per_epoch: int | None = key(None, "Evaluations per epoch; excludes `eval_steps`.", ge=1)
    eval_on_start: bool = key(False, "Evaluate before the first step.", axolotl="Always on in Axolotl.")
    eval_batch_size: int | None = key(None, "Bins or samples per forward pass; default: `micro_batch_size`.", ge=1)
    load_best_model_at_end: bool = key(False, "Export the weights of the best evaluation instead of the last.")
    metric_for_best_model: str = key("eval_loss", "Metric that decides which checkpoint is best.")
    greater_is_better: bool = key(False, "Whether a larger `metric_for_best_model` is better.")
    early_stopping_patience: int | None = key(None, "Stop after this many evaluations without a better metric.", ge=1)
    generate_samples: bool = key(False, "Answer some held-out prompts before and after the training, for the report.")
    num_generation_samples: int = key(3, "How many prompts.", ge=1, used_when="generate_samples")
    generation_max_new_tokens: int = key(128, "Longest answer, in tokens.", ge=1, used_when="generate_samples")
