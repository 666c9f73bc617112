"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of the run.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]…", help="Keys that replace those of the file.")
]
AllowUnsupported = Annotated[
    bool, typer.Option("--allow-unsupported", help="Ignore Axolotl keys that eft does not have.")
]
