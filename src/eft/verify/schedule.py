"""E7: the steps that were announced are executed, with the learning rates of the closed form."""

from __future__ import annotations

import math

from eft.core.records import PromiseResult
from eft.optim.schedulers import learning_rates
from eft.verify.rehearsal import STEPS, Rehearsal
from eft.verify.verification import Verification


def check_schedule(verification: Verification) -> PromiseResult:
    """The learning rates of the whole run: one finite number per planned step."""
    plan, meta = verification.plan, verification.meta
    rates = learning_rates(verification.config, plan.total_steps)
    faults = []
    if len(rates) != plan.total_steps:
        faults.append(f"{len(rates):,} learning rates for {plan.total_steps:,} steps")
    bad = [step for step, rate in enumerate(rates) if not (math.isfinite(rate) and rate >= 0)]
    if bad:
        faults.append(f"the learning rate of step {bad[0]} is {rates[bad[0]]}")
    if not max(rates, default=0.0) > 0:
        faults.append("the learning rate is 0 at every step")
    if meta.total_num_steps != plan.total_steps:
        faults.append(f"the data promise {meta.total_num_steps:,} steps, the plan has {plan.total_steps:,}")
    shape = f"{len(rates):,} steps, learning rate {rates[0]:.2e} → {max(rates):.2e} → {rates[-1]:.2e}"
    numbers = {"steps": float(plan.total_steps), "first": rates[0], "peak": max(rates), "last": rates[-1]}
    title = "the whole run has a learning rate for every step"
    return PromiseResult("E7", title, "fail" if faults else "pass", "; ".join([*faults, shape]), numbers)


def check_rehearsal(verification: Verification, rehearsal: Rehearsal) -> PromiseResult:
    """Three steps of the real trainer: as many as announced, each at exactly the closed form's learning rate."""
    executed = int(rehearsal.trainer.state.global_step)
    expected = learning_rates(verification.config, rehearsal.horizon)[:STEPS]
    logged = rehearsal.learning_rates
    faults = [] if rehearsal.error is None else [f"the training broke off: {rehearsal.error}"]
    if executed != STEPS:
        faults.append(f"{executed} of {STEPS} steps executed")
    if logged != expected:
        faults.append(f"learning rates {logged}, by the closed form {expected}")
    accumulation = int(rehearsal.trainer.args.gradient_accumulation_steps)
    rates = ", ".join(f"{rate:.3e}" for rate in logged)
    detail = f"{executed} steps of {accumulation} micro-batches, learning rates {rates}"
    numbers = {"planned": float(STEPS), "executed": float(executed), "accumulation": float(accumulation)}
    title = "a rehearsal executes its steps at the planned learning rates"
    return PromiseResult("E7", title, "fail" if faults else "pass", "; ".join(faults) or detail, numbers)
