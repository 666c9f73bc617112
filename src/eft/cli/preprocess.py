"""`eft preprocess`: prepare the data and look at what is trained."""

from __future__ import annotations

from typing import Annotated

import typer

from eft.cli.console import console, open_config, quiet_libraries, set_up_logging
from eft.cli.options import AllowUnsupported, ConfigPath, Overrides
from eft.cli.rows import print_rows


def preprocess(
    config: ConfigPath,
    overrides: Overrides = None,
    show: Annotated[int, typer.Option("--show", min=0, help="Print this many samples, trained tokens coloured.")] = 3,
    allow_unsupported: AllowUnsupported = False,
) -> None:
    """Prepare the token store of CONFIG (or find it prepared), print the token ledger, the gates and some samples."""
    loaded = open_config(config, overrides, allow_unsupported=allow_unsupported)
    set_up_logging()
    quiet_libraries()
    from eft import inputs
    from eft.cli.progress import data_progress
    from eft.data.gates_openings import openings_pattern
    from eft.data.sample_set import SampleSet
    from eft.data.shown import shown_row
    from eft.report.terminal import gates_table, ledger_table

    tokenizer = inputs.prepare_tokenizer(loaded.config)
    with data_progress(console) as progress:
        meta = inputs.load_datasets(loaded.config, tokenizer, progress=progress)
    assert meta.ledger is not None
    console.print(ledger_table(meta.ledger.table()))
    if meta.gates is not None:
        console.print(gates_table(meta.gates.to_json()))
    console.print(meta.cache_note, highlight=False)
    data = meta.train_dataset
    if not show or not isinstance(data, SampleSet):  # a stream has no rows to look at yet
        return
    openings = openings_pattern(tokenizer)
    chosen = range(min(show, len(data)))
    print_rows(console, [shown_row(data.origin(i), data.sample(i), tokenizer, openings=openings) for i in chosen])
