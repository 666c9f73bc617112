"""`eft merge`: an adapter and its base as one plain model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from eft.cli.console import console, open_config, quiet_libraries, set_up_logging

_SHOWN = 12


def merge(
    source: Annotated[Path, typer.Argument(metavar="CONFIG|FOLDER", help="YAML of the run, or the adapter's folder.")],
    output_dir: Annotated[
        Path | None,
        typer.Option("--output-dir", help="Where the model goes; default: merged/ in the adapter's folder."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="float32, bfloat16 or float16; default: that of the base's files.")
    ] = None,
    as_trained: Annotated[
        bool,
        typer.Option("--as-trained", help="Merge into the 4- or 8-bit base as it was in training.", show_default=False),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what lies in the output folder.", show_default=False)
    ] = False,
) -> None:
    """Merge a trained adapter into its base, a shard in memory at a time, and compare the logits of the two."""
    adapter = source if source.is_dir() else Path(open_config(source).config.output_dir)
    set_up_logging()
    quiet_libraries()
    import torch

    from eft.core.errors import ConfigError, PromiseBroken
    from eft.models.empty_base import adapter_facts
    from eft.models.merge import MERGE_FILE, merge_adapter
    from eft.models.model_card import merged_receipt, write_card
    from eft.report.terminal import quantities_table
    from eft.runtime.env import versions

    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype is not None and dtype not in kinds:
        raise ConfigError(f"--dtype: {dtype} is none of {', '.join(kinds)}")
    done = merge_adapter(
        adapter,
        output_dir or adapter / "merged",
        save_dtype=None if dtype is None else kinds[dtype],
        as_trained=as_trained,
        overwrite=overwrite,
    )
    saved_in = str(done.dtype).removeprefix("torch.")
    write_card(done.folder, merged_receipt(adapter_facts(adapter), saved_in, done.promises, versions()))
    largest = sorted(done.changes, key=lambda change: -change.change)
    rows = [
        (
            entry.name,
            f"{entry.change:.2e} of ‖base‖, at most {entry.largest:.2e}, {max(entry.lost, 0.0):.0%} lost to rounding",
        )
        for entry in largest[:_SHOWN]
    ]
    console.print(quantities_table(f"{len(done.changes)} of {done.tensors} tensors changed", rows))
    if len(largest) > _SHOWN:
        console.print(f"… and {len(largest) - _SHOWN} more in {done.folder / MERGE_FILE}", highlight=False)
    for promise in done.promises:
        console.print(f"{promise.status}: {promise.title}: {promise.detail}", highlight=False)
    console.print(f"wrote {done.folder} ({saved_in})", highlight=False)
    broken = [promise for promise in done.promises if promise.status == "fail"]
    if broken:
        raise PromiseBroken(f"{broken[0].promise} {broken[0].title}: {broken[0].detail}")
