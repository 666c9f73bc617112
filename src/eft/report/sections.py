"""The page's sections below the cards, each a pure function of what was read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from eft.report.markup import Markup, element, escape, join, table
from eft.report.reading import Json
from eft.report.series import format_number

SAMPLES_OPEN = 6
"""Sample answers that show at once; the rest is folded away."""

CONFIG_OPEN = 40
"""Lines of a config that show at once."""

_PLAN_WORDS = {
    "total_steps": "Steps executed",
    "plan_steps": "Steps of the plan",
    "decided_by": "Decided by",
    "num_epochs": "Epochs",
    "global_batch_size": "Bins per step",
    "capacity": "Tokens per bin",
    "fill_percent": "Bins filled (%)",
    "fill_of_possible_percent": "Of the fill that is possible (%)",
    "samples_per_epoch": "Samples per epoch",
    "tokens_per_epoch": "Tokens per epoch",
    "trainable_tokens_per_epoch": "Trainable tokens per epoch",
    "weight_per_epoch": "Loss weight per epoch",
    "total_tokens": "Tokens of the whole run",
    "tokens_per_step": "Tokens per step",
    "strategy": "Packing",
    "strategy_reason": "Why so",
    "shuffle": "Shuffled",
    "seed": "Seed",
    "fingerprint": "Fingerprint",
}


def facts(values: Mapping[str, Any], words: Mapping[str, str] | None = None) -> Markup:
    """A grid of names and values; nested mappings become `min 3 · max 9`."""
    names = words or {}
    order = [key for key in names if key in values] + [key for key in values if key not in names]
    pairs = (
        element("div", element("dt", escape(names.get(key, spoken(key)))) + element("dd", escape(plain(values[key]))))
        for key in order
    )
    return element("div", element("dl", join(pairs), class_="facts"), class_="scroll")


def spoken(key: str) -> str:
    """`tokens_per_step` → `Tokens per step`."""
    text = str(key).replace("_", " ").strip()
    return text[:1].upper() + text[1:]


def plain(value: Any) -> str:
    """Any JSON value in one line."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return format_number(value)
    if isinstance(value, dict):
        return " · ".join(f"{spoken(k).lower()} {plain(v)}" for k, v in value.items())
    if isinstance(value, list):
        return ", ".join(plain(v) for v in value)
    text = str(value)
    return f"{text[:12]}…" if re.fullmatch(r"[0-9a-f]{32,}", text) else text


def plan_section(plan: Json) -> Markup:
    """Fill, steps, and one line per epoch."""
    epochs = [e for e in plan.get("epochs", []) if isinstance(e, dict)] if isinstance(plan.get("epochs"), list) else []
    body = facts({key: value for key, value in plan.items() if key != "epochs"}, _PLAN_WORDS)
    if epochs:
        names = list(epochs[0])
        rows = [
            [escape(i), *(escape(plain(epoch.get(name))) for name in names)] for i, epoch in enumerate(epochs, start=1)
        ]
        body = Markup(body + "<br>" + table(["Epoch", *map(spoken, names)], rows, numeric_from=1))
    return body


def promises_section(promises: Sequence[Json]) -> Markup:
    """One line per promise: state, what was compared, the numbers."""
    return table(["Promise", "State", "Result"], [_promise(row) for row in promises])


def _promise(row: Json) -> list[Markup]:
    status = str(row.get("status", ""))
    numbers = row.get("numbers")
    pairs = numbers.items() if isinstance(numbers, dict) else ()
    values = " · ".join(f"{spoken(name).lower()} {plain(value)}" for name, value in pairs)
    title = element("b", escape(row.get("promise", ""))) + " " + escape(row.get("title", ""))
    result = escape(row.get("detail", "")) + (element("span", escape(values), class_="nums") if values else "")
    state = element("span", escape(status), class_=f"state {status if status in ('pass', 'fail') else ''}".strip())
    return [Markup(title), state, Markup(result)]


def samples_section(samples: Sequence[Json]) -> Markup:
    """Prompt, reference, and the model's answer before and after training, side by side."""
    shown = [_sample(row) for row in samples]
    rest = shown[SAMPLES_OPEN:]
    if not rest:
        return join(shown)
    count = element("summary", escape(f"{len(rest)} more"))
    return Markup(join(shown[:SAMPLES_OPEN]) + "<details>" + count + join(rest) + "</details>")


def _sample(row: Json) -> Markup:
    prompt = row.get("prompt")
    turns = prompt if isinstance(prompt, list) else [{"role": "prompt", "content": prompt}]
    reference = row.get("reference")
    answers = []
    for name, title in (("reference", "Reference"), ("before", "Before"), ("after", "After")):
        if row.get(name) is None:
            continue
        match = (
            name != "reference" and reference is not None and text_of(row[name]).strip() == text_of(reference).strip()
        )
        heading = element("h3", escape(f"{title} ✓ same as the reference" if match else title))
        text = (
            element("pre", escape(text_of(row[name])))
            if text_of(row[name])
            else element("span", "(no answer)", class_="nums")
        )
        answers.append(element("div", heading + text, class_="answer match" if match else "answer"))
    body = join(_turn(turn) for turn in turns) + element("div", join(answers), class_="answers")
    return element("article", body, class_="sample")


def _turn(turn: Any) -> Markup:
    role, content = ("", turn) if not isinstance(turn, dict) else (turn.get("role", ""), turn.get("content"))
    if isinstance(turn, dict) and turn.get("tool_calls"):
        content = f"{text_of(content)}\n{text_of(turn['tool_calls'])}".strip()
    return element("div", element("b", escape(role)) + escape(text_of(content)), class_="turn")


def text_of(value: Any) -> str:
    """Text as it is, nothing for None, anything else as JSON."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, indent=1)


def config_section(text: str) -> Markup:
    """The effective config: keys and origins (the trailing comments) set apart, defaults faint, folded when long."""
    lines = text.splitlines()
    title = element("summary", escape(f"config.yaml, {len(lines)} lines; bright: not the default"))
    body = element("pre", join(map(_config_line, lines), "\n"), class_="config")
    return element("details", title + body, class_="box", open="" if len(lines) <= CONFIG_OPEN else None)


def _config_line(line: str) -> Markup:
    body, origin = _split_comment(line)
    match = re.match(r"(\s*(?:- )?)([\w.\"'-]+)(:(?:\s.*)?)$", body)
    shown = escape(body)
    if match:
        lead, key, rest = match.groups()
        shown = Markup(escape(lead) + element("span", escape(key), class_="k") + escape(rest))
    whole = Markup(shown + (element("span", escape(origin), class_="o") if origin else ""))
    return element("span", whole, class_="d") if origin.strip("# ") == "default" else whole


def _split_comment(line: str) -> tuple[str, str]:
    """The line before and from its comment; a `#` inside quotes or inside a word is text."""
    quote = ""
    for index, sign in enumerate(line):
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "\"'":
            quote = sign
        elif sign == "#" and (index == 0 or line[index - 1].isspace()):
            return line[:index], line[index:]
    return line, ""


def environment_section(environment: Json) -> Markup:
    """Machine and versions, under the names of the packages."""
    return facts(environment, {str(key): str(key) for key in environment})


def events_section(events: Iterable[Json]) -> Markup:
    """What happened besides steps. Events that say nothing but their step, such as saves, share a line."""
    plain_ones: dict[str, list[str]] = {}
    rows = []
    for event in events:
        name, step = spoken(str(event["event"])), plain(event.get("step"))
        details = {key: value for key, value in event.items() if key not in ("event", "step", "time")}
        if details:
            rows.append([escape(name), escape(step), escape(plain(details))])
        else:
            plain_ones.setdefault(name, []).append(step)
    grouped = [[escape(name), escape(", ".join(steps)), Markup("")] for name, steps in plain_ones.items()]
    head = ["Event", "Step", "Details"] if rows else ["Event", "Step"]
    return table(head, [row[: len(head)] for row in [*grouped, *rows]])
