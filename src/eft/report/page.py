"""`report.html`: one page that holds everything it shows and asks nothing of the network."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

from eft.core import atomic, constants
from eft.report.charts import figure
from eft.report.curves import run_charts
from eft.report.headline import cards_markup, run_cards, run_state
from eft.report.ledger import ledger_section
from eft.report.markup import Markup, element, escape, join
from eft.report.reading import RunFiles, read_run
from eft.report.sections import (
    config_section,
    environment_section,
    events_section,
    plan_section,
    promises_section,
    samples_section,
)


def write_report(output_dir: Path) -> Path:
    """Write `report.html` into `output_dir` from the files there, and return its path.

    Works on a crashed run: what is missing or damaged is named at the top of the page. Raises OSError when the page
    cannot be written.
    """
    path = output_dir / constants.REPORT_FILE
    atomic.write_text(path, render_page(read_run(output_dir)))
    return path


def render_page(run: RunFiles) -> str:
    """The whole document. A policy in its head forbids every request, and every script but ours (by its hash)."""
    style = resources.files("eft.report").joinpath("page.css").read_text(encoding="utf-8")
    script = resources.files("eft.report").joinpath("page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
    head = (
        '<meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{escape(run.name)} · eft report</title><style>{style}</style>"
    )
    sections = list(_sections(run))
    body = _header(run, sections) + element("main", _main(run, sections)) + f"<script>{script}</script>"
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>{body}</body></html>\n'


def _sections(run: RunFiles) -> Iterator[tuple[str, str, str, Markup]]:
    """(anchor, title, note, body) of each section that has something to show."""
    yield "curves", "Curves", "", element("div", join(figure(chart) for chart in run_charts(run)), class_="charts")
    if run.samples:
        yield "answers", "Answers", "the same held-out prompts before and after training", samples_section(run.samples)
    if run.promises:
        passed = sum(row.get("status") == "pass" for row in run.promises)
        failed = sum(row.get("status") == "fail" for row in run.promises)
        note = f"{passed} passed, {failed} failed, {len(run.promises) - passed - failed} not applicable"
        yield "promises", "Promises", note, promises_section(run.promises)
    if run.ledger:
        yield "tokens", "Token ledger", "where every raw token went", ledger_section(run.ledger)
    if run.plan:
        yield "plan", "Plan", "fixed before the first step", plan_section(run.plan)
    if run.events:
        yield "events", "Events", "", events_section(run.events)
    if run.config_text:
        yield "config", "Config", "effective values, with the origin of each", config_section(run.config_text)
    environment = run.summary.get("environment")
    if isinstance(environment, dict) and environment:
        yield "environment", "Environment", "", environment_section(environment)


def _header(run: RunFiles, sections: list[tuple[str, str, str, Markup]]) -> Markup:
    state, words = run_state(run)
    title = element("h1", escape(run.name) + element("span", escape(words), class_=f"state {state}".strip()))
    model = re.search(r"^base_model: (.*?)(?:\s+#.*)?$", run.config_text, re.MULTILINE)
    lead = element("p", escape(f"{model[1]}, fine-tuned with eft" if model else "Fine-tuned with eft"), class_="lead")
    links = element("nav", join(element("a", escape(name), href=f"#{anchor}") for anchor, name, _, _ in sections))
    return element("header", element("div", title + lead + links), class_="top")


def _main(run: RunFiles, sections: list[tuple[str, str, str, Markup]]) -> Markup:
    parts = [cards_markup(run_cards(run))]
    if run.problems:
        parts.append(
            element("div", escape("Not all of the run is here: " + "; ".join(run.problems) + "."), class_="problems")
        )
    for anchor, name, note, body in sections:
        heading = element("h2", escape(name) + (element("small", escape(note)) if note else ""))
        parts.append(element("section", heading + body, id=anchor))
    parts.append(
        element(
            "footer", escape("Made from the files in this folder by `eft report`. Nothing on this page is fetched.")
        )
    )
    return join(parts)
