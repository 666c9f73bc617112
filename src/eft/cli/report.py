"""`eft report`: the page about a run, from its output folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from eft.cli.console import console


def report(output_dir: Annotated[Path, typer.Argument(metavar="OUTPUT_DIR", help="Folder of a run.")]) -> None:
    """Write report.html into OUTPUT_DIR from the files there; also for a run that was cut off."""
    from eft.core import constants
    from eft.core.errors import ConfigError
    from eft.report.page import write_report

    if not output_dir.is_dir():
        raise ConfigError(f"{output_dir}: no such folder")
    if not any((output_dir / name).exists() for name in (constants.CONFIG_FILE, constants.METRICS_FILE)):
        raise ConfigError(
            f"{output_dir}: holds no run (neither {constants.CONFIG_FILE} nor {constants.METRICS_FILE}); give a run's "
            "`output_dir`"
        )
    console.print(f"report: {write_report(output_dir)}", highlight=False, soft_wrap=True)
