"""`eft evaluate`: held-out loss of a base model, an adapter or an export."""

from __future__ import annotations

from typing import Annotated

import typer

from eft.cli.console import console, open_config, quiet_libraries, set_up_logging
from eft.cli.options import AllowUnsupported, ConfigPath, Overrides


def evaluate(
    config: ConfigPath,
    overrides: Overrides = None,
    model: Annotated[str | None, typer.Option("--model", help="Evaluate this folder instead of base_model.")] = None,
    allow_unsupported: AllowUnsupported = False,
) -> None:
    """Print the loss on CONFIG's held-out data: Σ weight·NLL ÷ Σ weight over all of them, packed or not."""
    loaded = open_config(config, overrides, allow_unsupported=allow_unsupported)
    set_up_logging()
    quiet_libraries()
    from eft.evaluate import evaluate_model
    from eft.report.terminal import quantities_table

    metrics = evaluate_model(loaded.config, model)
    rows = [(name.removeprefix("eval_"), f"{value:.6f}") for name, value in metrics.items()]
    console.print(quantities_table("Held-out data", [("model", model or loaded.config.base_model), *rows]))
