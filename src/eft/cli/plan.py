"""`eft plan`: the steps of a run, without loading a model."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from eft.cli.console import console, open_config, quiet_libraries, set_up_logging
from eft.cli.options import AllowUnsupported, ConfigPath, Overrides


def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    world_size: Annotated[int, typer.Option("--world-size", min=1, help="Processes of the planned run.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
    allow_unsupported: AllowUnsupported = False,
) -> None:
    """Show steps, fill, tokens per step, learning-rate curve, saves and evaluations of a run. Loads no model.

    Also what each process will hold, by the model's shape; with several how long they will wait for the slowest one.
    """
    loaded = open_config(config, overrides, allow_unsupported=allow_unsupported)
    set_up_logging()
    quiet_libraries()
    from dataclasses import asdict

    from eft import inputs
    from eft.data.balance import expected_balance
    from eft.data.plan import Plan
    from eft.footprint import footprint
    from eft.models.cost import attention_cost_ratio
    from eft.models.saved_tensors import TracingError
    from eft.optim.schedulers import learning_rates
    from eft.parallel.plan import Degrees, batch_of
    from eft.report.terminal import curve, quantities_table
    from eft.start_table import plan_rows
    from eft.trainer.flow import flow_rules, make_flow

    settings = loaded.config
    degrees = Degrees.resolve(world_size, settings)
    meta = inputs.load_datasets(settings, world_size=world_size)
    steps = inputs.any_plan_of(settings, meta.train_dataset, world_size)
    flow = make_flow(flow_rules(settings), steps.epoch_ends, steps.total_steps, meta.eval_dataset is not None)
    balance = held = None
    unknown = "not estimated with DeepSpeed" if degrees.zero else ""
    if isinstance(steps, Plan) and not degrees.zero:
        try:
            held = footprint(settings, steps, world_size)
        except TracingError as reason:
            unknown = f"not estimated: {reason}"
    if degrees.dp > 1 and isinstance(steps, Plan):
        per_rank = batch_of(settings, world_size).accumulation * settings.micro_batch_size
        balance = expected_balance(steps, attention_cost_ratio(settings), degrees.dp, per_rank)
    if as_json:
        extra = {
            "saves": sorted(flow.save_at),
            "evaluations": sorted(flow.evaluate_at),
            "balance": None if balance is None else asdict(balance),
            "memory": None if held is None else asdict(held),
        }
        typer.echo(json.dumps({**steps.summary(), **extra}, indent=2))
        return
    rows = plan_rows(settings, steps, flow, meta, world_size, balance)
    if held is not None or unknown:
        rows += held.rows(degrees) if held is not None else [("memory of each", unknown)]
    console.print(quantities_table("Plan", rows))
    console.print(curve("learning rate", learning_rates(settings, steps.total_steps)))
