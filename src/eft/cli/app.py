"""The `eft` command. Commands are listed by name and imported when they run, so that `eft --help` is instant."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import Annotated, Any

import typer
import typer.main
from typer.core import TyperCommand, TyperGroup

from eft.cli.console import console, error_console, print_error, set_up_logging
from eft.core.constants import EXIT_FAILED, EXIT_OK, EXIT_USAGE
from eft.core.errors import DataGateError, EftError, PromiseBroken, RunFinished

COMMANDS: dict[str, tuple[str, str, str]] = {
    "train": ("eft.cli.train", "train", "Fine-tune a model as a YAML says."),
    "plan": ("eft.cli.plan", "plan", "Show the steps of a run without loading a model."),
    "preprocess": ("eft.cli.preprocess", "preprocess", "Prepare the data and look at what is trained."),
    "data": ("eft.cli.data", "app", "A page about the data of a run."),
    "verify": ("eft.cli.verify", "verify", "Prove the promises on your own model, data and config."),
    "evaluate": ("eft.cli.evaluate", "evaluate", "Loss of a model on the held-out data."),
    "merge": ("eft.cli.merge", "merge", "Put an adapter and its base together into one model."),
    "chat": ("eft.cli.chat", "chat", "Talk to a base model, an adapter or an export."),
    "report": ("eft.cli.report", "report", "Write the page about a run."),
    "quickstart": ("eft.cli.quickstart", "quickstart", "Train a real 135M model on real rows, in minutes."),
    "config": ("eft.cli.config", "app", "Show and explain the config of a run."),
}
"""Command name to (module, attribute, one line of help). The attribute is a function or a `typer.Typer`."""


class LazyGroup(TyperGroup):
    """A group whose commands are imported when they are used; listing them imports nothing."""

    is_listing = False

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands = {name: TyperCommand(name=name, help=line) for name, (_, _, line) in COMMANDS.items()}

    def list_commands(self, ctx: Any) -> list[str]:
        """Names in the order of the table."""
        return list(self.commands)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command, or None when there is none of that name; while listing, a stand-in that knows its help."""
        stand_in = self.commands.get(cmd_name)
        return stand_in if stand_in is None or self.is_listing else load_command(cmd_name)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """The help page, from the table alone."""
        self.is_listing = True
        try:
            super().format_help(ctx, formatter)
        finally:
            self.is_listing = False


def load_command(name: str) -> Any:
    """Import one command of the table: a command for a function, a group for a `typer.Typer`."""
    module, attribute, _ = COMMANDS[name]
    target = getattr(importlib.import_module(module), attribute)
    if not isinstance(target, typer.Typer):
        function, target = target, typer.Typer(add_completion=False)
        target.command(name)(function)
    command = typer.main.get_command(target)
    command.name = name
    return command


app = typer.Typer(cls=LazyGroup, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"eft {metadata.version('eft-trainer')}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log more.", show_default=False)] = False,
) -> None:
    """Exact Fine-Tuning: supervised fine-tuning of causal language models from one YAML file, with proof."""
    set_up_logging(verbose=verbose)


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; always raises SystemExit with the exit code.

    0 done · 1 failed (a broken promise, a traceback) · 2 the config, the data or the command line is wrong ·
    130 Ctrl-C. Commands raise `typer.Exit(code)` for anything else.
    """
    try:
        typer.main.get_command(app)(args=args, prog_name="eft")
    except RunFinished as finished:
        console.print(str(finished), soft_wrap=True)
        sys.exit(EXIT_OK)
    except PromiseBroken as error:
        print_error(error)
        sys.exit(EXIT_FAILED)
    except DataGateError as error:
        from eft.cli.rows import print_rows

        print_rows(error_console, error.rows)
        print_error(error)
        sys.exit(EXIT_USAGE)
    except EftError as error:
        print_error(error)
        sys.exit(EXIT_USAGE)
