"""The token ledger as a table and a bar: where every raw token of every data set went."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from eft.report.markup import Markup, element, escape, join, table
from eft.report.reading import Json, number

_HEAD = ["Data set", "Rows", "Samples", "Raw tokens", "Trainable", "Context", "Truncated", "Held out", "Dropped"]
_COUNTS = ("rows", "samples", "raw", "trainable", "context", "truncated")
_PARTS = (("trainable", "c0"), ("context", "c9"), ("truncated", "c4"), ("held out", "c2"), ("dropped", "c1"))
_ROWS_NAMED = 3


def ledger_section(ledger: Json) -> Markup:
    """One line per data set with the reasons of its dropped rows, a total, and a bar of the training tokens."""
    listed = ledger.get("sources")
    sources = [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
    training = [entry for entry in sources if entry.get("split", "train") == "train"]
    lines = [[_name(source), *(escape(_count(v)) for v in _numbers(source).values())] for source in sources]
    total = _sum([_numbers(source) for source in training])
    if len(training) > 1:
        lines.append([element("b", "All training data"), *(element("b", escape(_count(v))) for v in total.values())])
    return Markup(table(_HEAD, lines, numeric_from=1) + _bar(total))


def _numbers(source: Json) -> dict[str, float]:
    """Counts of one data set, in the order of the columns."""
    found = {name: _whole(source.get(name)) for name in _COUNTS}
    held_out = source.get("held_out")
    found["held out"] = _whole(held_out.get("tokens")) if isinstance(held_out, dict) else 0.0
    found["dropped"] = sum(_whole(portion.get("tokens")) for portion in _dropped(source).values())
    return found


def _sum(counts: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(one[name] for one in counts) for name in (counts[0] if counts else {})}


def _dropped(source: Json) -> dict[str, Json]:
    dropped = source.get("dropped")
    portions = dropped.items() if isinstance(dropped, dict) else ()
    return {str(reason): portion for reason, portion in portions if isinstance(portion, dict)}


def _name(source: Json) -> Markup:
    """The data set's name, whether it is held out, and why rows were dropped."""
    split = "" if source.get("split", "train") == "train" else " (evaluation)"
    reasons = (element("span", escape(_reason(*item)), class_="more") for item in _dropped(source).items())
    return Markup(escape(f"{source.get('name', '')}{split}") + join(reasons))


def _reason(reason: str, portion: Mapping[str, Any]) -> str:
    rows = portion.get("first_rows")
    first = ", ".join(str(row) for row in rows[:_ROWS_NAMED]) if isinstance(rows, list) else ""
    counts = f"{_count(_whole(portion.get('rows')))} rows, {_count(_whole(portion.get('tokens')))} tokens"
    return f"dropped, {reason.replace('_', ' ')}: {counts}" + (f" (first: {first})" if first else "")


def _whole(value: Any) -> float:
    found = number(value)
    return found if found == found else 0.0


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _bar(total: Mapping[str, float]) -> Markup:
    whole = sum(total.get(name, 0.0) for name, _ in _PARTS)
    if not whole:
        return Markup("")
    shares = [(name, colour, 100 * total[name] / whole) for name, colour in _PARTS if total[name]]
    bars = (element("i", class_=colour, style=f"width:{share:.3f}%") for _, colour, share in shares)
    words = (
        element("span", element("i", class_=colour) + escape(f"{name} {share:.1f} %")) for name, colour, share in shares
    )
    return Markup(element("div", join(bars), class_="meter") + element("p", join(words), class_="key"))
