"""`eft chat`: talk to a base model, an adapter or an export."""

from __future__ import annotations

from typing import Annotated

import typer

from eft.cli.console import console, open_config, quiet_libraries, set_up_logging
from eft.cli.options import AllowUnsupported, ConfigPath, Overrides


def chat(
    config: ConfigPath,
    overrides: Overrides = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Folder of an export, adapter or base model; default: output_dir.")
    ] = None,
    system: Annotated[str | None, typer.Option("--system", help="System prompt.")] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", help="Answer this one prompt and stop.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer, in tokens.")] = 256,
    allow_unsupported: AllowUnsupported = False,
) -> None:
    """Talk to the model that CONFIG trained (or to --model), with the template it was trained on; greedy answers."""
    loaded = open_config(config, overrides, allow_unsupported=allow_unsupported)
    set_up_logging()
    quiet_libraries()
    from eft.core.records import Message
    from eft.evaluate import load_trained
    from eft.inputs import prepare_tokenizer
    from eft.models.generate import sample_texts

    path = model or loaded.config.output_dir
    tokenizer = prepare_tokenizer(loaded.config)
    loaded_model = load_trained(loaded.config, tokenizer, path)
    turns: list[Message] = [{"role": "system", "content": system}] if system else []
    if prompt is None:
        console.print(f"{path} · an empty line ends the conversation", highlight=False)
    while True:
        text = prompt if prompt is not None else _ask()
        if not text.strip():
            return
        turns.append({"role": "user", "content": text})
        answer = sample_texts(loaded_model, tokenizer, [turns], max_new_tokens=max_new_tokens, batch_size=1)[0]
        turns.append({"role": "assistant", "content": answer})
        console.print(answer if prompt is not None else f"model › {answer}", markup=False, highlight=False)
        if prompt is not None:
            return


def _ask() -> str:
    """What the user types; an empty line at the end of the input (Ctrl-D, a pipe that ran dry)."""
    try:
        return console.input("[bold]you[/bold] › ")
    except EOFError:
        console.print()
        return ""
