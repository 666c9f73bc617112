"""The user's run in small: three optimizer steps of the real trainer on cut documents, in a temporary folder."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

from transformers import TrainerCallback

from eft.callbacks import AUDIT_STEP, StopOnSignal
from eft.config.root import TrainConfig
from eft.core.errors import ConfigError, PromiseBroken
from eft.core.records import PromiseResult, TokenDataset
from eft.optim.schedulers import learning_rates
from eft.trainer.trainer import EftTrainer
from eft.verify.excerpt import as_dataset, cut, documents_for
from eft.verify.verification import Verification

logger = logging.getLogger(__name__)

STEPS = AUDIT_STEP
"""Every trained tensor must have moved by then."""
TOKENS = 1536
"""Tokens of all steps together; bins are cut to a share of it, but not below `SHORTEST_BIN`."""
SHORTEST_BIN = 16
LONGEST_BIN = 128


class StopAfter(TrainerCallback):
    """Ends a training whose horizon is longer than the rehearsal."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Stop at the last rehearsed step."""
        control.should_training_stop |= state.global_step >= STEPS
        return control


@dataclass
class Rehearsal:
    """What came of the three steps."""

    trainer: EftTrainer
    config: TrainConfig
    """The user's, cut to three steps."""
    horizon: int
    """Steps that the learning rates were laid out for; STEPS, or the whole run's where the schedule needs more."""
    error: str | None = None
    """Why the training broke off, in one line."""

    @property
    def promises(self) -> list[PromiseResult]:
        """What the trainer's own start checks found."""
        found: list[PromiseResult] = self.trainer.outcome.promises
        return found

    @property
    def learning_rates(self) -> list[float]:
        """As logged, one per step."""
        return [row["learning_rate"] for row in self.trainer.state.log_history if "loss" in row]


def rehearse(verification: Verification) -> Rehearsal:
    """Train STEPS steps; changes the model's weights. No checkpoint is written: `verify.saves` does that.

    Raises:
        ConfigError, ModelError: the trainer cannot be built from this config.
    """
    config, plan = verification.config, verification.plan
    per_bin = TOKENS // (STEPS * plan.global_batch_size)
    capacity = min(config.sequence_len, LONGEST_BIN, max(SHORTEST_BIN, per_bin))
    bins = STEPS * plan.global_batch_size
    documents = documents_for(plan, bins=bins, capacity=capacity, packed=config.sample_packing)
    horizon = STEPS if _fits(config, STEPS) else plan.total_steps
    short = verification.config_with({"sequence_len": capacity, "max_steps": horizon})
    trainer = verification.build_trainer(short, as_dataset(documents), _short_evals(verification, capacity))
    trainer.parts.flow = replace(
        trainer.parts.flow,
        save_every=None,
        saves_per_epoch=None,
        save_first_step=False,
        save_at_end=False,
        save_best=False,
    )
    # Ctrl-C ends the verification, not only the rehearsal.
    trainer.remove_callback(StopOnSignal)
    trainer.add_callback(StopAfter())
    rehearsal = Rehearsal(trainer, short, horizon)
    try:
        trainer.train()
    except PromiseBroken as error:
        rehearsal.error = str(error)
    # Whatever keeps the run from training is a finding about the run, and must not hide the other checks'.
    except Exception as error:
        logger.debug("the rehearsal broke off", exc_info=True)
        rehearsal.error = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    return rehearsal


def _fits(config: TrainConfig, steps: int) -> bool:
    """Whether the schedule can be laid out over so few steps."""
    try:
        learning_rates(config, steps)
    except ConfigError:
        return False
    return True


def _short_evals(verification: Verification, longest: int) -> Any:
    evals = verification.meta.eval_dataset
    if evals is None:
        return None
    if isinstance(evals, dict):
        return {name: _first_rows(data, longest) for name, data in evals.items()}
    return _first_rows(evals, longest)


def _first_rows(dataset: TokenDataset, longest: int) -> TokenDataset:
    return as_dataset([cut(dataset.sample(index), longest) for index in range(min(2, len(dataset)))])
