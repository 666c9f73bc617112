"""`eft data`: looking at the data of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from eft.cli.console import console, error_console, open_config, quiet_libraries, set_up_logging
from eft.cli.options import AllowUnsupported, ConfigPath, Overrides

app = typer.Typer(help="A page about the data of a run.", no_args_is_help=True, add_completion=False)


@app.callback()
def group() -> None:
    """Look at the data of a run."""


@app.command()
def report(
    config: ConfigPath,
    overrides: Overrides = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Default: data.html in `output_dir`.")] = None,
    samples: Annotated[int, typer.Option("--samples", min=0, help="Samples shown with their masks.")] = 8,
    allow_unsupported: AllowUnsupported = False,
) -> None:
    """Write one HTML page about CONFIG's data: lengths, ledger, roles, fill, gates, samples with their masks.

    Prepares the data (or finds them prepared) and loads no model. Also written where a gate is over its limit.
    """
    loaded = open_config(config, overrides, allow_unsupported=allow_unsupported)
    set_up_logging()
    quiet_libraries()
    import numpy as np

    from eft import inputs
    from eft.cli.progress import data_progress
    from eft.core.errors import ConfigError
    from eft.data.gates_openings import openings_pattern
    from eft.data.plan import Plan
    from eft.data.sample_set import SampleSet
    from eft.data.shown import MOST_TOKENS, shown_row
    from eft.report.data_page import DataFacts, write_data_page
    from eft.runtime.env import Environment

    settings = loaded.config
    if settings.streaming:
        raise ConfigError("eft data report: a stream is never there as a whole; set `streaming: false` to look at it")
    tokenizer = inputs.prepare_tokenizer(settings)
    with data_progress(error_console) as progress:
        meta = inputs.load_datasets(settings, tokenizer, progress=progress, stop_at_gates=False)
    data = meta.train_dataset
    plan = inputs.plan_of(settings, data, Environment.detect().world_size)
    assert meta.ledger is not None
    assert isinstance(plan, Plan)
    assert isinstance(data, SampleSet)
    openings = openings_pattern(tokenizer)
    chosen = np.unique(np.linspace(0, len(data) - 1, min(samples, len(data)), dtype=np.int64)).tolist()
    rows = [
        shown_row(data.origin(index), data.sample(index), tokenizer, most_tokens=MOST_TOKENS, openings=openings)
        for index in chosen
    ]
    facts = DataFacts(
        config.stem, meta.ledger.to_json(), plan.summary(), data.lengths, data.trainable_counts, rows, meta.cache_note
    )
    path = output or Path(settings.output_dir) / "data.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    console.print(f"data report: {write_data_page(path, facts)}", highlight=False, soft_wrap=True)
