"""report.html in a real browser: curves are drawn, the read-out works, nothing is asked of the network."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from eft.report.page import write_report
from tests.chromium import Page, executable, new_page
from tests.run_folder import STEPS, write_run_folder

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(executable() is None, reason="no chromium: `apt-get install chromium`"),
]

CURVES = """[...document.querySelectorAll("figure.chart")].map((chart) => ({
  name: chart.id,
  curves: [...chart.querySelectorAll("path.curve")].map((path) => {
    const box = path.getBoundingClientRect(), style = getComputedStyle(path);
    return {
      look: path.getAttribute("class"), width: box.width, height: box.height, stroke: style.stroke,
      points: (path.getAttribute("d").match(/[ML]/g) || []).length, length: path.getTotalLength(),
    };
  }),
  labels: [...chart.querySelectorAll(".ys span, .xs span")].map((label) => label.textContent),
}))"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    folder = write_run_folder(tmp_path_factory.mktemp("report") / "run")
    with new_page(tmp_path_factory.mktemp("profile")) as page:
        page.resize(1280, 900)
        page.open(write_report(folder).as_uri())
        yield page


def legend(page: Page, chart: str) -> list[str]:
    values: list[str] = page.run(f"[...document.querySelectorAll('#{chart} .legend b')].map((b) => b.textContent)")
    return values


def test_curves_are_drawn(page: Page) -> None:
    charts: list[dict[str, Any]] = page.run(CURVES)
    assert [chart["name"] for chart in charts] == ["loss", "learning-rate", "grad-norm", "throughput"]
    for chart in charts:
        lines = [curve for curve in chart["curves"] if "points" not in curve["look"] and "through" not in curve["look"]]
        assert lines, chart["name"]
        for curve in lines:
            assert curve["points"] == STEPS, chart["name"]
            assert curve["width"] > 250, chart["name"]
            assert curve["height"] > 5, chart["name"]
            assert curve["length"] > 500, chart["name"]
            assert curve["stroke"] not in ("none", "rgba(0, 0, 0, 0)"), chart["name"]
        assert len(chart["labels"]) >= 6, chart["name"]
    points = next(curve for curve in charts[0]["curves"] if "points" in curve["look"])
    assert points["points"] == 8


def test_hovering_reads_every_chart_at_one_step(page: Page) -> None:
    at_rest = legend(page, "loss")
    box = page.run(
        "(({left, top, width}) => [left, top, width])(document.querySelector('#loss .area').getBoundingClientRect())"
    )
    page.move_mouse(box[0] + box[2] / 2, box[1] + 40)
    where = "[...document.querySelectorAll('figure .where')].map((place) => place.textContent)"
    assert page.run(where) == ["· step 91"] * 4
    assert legend(page, "loss") != at_rest
    assert page.run("[...document.querySelectorAll('.cursor')].every((cursor) => !cursor.hidden)")
    page.move_mouse(2, 2)
    assert page.run(where) == [""] * 4
    assert legend(page, "loss") == at_rest


def test_the_keyboard_moves_the_read_out(page: Page) -> None:
    page.run("document.querySelector('#grad-norm .area').focus()")
    page.run(
        "document.activeElement.dispatchEvent(new KeyboardEvent('keydown', {key: 'End', cancelable: true})), "
        "document.activeElement.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowLeft', cancelable: true})), 0"
    )
    assert page.run("document.querySelector('#grad-norm .where').textContent") == f"· step {STEPS - 1}"
    page.run("document.activeElement.blur()")


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_fits_and_follows_the_colour_scheme(page: Page, width: int, dark: bool) -> None:
    page.resize(width, 844, dark=dark)
    assert page.run("document.documentElement.scrollWidth") <= width
    ground: str = page.run("getComputedStyle(document.body).backgroundColor")
    brightness = sum(int(part) for part in ground.removeprefix("rgb(").rstrip(")").split(","))
    assert (brightness < 120) if dark else (brightness > 600)
    outside = """[...document.querySelectorAll(".plot span")].filter((label) => {
      const box = label.getBoundingClientRect();
      return box.left < 0 || box.right > innerWidth || box.width === 0;
    }).length"""
    assert page.run(outside) == 0


def test_injected_script_does_not_run(page: Page) -> None:
    """The policy of the page allows our script alone; were text ever to become markup, it would still be inert."""
    before = len(page.complaints)
    page.run(
        "(() => { const script = document.createElement('script'); script.textContent = 'window.injected = 1';"
        " document.body.append(script); })()"
    )
    assert page.run("typeof window.injected") == "undefined"
    refused = page.complaints[before:]
    del page.complaints[before:]
    assert any("Content Security Policy" in complaint for complaint in refused)


def test_no_console_error_and_no_request_left_the_page(page: Page) -> None:
    """Last in the file, so that it judges everything that was done above."""
    assert page.complaints == []
    assert [address for address in page.requests if not address.startswith("data:")] == [page.run("location.href")]
