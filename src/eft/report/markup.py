"""HTML pieces. Text goes through `escape`; what is already markup is `Markup`, so the types tell them apart."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any, NewType

Markup = NewType("Markup", str)
"""A string that is safe to place in the page."""

_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")


def escape(value: object) -> Markup:
    """Any value as text, safe inside elements and quoted attributes; characters HTML forbids become `�`."""
    return Markup(html.escape(_CONTROL.sub("�", str(value)), quote=True))


def element(tag: str, body: str | Markup = "", /, **attributes: object) -> Markup:
    """`<tag attributes>body</tag>`; the body is markup, the attributes are text. `class_` stands for `class`."""
    pairs = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escape(value)}"'
        for name, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{tag}{pairs}>{body}</{tag}>")


def join(parts: Iterable[Markup], separator: str = "") -> Markup:
    """The parts one after another."""
    return Markup(separator.join(parts))


def table(head: Sequence[str], rows: Iterable[Sequence[Markup]], *, numeric_from: int | None = None) -> Markup:
    """A table that scrolls sideways on narrow screens; columns from `numeric_from` on are right-aligned."""

    def cell(tag: str, index: int, body: Markup) -> Markup:
        right = numeric_from is not None and index >= numeric_from
        return element(tag, body, class_="n" if right else None)

    header = element("tr", join(cell("th", i, escape(name)) for i, name in enumerate(head)))
    lines = (element("tr", join(cell("td", i, body) for i, body in enumerate(row))) for row in rows)
    body = join(lines, "\n")
    return element("div", element("table", element("thead", header) + element("tbody", body)), class_="scroll")


def data_block(identifier: str, value: Any) -> Markup:
    """JSON for the page's script, inert as markup: no `<`, `>` or `&` survives, so nothing can close the element."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    text = text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    return Markup(f'<script type="application/json" id="{escape(identifier)}">{text}</script>')
