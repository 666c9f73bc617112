"""All checks in order: those that only look, those that measure in fp64, the rehearsal, the saves."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator

from eft.core.records import PromiseResult
from eft.verify.data import check_data
from eft.verify.exact import exact_arithmetic
from eft.verify.keys import check_keys
from eft.verify.loss import check_loss
from eft.verify.merged import check_merge
from eft.verify.options import option_checks
from eft.verify.packing import check_packing
from eft.verify.precision import check_half_precision
from eft.verify.ranks import check_ranks
from eft.verify.ranks_resume import check_resume_over_ranks
from eft.verify.rehearsal import STEPS, STOP, Rehearsal, check_resume, rehearse
from eft.verify.saves import check_checkpoint, check_export
from eft.verify.schedule import check_rehearsal, check_schedule
from eft.verify.trained import check_movement, check_trainable
from eft.verify.verification import Verification

logger = logging.getLogger(__name__)

Announce = Callable[[str], None]
"""Called with what is checked next."""


def check_promises(
    verification: Verification, announce: Announce = lambda what: None, *, num_processes: int = 1
) -> Iterator[PromiseResult]:
    """One result per check, as they are done. The model's weights have moved afterwards.

    `num_processes` above 1: a global batch is trained on so many processes, too, and a run of theirs is continued.

    A check that breaks off is a failed promise, with the error as its detail; the others still run.

    Raises:
        ConfigError, ModelError: no trainer can be built from this config, so there is nothing to verify.
    """
    announce("E5: ledger, plan and stored samples")
    yield from _guarded("E5", "data", lambda: check_data(verification))
    announce("E1, E2: packing and loss in fp64, against plain transformers")
    with exact_arithmetic(verification.model):
        trainer = verification.build_exact_trainer()
        yield from _guarded("E1", "packing", lambda: [check_packing(verification, trainer)])
        verification.model.zero_grad()
        yield from _guarded("E2", "loss", lambda: [check_loss(verification, trainer)])
        if num_processes > 1:
            announce(f"E2: one global batch on {num_processes} processes")
            verification.model.zero_grad()
            yield from _guarded("E2", "processes", lambda: [check_ranks(verification, num_processes)])
        for what, check in option_checks(verification):
            announce(f"E4: {what}")
            verification.model.zero_grad()
            yield from _guarded("E4", what, check)
    announce("E2: the run's own precision, against fp64 and plain transformers")
    yield from _guarded("E2", "precision", lambda: check_half_precision(verification))
    announce(f"E7, E8: a rehearsal of {STEPS} steps")
    yield from _guarded("E7", "schedule", lambda: [check_schedule(verification)])
    yield from _guarded("trained tensors", "gradients", lambda: [check_trainable(verification)])
    rehearsal = rehearse(verification)
    yield from _rehearsed(verification, rehearsal)
    announce("E6: an export in a fresh process, a checkpoint there and back")
    yield from _guarded("E6", "export", lambda: check_export(verification, rehearsal.trainer))
    yield from _guarded("E6", "merge", lambda: check_merge(verification))
    if rehearsal.error is None:
        yield from _guarded("E6", "checkpoint", lambda: [check_checkpoint(verification, rehearsal.trainer)])
        announce(f"E3: the rehearsal again, from its checkpoint after step {STOP}")
        yield from _guarded("E3", "resume", lambda: [check_resume(verification, rehearsal)])
    if rehearsal.error is None and num_processes > 1:
        announce(f"E3: the same in {num_processes} processes, continued by as many and by one")
        yield from _guarded("E3", "processes", lambda: check_resume_over_ranks(verification, num_processes))
    yield check_keys(verification, rehearsal)


def _rehearsed(verification: Verification, rehearsal: Rehearsal) -> Iterator[PromiseResult]:
    """What the rehearsal showed, the trainer's own probes of boundaries and kernels in the run's precision included."""
    yield from (promise for promise in rehearsal.promises if promise.promise in ("E1", "E4", "dtypes"))
    yield from _guarded("E7", "rehearsal", lambda: [check_rehearsal(verification, rehearsal)])
    yield check_movement(rehearsal)


def _guarded(promise: str, what: str, check: Callable[[], Iterable[PromiseResult]]) -> list[PromiseResult]:
    try:
        return list(check())
    except Exception as error:
        logger.debug("%s %s broke off", promise, what, exc_info=True)
        first = str(error).strip().splitlines()[:1]
        detail = f"broke off: {type(error).__name__}{': ' + first[0] if first else ''}"
        return [PromiseResult(promise, f"{what} could not be checked", "fail", detail)]
