"""`report.html`: one page that holds everything it shows and asks nothing of the network."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator, Sequence
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
    """The whole document about a run."""
    sections = list(_sections(run))
    model = re.search(r"^base_model: (.*?)(?:\s+#.*)?$", run.config_text, re.MULTILINE)
    lead = f"{model[1]}, fine-tuned with eft" if model else "Fine-tuned with eft"
    top = cards_markup(run_cards(run))
    if run.problems:
        problems = "Not all of the run is here: " + "; ".join(run.problems) + "."
        top = Markup(top + element("div", escape(problems), class_="problems"))
    return document(f"{run.name} · eft report", page_body(run.name, run_state(run), lead, top, sections, "eft report"))


def document(title: str, body: Markup) -> str:
    """A page. A policy in its head forbids every request, and every script but ours (by its hash)."""
    style = resources.files("eft.report").joinpath("page.css").read_text(encoding="utf-8")
    script = resources.files("eft.report").joinpath("page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
    head = (
        '<meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{style}</style>"
    )
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>{body}<script>{script}</script></body></html>\n'


def page_body(
    name: str,
    state: tuple[str, str],
    lead: str,
    top: Markup,
    sections: Sequence[tuple[str, str, str, Markup]],
    command: str,
) -> Markup:
    """Header with links, what stands on top, then the sections: (anchor, title, note, body) each."""
    look, words = state
    title = element("h1", escape(name) + element("span", escape(words), class_=f"state {look}".strip()))
    links = element("nav", join(element("a", escape(title), href=f"#{anchor}") for anchor, title, _, _ in sections))
    header = element("header", element("div", title + element("p", escape(lead), class_="lead") + links), class_="top")
    parts = [top]
    for anchor, section, note, body in sections:
        heading = element("h2", escape(section) + (element("small", escape(note)) if note else ""))
        parts.append(element("section", heading + body, id=anchor))
    words = f"Made from the files in this folder by `{command}`. Nothing on this page is fetched."
    if command != "eft report":
        words = f"Made by `{command}`. Nothing on this page is fetched."
    parts.append(element("footer", escape(words)))
    return Markup(header + element("main", join(parts)))


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
