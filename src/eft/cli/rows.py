"""Samples in the terminal: what is trained, by colour where there is any, by marks where there is none."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from rich.console import Console
from rich.text import Text

from eft.core.records import ShownRow, TokenKind

_STYLES: dict[TokenKind, str] = {
    "trained": "green underline",
    "trained special": "bold green underline",
    "special": "magenta",
    "header": "cyan",
    "context": "dim",
}
_LEGEND: tuple[tuple[str, TokenKind], ...] = (
    ("trained", "trained"),
    ("context", "context"),
    ("header", "header"),
    ("special", "special"),
)
_OPEN, _CLOSE = "«", "»"


def print_rows(console: Console, rows: Sequence[ShownRow]) -> None:
    """Each row under its title. Without colours (a pipe, NO_COLOR) what is trained stands between « and »."""
    if not rows:
        return
    plain = console.color_system is None or console.no_color
    legend = Text(f"trained text stands between {_OPEN} and {_CLOSE}")
    if not plain:
        legend = Text("  ").join(Text(name, style=_STYLES[kind]) for name, kind in _LEGEND)
    console.print(legend)
    for row in rows:
        console.print(Text(f"── {row.title}", style="bold"), soft_wrap=True)
        if row.note:
            console.print(Text(row.note, style="bold red"))
        console.print(row_text(row, plain=plain), soft_wrap=True)


def row_text(row: ShownRow, *, plain: bool) -> Text:
    """The decoded row. `plain`: with marks in place of styles."""
    text = Text()
    if not plain:
        for piece, kind in row.pieces:
            text.append(piece, style=_STYLES[kind])
        return text
    for is_trained, pieces in groupby(row.pieces, key=lambda piece: piece[1].startswith("trained")):
        joined = "".join(piece for piece, _ in pieces)
        text.append(f"{_OPEN}{joined}{_CLOSE}" if is_trained else joined)
    return text
