"""The user's run in small: four optimizer steps of the real trainer on cut documents, in a temporary folder."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

from transformers import TrainerCallback

from eft.callbacks.start_checks import AUDIT_STEP
from eft.callbacks.stopping import StopOnRequest
from eft.config.root import TrainConfig
from eft.core.errors import ConfigError, PromiseBroken
from eft.core.records import PromiseResult, TokenDataset, TokenSample
from eft.optim.schedulers import learning_rates
from eft.trainer.trainer import EftTrainer
from eft.verify.excerpt import as_dataset, cut, documents_for
from eft.verify.resume import Trace, compare_traces, record_fed
from eft.verify.state import spoil
from eft.verify.verification import Verification

logger = logging.getLogger(__name__)

STEPS = AUDIT_STEP + 1
"""Every trained tensor must have moved by then, and half of the steps is a number."""
STOP = STEPS // 2
"""After this step the state is saved, from which a second trainer continues."""
TOKENS = 1536
"""Tokens of all steps together; bins are cut to a share of it, but not below `SHORTEST_BIN`."""
SHORTEST_BIN = 16
LONGEST_BIN = 128


class SaveAndStop(TrainerCallback):
    """Saves half-way, and ends a training whose horizon is longer than the rehearsal."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Save at STOP, stop at the last rehearsed step."""
        control.should_save |= state.global_step == STOP
        control.should_training_stop |= state.global_step >= STEPS
        return control


@dataclass
class Rehearsal:
    """What came of the four steps."""

    trainer: EftTrainer
    config: TrainConfig
    """The user's, cut to four steps."""
    horizon: int
    """Steps that the learning rates were laid out for; STEPS, or the whole run's where the schedule needs more."""
    trace: Trace | None = None
    """For a run that is continued from STOP to equal; None where the training broke off."""
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
    """Train STEPS steps; changes the model's weights. One checkpoint is written, after STOP steps.

    Raises:
        ConfigError, ModelError: the trainer cannot be built from this config.
    """
    short, dataset = short_run(verification)
    trainer = rehearsal_trainer(verification, short, dataset)
    rehearsal, fed = Rehearsal(trainer, short, int(short.max_steps or 0)), record_fed(trainer)
    try:
        trainer.train()
        rehearsal.trace = Trace.of(trainer, fed)
    except PromiseBroken as error:
        rehearsal.error = str(error)
    # Whatever keeps the run from training is a finding about the run, and must not hide the other checks'.
    except Exception as error:
        logger.debug("the rehearsal broke off", exc_info=True)
        rehearsal.error = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    return rehearsal


def short_documents(verification: Verification, global_batch_size: int) -> tuple[list[TokenSample], int]:
    """Documents for STEPS steps of so many bins, and the capacity that the bins are cut to."""
    config = verification.config
    per_bin = TOKENS // (STEPS * global_batch_size)
    capacity = min(config.sequence_len, LONGEST_BIN, max(SHORTEST_BIN, per_bin))
    bins = STEPS * global_batch_size
    return documents_for(verification.plan, bins=bins, capacity=capacity, packed=config.sample_packing), capacity


def short_run(verification: Verification) -> tuple[TrainConfig, TokenDataset]:
    """The user's config, cut to STEPS steps (`max_steps` is more where the schedule needs it), and rows for them."""
    config, plan = verification.config, verification.plan
    documents, capacity = short_documents(verification, plan.global_batch_size)
    horizon = STEPS if _fits(config, STEPS) else plan.total_steps
    # Whatever the run's own checkpoints leave out, this one is to be continued.
    saving = {"save_only_model": False, "save_asynchronously": True, "verify_saves": "never"}
    short = verification.config_with({"sequence_len": capacity, "max_steps": horizon, **saving})
    return short, as_dataset(documents)


def check_resume(verification: Verification, rehearsal: Rehearsal) -> PromiseResult:
    """E3: continue from the rehearsal's checkpoint with a model that is loaded anew; compare with the rehearsal, which
    went on. The verification's model is the new one afterwards.
    """
    assert rehearsal.trace is not None, "the rehearsal came to its end"
    before = rehearsal.trainer
    before.plain_optimizer().state.clear()
    if verification.load_model is not None:
        # One model in memory at a time.
        before.model.to("meta")
        verification.model = verification.load_model()
    trainer = rehearsal_trainer(verification, rehearsal.config, before.train_dataset)
    if verification.load_model is None:
        spoil(before)
    fed = record_fed(trainer)
    trainer.train(resume_from_checkpoint=str(trainer.parts.checkpoint.path(STOP)))
    # Sums over more than two processes have an order, which DDP finds out in its first step.
    repeats = trainer.accelerator.device.type == "cpu" and verification.world_size <= 2
    to_the_bit = repeats or rehearsal.config.deterministic
    return compare_traces(rehearsal.trace, Trace.of(trainer, fed), stopped_after=STOP, to_the_bit=to_the_bit)


def rehearsal_trainer(verification: Verification, config: TrainConfig, dataset: TokenDataset) -> EftTrainer:
    """Saves at STOP and at no other step."""
    trainer = verification.build_trainer(config, dataset, _short_evals(verification, config.sequence_len))
    trainer.parts.flow = replace(
        trainer.parts.flow,
        save_every=None,
        saves_per_epoch=None,
        save_first_step=False,
        save_at_end=False,
        save_best=False,
    )
    # Ctrl-C ends the verification, not only the rehearsal.
    trainer.remove_callback(StopOnRequest)
    trainer.add_callback(SaveAndStop())
    return trainer


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
