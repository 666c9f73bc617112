"""E8: every key that the user changed is read by a component that runs."""

from __future__ import annotations

from eft.config.usage import KEYS_OF_RUN, effective_keys, keys_read
from eft.core.records import PromiseResult
from eft.verify.rehearsal import Rehearsal
from eft.verify.verification import LEFT_OUT, Verification

CALLBACK_KEYS = frozenset({"loss_watchdog_patience", "profiler_steps_start"})
"""Read by callbacks that the rehearsal leaves out; `used_when` makes them errors without their switch."""


def check_keys(verification: Verification, rehearsal: Rehearsal) -> PromiseResult:
    """E8 over the config as the user wrote it, after everything was prepared, built and rehearsed."""
    read = verification.meta.keys_read | keys_read(rehearsal.config)
    exempt = KEYS_OF_RUN | CALLBACK_KEYS | frozenset(LEFT_OUT)
    return effective_keys(verification.config, read_before=read, exempt=exempt)
