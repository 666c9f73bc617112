"""The longest document that each contender can train on this device: one step of one row, alone in memory.

    python benchmarks/longest.py --model 8b-lora --device cuda

Doubles the length until a step does not fit, then halves the gap until it is below an eighth of the length.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from contest import Contender, ContenderFailed, Entry, contest_folder
from environments import CACHE
from step import contest_settings, entries, parser_of, settle, versions_text
from tables import command_line, device_name, markdown_table, today, write_section
from workload import SHAPES, RowOptions, prepare_model, prepare_rows


def fits(entry: Entry, options: argparse.Namespace, model: Path, capacity: int, folder: Path) -> bool:
    """Whether two steps of one document of `capacity` tokens go through."""
    shape = SHAPES[options.model]
    options.capacity = capacity
    rows = prepare_rows(RowOptions(shape.vocab, capacity, 4, 1, median=0), CACHE)
    settings = {**contest_settings(options, shape, model, rows), "max_steps": 3}
    contender: Contender | None = None
    try:
        contender = Contender(entry, settings, folder)
        contender.run(2)
    except (MemoryError, ContenderFailed) as error:
        print(f"{entry.name}, {capacity:,} tokens: {str(error).splitlines()[0]}", flush=True)
        return False
    finally:
        if contender is not None:
            contender.stop()
    print(f"{entry.name}, {capacity:,} tokens: fits", flush=True)
    return True


def longest(entry: Entry, options: argparse.Namespace, model: Path, folder: Path) -> int:
    """The longest length that fits; 0 where not even the first one does."""
    known, tried = 0, options.capacity
    while tried <= options.most and fits(entry, options, model, tried, folder):
        known, tried = tried, 2 * tried
    if not known or tried > options.most:
        return known
    while tried - known > max(known // 8, 1024):
        middle = (known + tried) // 2
        if fits(entry, options, model, middle, folder):
            known = middle
        else:
            tried = middle
    return known


def main() -> int:
    """Search for each contender, print, write the section `longest` of docs/benchmarks.md."""
    parser = parser_of(__doc__ or "")
    parser.add_argument("--most", type=int, default=131072, help="no longer than this")
    parser.set_defaults(capacity=4096, section="longest")
    options = settle(parser.parse_args())
    torch.set_num_threads(options.threads)
    CACHE.mkdir(parents=True, exist_ok=True)
    model = prepare_model(options.model, CACHE)
    folder = contest_folder()
    start = options.capacity
    found = entries(options)
    rows = []
    for entry in found:
        options.capacity = start
        rows.append([entry.note, f"{longest(entry, options, model, folder):,}"])
    text = (
        f"`{command_line()}`, {today()}, {device_name(options.device)}; {versions_text(found)}.\n\n"
        f"{markdown_table(['contender', f'tokens of one document, at most {options.most:,}'], rows)}"
    )
    print(text)
    if options.section:
        write_section(options.section, text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
