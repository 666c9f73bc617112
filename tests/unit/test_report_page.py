"""The report as text: complete, tolerant of what is missing, and never markup from outside."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from eft.report.charts import Chart, figure, path_data
from eft.report.curves import epoch_ends, run_charts
from eft.report.headline import format_seconds, run_cards, run_state
from eft.report.ledger import ledger_section
from eft.report.markup import Markup, data_block, element, escape, table
from eft.report.page import write_report
from eft.report.reading import RunFiles, read_run, split_metrics
from eft.report.sections import config_section, events_section, facts, plain, samples_section
from eft.report.series import Axis, Series
from tests.run_folder import LEDGER, SAMPLES, STEPS, summary, write_run_folder

VOID = {"meta", "link", "br"}


class Outline(HTMLParser):
    """Elements, attributes and text of a page; `open` is empty at the end of well-formed HTML."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def outline_of(folder: Path) -> Outline:
    return Outline(write_report(folder).read_text(encoding="utf-8"))


def test_the_page_has_every_section(tmp_path: Path) -> None:
    page = outline_of(write_run_folder(tmp_path / "my-run"))
    assert page.open == []
    sections = [section["id"] for section in page.all("section")]
    assert sections == ["curves", "answers", "promises", "tokens", "plan", "events", "config", "environment"]
    figures = [figure["id"] for figure in page.all("figure")]
    assert figures == ["loss", "learning-rate", "grad-norm", "throughput"]
    for words in (
        "my-run",
        "finished",
        "models/tiny",
        "182 of 182",
        "0.1312",
        "−90.2 %",
        "35.4M",
        "96 %",
        "5 min 01 s",
    ):
        assert words in page.text, words
    assert "Not all of the run is here" not in page.text


def test_the_page_names_no_address_and_forbids_every_request(tmp_path: Path) -> None:
    text = write_report(write_run_folder(tmp_path)).read_text(encoding="utf-8")
    page = Outline(text)
    policy = next(meta["content"] for meta in page.all("meta") if meta.get("http-equiv"))
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert "'sha256-" in policy
    assert "unsafe-inline'; img" in policy
    links = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")]
    assert all(value == "data:," or (value or "").startswith("#") for value in links)
    assert "url(" not in text
    assert "http" not in text.replace("http-equiv", "")


ATTACK = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\"'&\x00"


def test_nothing_from_the_files_becomes_markup(tmp_path: Path) -> None:
    folder = write_run_folder(tmp_path)
    sample = {"prompt": [{"role": ATTACK, "content": ATTACK}], "reference": ATTACK, "before": ATTACK, "after": [ATTACK]}
    (folder / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    row = {"promise": ATTACK, "title": ATTACK, "status": ATTACK, "detail": ATTACK, "numbers": {ATTACK: 1.0}}
    (folder / "promises.json").write_text(json.dumps([row]))
    portion = {"rows": 1, "tokens": 2, "first_rows": [ATTACK]}
    source = {"name": ATTACK, "split": ATTACK, "dropped": {ATTACK: portion}, "rows": ATTACK, "trainable": 1}
    (folder / "ledger.json").write_text(json.dumps({"sources": [source]}))
    (folder / "plan.json").write_text(json.dumps({ATTACK: ATTACK, "epochs": [{ATTACK: ATTACK}]}))
    final = {"exit_reason": ATTACK, "environment": {ATTACK: ATTACK}, "measures": {ATTACK: {"after": 1, "note": ATTACK}}}
    (folder / "summary.json").write_text(json.dumps(final))
    (folder / "config.yaml").write_text(f"base_model: {ATTACK}\n{ATTACK}: 1  # {ATTACK}\n")
    rows = [{"step": 1, "loss": 1.0, f"eval_{ATTACK}_loss": 2.0}, {"event": ATTACK, "step": ATTACK, ATTACK: ATTACK}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = outline_of(folder)
    assert page.open == []
    assert page.all("img") == []
    assert len([s for s in page.all("script") if s.get("type") != "application/json"]) == 1
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert "<img src=x onerror=alert(1)>" in page.text
    assert "\x00" not in page.text


def test_an_empty_folder_has_a_page_that_says_so(tmp_path: Path) -> None:
    page = outline_of(tmp_path)
    assert page.open == []
    assert "not finished" in page.text
    for name in ("config.yaml", "plan.json", "metrics.jsonl", "summary.json", "promises.json"):
        assert f"{name} is not there" in page.text
    assert "samples.jsonl" not in page.text
    assert page.text.count("No values in metrics.jsonl") == 4


def test_a_crashed_run_shows_what_it_got_to(tmp_path: Path) -> None:
    folder = write_run_folder(tmp_path)
    for name in ("summary.json", "promises.json"):
        (folder / name).unlink()
    metrics = folder / "metrics.jsonl"
    metrics.write_text(metrics.read_text()[:20_000])
    (folder / "ledger.json").write_text('{"sources": [')
    page = outline_of(folder)
    run = read_run(folder)
    assert 50 < run.training[-1]["step"] < STEPS
    assert f"{run.training[-1]['step']} of {STEPS}" in page.text
    assert "metrics.jsonl: 1 damaged line(s) left out" in page.text
    assert "ledger.json is damaged (line 1" in page.text
    assert "not finished" in page.text
    assert len(page.all("figure")) == 4


@pytest.mark.parametrize(
    "content", ["", "null", "[]", "3", '"text"', "{", "[1, 2]", '{"sources": 3, "epochs": 4}', "\xff"]
)
def test_files_of_the_wrong_kind_break_nothing(content: str, tmp_path: Path) -> None:
    folder = write_run_folder(tmp_path)
    for path in list(folder.iterdir()):
        path.write_bytes(content.encode("latin-1"))
    assert outline_of(folder).open == []


def test_values_of_the_wrong_kind_break_nothing(tmp_path: Path) -> None:
    folder = write_run_folder(tmp_path)
    rows = [
        {"step": 1, "loss": None, "grad_norm": "x"},
        {"step": "2", "loss": 1.0},
        {"step": 3, "loss": [1]},
        {"loss": 2},
    ]
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4, "loss": NaN}\n'
    )
    (folder / "summary.json").write_text(json.dumps({**dict.fromkeys(summary(1), "x"), "measures": {"a": 3}}))
    (folder / "samples.jsonl").write_text('{"prompt": "plain", "before": null}\n{"prompt": [3, null]}\n{}\n')
    (folder / "promises.json").write_text('[{"numbers": [1]}, {}]')
    (folder / "ledger.json").write_text('{"sources": [{"dropped": {"a": 3}, "held_out": 3}, 4]}')
    (folder / "plan.json").write_text('{"epochs": [3, {"steps_executed": "x"}, {}], "total_steps": "many"}')
    assert outline_of(folder).open == []


def test_a_step_written_twice_counts_once() -> None:
    rows: list[dict[str, Any]] = [
        {"step": 1, "loss": 3.0},
        {"step": 2, "loss": 2.0},
        {"event": "resume", "step": 1},
        {"step": 2, "loss": 1.5},
        {"step": 2, "eval_a_loss": 1.0},
        {"step": 2, "eval_b_loss": 2.0},
    ]
    training, evaluations, events = split_metrics(rows)
    assert [row["loss"] for row in training] == [3.0, 1.5]
    assert evaluations == [{"step": 2, "eval_a_loss": 1.0, "eval_b_loss": 2.0}]
    assert [event["event"] for event in events] == ["resume"]


def test_path_has_gaps_where_values_are_not_finite() -> None:
    axis = Axis(0.0, 10.0, False, [])
    line = Series("a", [0, 5, 10], [0.0, math.nan, 10.0])
    assert path_data(line, axis, axis) == "M0.0 1000.0M1000.0 0.0"
    whole = Series("a", [0, 5, 10], [0.0, 5.0, 10.0])
    assert path_data(whole, axis, axis) == "M0.0 1000.0L500.0 500.0L1000.0 0.0"
    points = Series("a", [0, 10], [0.0, 5.0], "points")
    assert path_data(points, axis, axis) == "M0.0 1000.0h0M1000.0 500.0h0"


def test_log_scale_is_taken_and_named_only_when_asked_for() -> None:
    wide = Series("loss", list(range(9)), [10.0 ** (-i / 2) for i in range(9)])
    assert "log scale" in figure(Chart("loss", "Loss", [wide]))
    assert "log scale" not in figure(Chart("loss", "Loss", [wide], "linear"))
    assert "log scale" not in figure(Chart("loss", "Loss", [Series("loss", [1, 2, 3], [3.0, 2.0, 1.0])]))


def test_charts_of_a_run(tmp_path: Path) -> None:
    run = read_run(write_run_folder(tmp_path))
    charts = {chart.identifier: chart for chart in run_charts(run)}
    assert [s.label for s in charts["loss"].series] == ["training", "smoothed", "held out"]
    assert list(charts["loss"].marks) == [91.0]
    assert [len(s.x) for s in charts["throughput"].series] == [STEPS, STEPS]
    several = RunFiles("a", evaluations=[{"step": 1, "eval_x_loss": 1.0, "eval_y_loss": 2.0}])
    assert [s.label for s in run_charts(several)[0].series][1:] == ["held out: x", "held out: y"]
    assert epoch_ends({"epochs": [{"steps_executed": 3}] * 30}) == []


def test_a_long_run_stays_a_small_page(tmp_path: Path) -> None:
    folder = write_run_folder(tmp_path, steps=20_000)
    assert write_report(folder).stat().st_size < 1_000_000


def test_cards_come_from_metrics_where_there_is_no_summary(tmp_path: Path) -> None:
    folder = write_run_folder(tmp_path)
    (folder / "summary.json").unlink()
    run = read_run(folder)
    cards = {card.title: card for card in run_cards(run)}
    assert (cards["Held-out loss"].before, cards["Held-out loss"].value) == ("1.34", "0.13")
    assert cards["Steps"].value == "182 of 182"
    assert cards["Time"].value == "5 min 00 s"
    assert run_state(run) == ("fail", "not finished")
    assert run_state(RunFiles("a", summary={"steps": 3}, plan={"total_steps": 9})) == ("", "ended early")
    assert run_state(RunFiles("a", summary={"steps": 9}, plan={"total_steps": 9})) == ("pass", "finished")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (4.26, "4.3 s"),
        (61, "1 min 01 s"),
        (3599.7, "1 h 00 min"),
        (7500, "2 h 05 min"),
        (273_600, "3 d 4 h"),
        (math.nan, "–"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_ledger_totals_are_those_of_the_training_data() -> None:
    page = Outline(ledger_section(LEDGER))
    assert "All training data" in page.text
    assert "81,210" in page.text
    assert "dropped, too long: 4 rows, 1,452 tokens (first: simple.jsonl row 17, simple.jsonl row 203)" in page.text
    assert "simple.jsonl (evaluation)" in page.text
    widths = [float((i["style"] or "").removeprefix("width:").rstrip("%")) for i in page.all("i") if "style" in i]
    assert sum(widths) == pytest.approx(100, abs=0.01)
    assert ledger_section({}).count("<tr>") == 1


def test_answers_mark_what_equals_the_reference() -> None:
    page = Outline(samples_section(SAMPLES))
    assert page.text.count("After ✓ same as the reference") == 4
    assert [a["class"] for a in page.all("div") if a.get("class") == "answer match"] == ["answer match"] * 4
    assert "2 more" in page.text


def test_config_sets_keys_and_origins_apart() -> None:
    text = 'a: "x # y"  # run.yaml:3\nurl: x#y\n  - b: 1  # default\n# Heading\n'
    markup = config_section(text)
    assert Outline(markup).text.endswith(text.rstrip("\n"))
    assert '<span class="o"># run.yaml:3</span>' in markup
    assert '<span class="k">url</span>: x#y\n' in markup
    assert markup.count('class="d"') == 1
    assert ' open=""' in markup
    assert ' open=""' not in config_section("a: 1\n" * 100)


def test_saves_share_a_line() -> None:
    saves = [{"event": "save", "step": step, "time": 1.0} for step in (10, 20)]
    assert "10, 20" in events_section(saves)
    assert "Details" not in events_section(saves)
    assert "reason nan" in events_section([*saves, {"event": "skip", "step": 11, "reason": "nan"}])


def test_values_in_words() -> None:
    assert plain({"min": 3, "is_on": True, "left": [1, None]}) == "min 3 · is on yes · left 1, –"
    assert plain("0a" * 32) == "0a0a0a0a0a0a…"
    assert "Some key" in facts({"some_key": 12_345})
    assert "12,345" in facts({"some_key": 12_345})


def test_markup_pieces() -> None:
    assert escape("<a href='x'>&\ud800") == "&lt;a href=&#x27;x&#x27;&gt;&amp;�"
    assert element("td", "x", class_="n", aria_hidden="true", title=None) == '<td class="n" aria-hidden="true">x</td>'
    assert '<td class="n">2</td>' in table(["a", "b"], [[Markup("1"), Markup("2")]], numeric_from=1)
    block = data_block("d", {"a": "</script>&", "b": None})
    assert block.count("<") == 2
    assert json.loads(block[block.index(">") + 1 : block.rindex("<")]) == {"a": "</script>&", "b": None}
