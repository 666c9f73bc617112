"""`eft quickstart`: a real model learns something visible from real rows, in minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from eft.cli.console import console, open_config, quiet_libraries, set_up_logging
from eft.cli.options import Overrides


def quickstart(
    overrides: Overrides = None,
    config: Annotated[Path, typer.Option("--config", help="YAML of the demonstration.")] = Path(
        "examples/quickstart.yaml"
    ),
) -> None:
    """Train SmolLM2-135M to answer with function calls on this machine, and measure it before and after."""
    from eft.core.errors import ConfigError

    if not config.is_file():
        raise ConfigError(f"{config}: not found. Run `eft quickstart` in a clone of the project, or pass --config.")
    loaded = open_config(config, overrides)
    set_up_logging()
    quiet_libraries()
    from eft.cli.start import show_start
    from eft.quickstart.demo import RESULT_FILE, run_demo
    from eft.report.page import write_report
    from eft.report.terminal import answers_table, quantities_table

    result = run_demo(
        loaded,
        Path(loaded.config.base_model).parent,
        console,
        show_start,
        lambda folder: console.print("Training is over."),
    )
    folder = Path(loaded.config.output_dir)
    before, after, rows = result.before, result.after, result.rows
    table = [
        ("held-out loss", f"{result.loss_before:.3f} → {result.loss_after:.3f} ({-100 * result.loss_fall:.0f} %)"),
        ("answers of the right form", f"{before.well_formed} → {after.well_formed} of {rows}"),
        ("exactly right answers", f"{before.exact} → {after.exact} of {rows}"),
        ("training", f"{result.tokens:,} tokens in {result.training_seconds:.0f} s"),
        ("time per token against a plain PyTorch loop", f"{result.eft_over_plain:.2f} ×"),
        ("everything", f"{result.total_seconds:.0f} s"),
        ("report", str(write_report(folder))),
        ("numbers", str(folder / RESULT_FILE)),
        ("talk to it", f"eft chat {config} --prompt '…'"),
    ]
    console.print(answers_table(result.answers))
    console.print(quantities_table("What it learned", table))
