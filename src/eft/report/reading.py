"""What an output folder holds, read with a crashed run in mind: any file may be missing, empty or cut off.

Of `summary.json` (written by `run`) these keys are shown, each optional: `steps`, `training_loss`, `eval_loss_first`,
`eval_loss`, `seconds`, `tokens`, `tokens_per_second`, `peak_memory_mib`, `parameters_total`, `parameters_trainable`,
`exit_reason`, `environment` (a flat mapping) and `measures`: {name: {"before": number, "after": number, "note": text}},
in shares from 0 to 1.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eft.core import constants

Json = dict[str, Any]


@dataclass(frozen=True)
class RunFiles:
    """The content of an output folder; `problems` names each file that was missing or unreadable, in a sentence."""

    name: str
    config_text: str = ""
    plan: Json = field(default_factory=dict)
    ledger: Json = field(default_factory=dict)
    summary: Json = field(default_factory=dict)
    training: list[Json] = field(default_factory=list)
    evaluations: list[Json] = field(default_factory=list)
    events: list[Json] = field(default_factory=list)
    samples: list[Json] = field(default_factory=list)
    promises: list[Json] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def read_run(output_dir: Path) -> RunFiles:
    """Read what is there. Raises nothing for missing or damaged files: `problems` says which."""
    problems: list[str] = []
    training, evaluations, events = split_metrics(_read_lines(output_dir / constants.METRICS_FILE, problems))
    return RunFiles(
        name=output_dir.resolve().name,
        config_text=_read_text(output_dir / constants.CONFIG_FILE, problems) or "",
        plan=_read_mapping(output_dir / constants.PLAN_FILE, problems),
        ledger=_read_mapping(output_dir / constants.LEDGER_FILE, problems, optional=True),
        summary=_read_mapping(output_dir / constants.SUMMARY_FILE, problems),
        training=training,
        evaluations=evaluations,
        events=events,
        samples=_read_lines(output_dir / constants.SAMPLES_FILE, problems, optional=True),
        promises=_read_promises(output_dir / constants.PROMISES_FILE, problems),
        problems=problems,
    )


def split_metrics(rows: list[Json]) -> tuple[list[Json], list[Json], list[Json]]:
    """Training rows and evaluation rows by step, and events in order.

    A run that was killed and resumed wrote some steps twice; the later row is the one that counts.
    """
    training: dict[int, Json] = {}
    evaluations: dict[int, Json] = {}
    events: list[Json] = []
    for row in rows:
        step = row.get("step")
        if "event" in row:
            events.append(row)
        elif not isinstance(step, int):
            continue
        elif any(is_eval_loss(name) for name in row):
            evaluations[step] = {**evaluations.get(step, {}), **row}
        else:
            training[step] = row
    return [training[k] for k in sorted(training)], [evaluations[k] for k in sorted(evaluations)], events


def is_eval_loss(name: str) -> bool:
    """True for `eval_loss` and, with several held-out sets, `eval_<name>_loss`."""
    return name.startswith("eval_") and name.endswith("loss")


def number(value: Any) -> float:
    """`value` as a float; NaN for whatever is no number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    return float(value)


def _read_text(path: Path, problems: list[str], *, optional: bool = False) -> str | None:
    """The text, or None. `optional`: not every run writes the file, so that its absence is no problem."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        if not optional:
            problems.append(f"{path.name} is not there")
    except OSError as error:
        problems.append(f"{path.name} cannot be read: {error.strerror}")
    return None


def _read_json(path: Path, problems: list[str], *, optional: bool = False) -> Any:
    text = _read_text(path, problems, optional=optional)
    if text is None:
        return None
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        problems.append(f"{path.name} is damaged (line {error.lineno}: {error.msg})")
    return None


def _read_mapping(path: Path, problems: list[str], *, optional: bool = False) -> Json:
    value = _read_json(path, problems, optional=optional)
    if value is not None and not isinstance(value, dict):
        problems.append(f"{path.name} holds a {type(value).__name__}, not a mapping")
    return value if isinstance(value, dict) else {}


def _read_promises(path: Path, problems: list[str]) -> list[Json]:
    value = _read_json(path, problems)
    return [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []


def _read_lines(path: Path, problems: list[str], *, optional: bool = False) -> list[Json]:
    text = _read_text(path, problems, optional=optional)
    rows: list[Json] = []
    damaged: list[int] = []
    for index, line in enumerate((text or "").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            damaged.append(index)
            continue
        if isinstance(row, dict):
            rows.append(row)
    if damaged:
        problems.append(f"{path.name}: {len(damaged)} damaged line(s) left out, the first is line {damaged[0]}")
    return rows
