"""Tables of docs/benchmarks.md: each benchmark owns the lines between its two markers."""

from __future__ import annotations

import datetime
import platform
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"


def replace_section(text: str, name: str, body: str) -> str:
    """`text` with what is between `<!-- name -->` and `<!-- /name -->` replaced; appended where it has no markers."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    section = f"{start}\n{body.strip()}\n{end}"
    if start not in text:
        return f"{text.rstrip()}\n\n{section}\n"
    before, rest = text.split(start, 1)
    return before + section + rest.split(end, 1)[1]


def write_section(name: str, body: str, page: Path = PAGE) -> None:
    """Replace one section of the page."""
    page.write_text(replace_section(page.read_text() if page.is_file() else "# Benchmarks\n", name, body))


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is left-aligned, the others right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def spread(values: Sequence[float], digits: int = 2) -> str:
    """`2.31 (2.12 to 2.55)`: median, least and most."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})"


def device_name(device: str) -> str:
    """The device in words."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []:
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    return f"{cpu}, {torch.get_num_threads()} threads"


def today() -> str:
    """The date, as docs write it."""
    return datetime.date.today().isoformat()


def command_line() -> str:
    """The command as it was given."""
    words = [f"'{word}'" if not word or " " in word else word for word in sys.argv[1:]]
    return " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words])
