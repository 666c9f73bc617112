"""Arguments and options that commands share, so that they look alike everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from eft.cli.console import print_notes
from eft.config.load import LoadedConfig, load_config

ConfigArgument = Annotated[Path, typer.Argument(metavar="CONFIG", help="The YAML file of the run.", show_default=False)]
"""First argument of every command that works on a run."""

OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Keys that replace those of the file; dots reach inside, as in `datasets.0.path=rows.jsonl`.",
        show_default=False,
    ),
]
"""Every argument after the config file."""

AllowUnsupportedOption = Annotated[
    bool, typer.Option("--allow-unsupported", help="Ignore keys that Axolotl has and eft has not.", show_default=False)
]


def load_run(config: Path, overrides: list[str] | None, allow_unsupported: bool = False) -> LoadedConfig:
    """Load the config that a command was given, and tell the user which keys have no effect.

    Raises:
        ConfigError: the config is wrong.
    """
    loaded = load_config(config, overrides or [], allow_unsupported=allow_unsupported)
    print_notes(loaded.notes())
    return loaded
