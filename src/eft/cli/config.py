"""`eft config`: what a config means."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from eft.cli.console import console, open_config
from eft.cli.options import AllowUnsupported, ConfigPath, Overrides
from eft.config.dump import EffectiveLine, show_config
from eft.config.reference import config_markdown, config_schema
from eft.core.atomic import write_text

app = typer.Typer(help="Show and explain the config of a run.", no_args_is_help=True, add_completion=False)

_ORIGIN_COLUMN = 56


@app.command()
def show(
    config: ConfigPath,
    overrides: Overrides = None,
    only_set: Annotated[
        bool, typer.Option("--only-set", help="Leave out keys that have their default.", show_default=False)
    ] = False,
    allow_unsupported: AllowUnsupported = False,
) -> None:
    """Print every key with its value and where it came from, as YAML."""
    loaded = open_config(config, overrides, allow_unsupported=allow_unsupported)
    for line, origin in show_config(loaded, only_set=only_set):
        console.print(_styled(line, origin), soft_wrap=True)


@app.command()
def schema() -> None:
    """Print the JSON schema of the config, for editors."""
    typer.echo(json.dumps(config_schema(), indent=2, ensure_ascii=False))


@app.command()
def docs(
    folder: Annotated[Path, typer.Option(help="Where the pages are written.")] = Path("docs"),
) -> None:
    """Write the generated reference pages: config.md, cli.md, optimizers.md, schedules.md."""
    from eft.cli.reference import cli_markdown  # imports every command, and each of them this package
    from eft.optim.reference import optimizers_markdown, schedules_markdown

    pages = {
        "config.md": config_markdown(),
        "cli.md": cli_markdown(),
        "optimizers.md": optimizers_markdown(),
        "schedules.md": schedules_markdown(),
    }
    for name, text in pages.items():
        write_text(folder / name, text)
        typer.echo(f"wrote {folder / name}")


def _styled(line: EffectiveLine, origin: str) -> Text:
    if not line.key:
        return Text(line.yaml, style="bold")
    text = Text(line.yaml, style="cyan" if line.is_changed else "")
    if origin:
        text.append(" " * max(1, _ORIGIN_COLUMN - len(line.yaml)))
        text.append(f"# {origin}", style="dim")
    return text
