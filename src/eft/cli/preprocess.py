"""`eft preprocess`: prepare the data and look at what is trained."""

from __future__ import annotations

from typing import Annotated

import typer

from eft.cli.console import console, open_config, quiet_libraries, set_up_logging
from eft.cli.options import AllowUnsupported, ConfigPath, Overrides


def preprocess(
    config: ConfigPath,
    overrides: Overrides = None,
    show: Annotated[int, typer.Option("--show", min=0, help="Print this many samples, trained tokens coloured.")] = 3,
    allow_unsupported: AllowUnsupported = False,
) -> None:
    """Prepare the token store of CONFIG (or find it prepared), print the token ledger and some samples."""
    loaded = open_config(config, overrides, allow_unsupported=allow_unsupported)
    set_up_logging()
    quiet_libraries()
    from eft import run
    from eft.cli.progress import data_progress
    from eft.report.terminal import ledger_table, trained_text

    tokenizer = run.prepare_tokenizer(loaded.config)
    with data_progress(console) as progress:
        meta = run.load_datasets(loaded.config, tokenizer, progress=progress)
    assert meta.ledger is not None
    console.print(ledger_table(meta.ledger.table()))
    console.print(meta.cache_note, highlight=False)
    for index in range(min(show, len(meta.train_dataset))):
        sample = meta.train_dataset.sample(index)
        pieces = [tokenizer.decode([int(token)]) for token in sample.input_ids]
        trained = [bool(label != -100) for label in sample.labels]
        console.rule(f"sample {index}: {len(pieces)} tokens, {sum(trained)} trained")
        console.print(trained_text(pieces, trained))
