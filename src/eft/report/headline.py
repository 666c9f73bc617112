"""The cards at the top: what came out, in one look."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from eft.report.markup import Markup, element, escape, join
from eft.report.reading import Json, RunFiles, number
from eft.report.series import format_number


@dataclass(frozen=True)
class Card:
    """One number, what it was before where that says something, and a line of explanation."""

    title: str
    value: str
    before: str = ""
    note: str = ""


def cards_markup(cards: Sequence[Card]) -> Markup:
    """The grid of cards."""
    return element("div", join(_card(card) for card in cards), class_="cards")


def run_cards(run: RunFiles) -> list[Card]:
    """The cards that this run's files have the numbers for."""
    found = [
        _steps(run),
        _held_out_loss(run),
        *_measures(run.summary),
        _training_loss(run),
        _throughput(run),
        _duration(run),
        _parameters(run.summary),
        _memory(run.summary),
    ]
    return [card for card in found if card is not None]


def last_step(run: RunFiles) -> int:
    """The last optimizer step that the files know of; 0 for a run that never stepped."""
    steps = number(run.summary.get("steps"))
    if math.isfinite(steps):
        return int(steps)
    return int(run.training[-1]["step"]) if run.training else 0


def planned_steps(run: RunFiles) -> int | None:
    """The number of steps announced before the run."""
    planned = number(run.plan.get("total_steps"))
    return int(planned) if math.isfinite(planned) else None


def run_state(run: RunFiles) -> tuple[str, str]:
    """(CSS class, words) for the state of the run. Without a summary the process ended before it could write one."""
    if not run.summary:
        return "fail", "not finished"
    planned = planned_steps(run)
    if planned is not None and last_step(run) < planned:
        return "", "ended early"
    return "pass", "finished"


def format_seconds(seconds: float) -> str:
    """`42.0 s`, `3 min 20 s`, `2 h 05 min`, `3 d 4 h`."""
    if not math.isfinite(seconds):
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86_400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86_400} d {whole % 86_400 // 3600} h"


def _card(card: Card) -> Markup:
    before = element("span", escape(card.before) + " → ", class_="from") if card.before else ""
    note = element("small", escape(card.note)) if card.note else Markup("")
    return element(
        "div", element("h3", escape(card.title)) + element("p", before + escape(card.value)) + note, class_="card"
    )


def _steps(run: RunFiles) -> Card:
    planned = planned_steps(run)
    value = f"{last_step(run):,}" + (f" of {planned:,}" if planned is not None else "")
    return Card("Steps", value, note=str(run.summary.get("exit_reason") or ""))


def _held_out_loss(run: RunFiles) -> Card | None:
    before, after = number(run.summary.get("eval_loss_first")), number(run.summary.get("eval_loss"))
    if not math.isfinite(after):
        seen = [v for v in (number(row.get("eval_loss")) for row in run.evaluations) if math.isfinite(v)]
        before, after = (seen[0], seen[-1]) if seen else (math.nan, math.nan)
    if before == after:
        before = math.nan
    if not math.isfinite(after):
        return None
    note = f"{100 * (after / before - 1):+.1f} %".replace("-", "−") if math.isfinite(before) and before else ""
    return Card("Held-out loss", format_number(after), format_number(before) if math.isfinite(before) else "", note)


def _measures(summary: Json) -> list[Card]:
    measures = summary.get("measures")
    cards = []
    for name, pair in measures.items() if isinstance(measures, dict) else ():
        if isinstance(pair, dict):
            before, after = number(pair.get("before")), number(pair.get("after"))
            note = str(pair.get("note") or "")
            cards.append(Card(str(name), _share(after), _share(before) if math.isfinite(before) else "", note))
    return cards


def _share(value: float) -> str:
    return f"{100 * value:.0f} %" if 0.0 <= value <= 1.0 else format_number(value)


def _training_loss(run: RunFiles) -> Card | None:
    mean = number(run.summary.get("training_loss"))
    losses = [v for v in (number(row.get("loss")) for row in run.training) if math.isfinite(v)]
    if not losses:
        return Card("Training loss", format_number(mean), note="mean of the run") if math.isfinite(mean) else None
    note = f"mean of the run {format_number(mean)}" if math.isfinite(mean) else "last logged"
    return Card("Training loss", format_number(losses[-1]), format_number(losses[0]) if len(losses) > 1 else "", note)


def _throughput(run: RunFiles) -> Card | None:
    value = number(run.summary.get("tokens_per_second"))
    if not math.isfinite(value):
        rates = sorted(v for v in (number(r.get("tokens_per_second")) for r in run.training) if math.isfinite(v))
        value = rates[len(rates) // 2] if rates else math.nan
    if not math.isfinite(value):
        return None
    total = number(run.summary.get("tokens", run.training[-1].get("tokens") if run.training else None))
    return Card("Tokens per second", format_number(value), note=f"{format_number(total)} tokens" if total > 0 else "")


def _duration(run: RunFiles) -> Card | None:
    seconds = number(run.summary.get("seconds"))
    note = ""
    if not math.isfinite(seconds) and run.training:
        seconds, note = number(run.training[-1].get("time")), "up to the last logged step"
    return Card("Time", format_seconds(seconds), note=note) if math.isfinite(seconds) else None


def _parameters(summary: Json) -> Card | None:
    total, trainable = number(summary.get("parameters_total")), number(summary.get("parameters_trainable"))
    if not math.isfinite(trainable):
        return None
    note = f"{100 * trainable / total:.3g} % of {format_number(total)}" if total > 0 else ""
    return Card("Parameters trained", format_number(trainable), note=note)


def _memory(summary: Json) -> Card | None:
    peak = number(summary.get("peak_memory_mib"))
    if not math.isfinite(peak):
        return None
    return Card("Peak memory", f"{peak / 1024:.1f} GiB" if peak >= 1024 else f"{peak:.0f} MiB")
