"""The page about the data of a run: lengths, ledger, roles, fill, gates, and samples with their masks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt

from eft.core import atomic
from eft.core.records import ShownRow
from eft.report.headline import Card, cards_markup
from eft.report.histogram import histogram
from eft.report.ledger import ledger_section
from eft.report.markup import Markup, element, escape, join, table
from eft.report.page import document, page_body
from eft.report.reading import Json
from eft.report.sections import plan_section

_KIND_CLASS = {"trained": "t", "trained special": "t s", "special": "s", "header": "h", "context": "c"}


@dataclass(frozen=True)
class DataFacts:
    """What the page shows."""

    name: str
    ledger: Json
    """As in ledger.json, with the gates' results."""
    plan: Json
    """`Plan.summary()`"""
    lengths: npt.NDArray[Any]
    """Tokens of each training sample."""
    trained: npt.NDArray[Any]
    """Trainable tokens of each training sample."""
    rows: Sequence[ShownRow]
    note: str = ""
    """Where the prepared data lie."""


def write_data_page(path: Path, facts: DataFacts) -> Path:
    """Write the page, and return its path."""
    atomic.write_text(path, render_data_page(facts))
    return path


def render_data_page(facts: DataFacts) -> str:
    """The whole document; asks nothing of the network."""
    sections = list(_sections(facts))
    over = [gate for gate in facts.ledger.get("gates", []) if gate["status"] == "over"]
    state = ("fail", f"{len(over)} over the limit") if over else ("pass", "all gates hold")
    if "gates" not in facts.ledger:
        state = ("", "gates off")
    cards = cards_markup(list(_cards(facts)))
    body = page_body(facts.name, state, "The data of a run, as they are trained", cards, sections, "eft data report")
    return document(f"{facts.name} · eft data", body)


def _cards(facts: DataFacts) -> Iterator[Card]:
    tokens, trained = int(facts.lengths.sum()), int(facts.trained.sum())
    yield Card("Samples", f"{len(facts.lengths):,}", note="in an epoch")
    yield Card("Tokens", f"{tokens:,}", note="in an epoch")
    yield Card("Trained", f"{100 * trained / tokens:.1f} %", note=f"{trained:,} tokens")
    yield Card("Fill", f"{facts.plan['fill_percent']:.2f} %", note=f"of bins of {facts.plan['capacity']:,} tokens")
    yield Card("Steps", f"{facts.plan['total_steps']:,}", note=f"{facts.plan['global_batch_size']:,} bins each")


def _sections(facts: DataFacts) -> Iterator[tuple[str, str, str, Markup]]:
    if "gates" in facts.ledger:
        note = f"{facts.ledger['compared']:,} conversations compared with apply_chat_template"
        yield "gates", "Gates", note, gates_section(facts.ledger["gates"])
    yield (
        "lengths",
        "Lengths",
        "",
        element("div", histogram("Samples by length", facts.lengths, facts.trained, int(facts.plan["capacity"]))),
    )
    if facts.ledger.get("roles"):
        yield "roles", "Roles", "which turns the tokens belong to", roles_section(facts.ledger["roles"])
    yield "tokens", "Token ledger", "where every raw token went", ledger_section(facts.ledger)
    yield "plan", "Plan", "how the samples fill the bins", plan_section(facts.plan)
    if facts.rows:
        yield "samples", "Samples", "decoded from the ids, with their masks", rows_section(facts.rows)
    if facts.note:
        lines = join((element("div", escape(line)) for line in facts.note.splitlines()), "\n")
        yield "stores", "Prepared data", "", element("div", lines, class_="sample stores")


def gates_section(gates: Sequence[Json]) -> Markup:
    """One line per gate and data set: those over the limit first, then those that found something."""
    order = {"over": 0, "pass": 1, "not applicable": 2}
    ranked = sorted(gates, key=lambda gate: (order[gate["status"]], -gate["faulty"]))
    return table(["Gate", "Data set", "State", "Found", "Share", "Limit"], map(_gate, ranked), numeric_from=3)


def _gate(gate: Json) -> list[Markup]:
    words = {"pass": ("pass", "pass"), "over": ("fail", "over"), "not applicable": ("", "not judged")}
    look, word = words[gate["status"]]
    details = [gate["what"], gate["note"]]
    details += [f"{worst['origin']}{': ' + worst['note'] if worst['note'] else ''}" for worst in gate["worst"][:3]]
    more = join(element("span", escape(detail), class_="more") for detail in details if detail)
    name = Markup(element("b", escape(gate["gate"].replace("_", " "))) + more)
    judged = gate["status"] != "not applicable"
    return [
        name,
        escape(gate["source"]),
        element("span", escape(word), class_=f"state {look}".strip()),
        escape(f"{gate['faulty']:,} of {gate['judged']:,}" if judged else "–"),
        escape(f"{100 * gate['share']:.3g} %" if judged else "–"),
        escape(f"{100 * gate['limit']:.3g} %"),
    ]


def roles_section(roles: dict[str, dict[str, Sequence[int]]]) -> Markup:
    """Per data set and role its share of the tokens, and how many of its own are trained."""
    lines = []
    for source, shares in roles.items():
        whole = sum(tokens for tokens, _ in shares.values())
        for role, (tokens, trained) in sorted(shares.items(), key=lambda item: -item[1][0]):
            if tokens:
                lines.append(
                    [
                        escape(source),
                        escape(role),
                        escape(f"{tokens:,}"),
                        escape(f"{100 * tokens / whole:.1f} %"),
                        Markup(escape(f"{100 * trained / tokens:.1f} %") + _meter(trained / tokens)),
                    ]
                )
    return table(["Data set", "Role", "Tokens", "Of all", "Trained"], lines, numeric_from=2)


def _meter(share: float) -> Markup:
    return element("div", element("i", class_="c0", style=f"width:{100 * share:.2f}%"), class_="meter")


def rows_section(rows: Sequence[ShownRow]) -> Markup:
    """Samples as text; what is trained is coloured and underlined."""
    legend = join(
        element("span", escape(name), class_=f"tok {_KIND_CLASS[kind]}")
        for name, kind in (
            ("trained", "trained"),
            ("context", "context"),
            ("opening of a turn", "header"),
            ("special token", "special"),
        )
    )
    return Markup(element("p", legend, class_="key") + join(_row(row) for row in rows))


def _row(row: ShownRow) -> Markup:
    pieces = join(element("span", escape(text), class_=f"tok {_KIND_CLASS[kind]}") for text, kind in row.pieces if text)
    note = element("span", escape(row.note), class_="nums") if row.note else Markup("")
    return element(
        "article", element("h3", escape(row.title)) + note + element("pre", pieces, class_="row"), class_="sample"
    )
