"""`eft data report` in a real browser, and the worst rows that a stopped run prints."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from eft.cli import app
from tests.chromium import Page, executable, new_page
from tests.tiny import CHATML, tiny_tokenizer


def run_command(*args: str) -> int:
    with pytest.raises(SystemExit) as caught:
        app.main(list(args))
    assert isinstance(caught.value.code, int)
    return caught.value.code


def write_run(folder: Path, **keys: Any) -> Path:
    """Conversations of which one is held out too, but for its case, and a config."""
    import yaml

    tokenizer = tiny_tokenizer("{{ '<script>' if false else '' }}" + CHATML)
    tokenizer.save_pretrained(folder / "model")
    (folder / "model" / "config.json").write_text('{"model_type": "llama"}')
    rows = [
        [
            {"role": "user", "content": f"What is <b>{index}</b>? " + "one two " * (index % 30)},
            {"role": "assistant", "content": f"It is {index}. " + "three " * (index % 40)},
        ]
        for index in range(60)
    ]
    held_out = [[{**turn, "content": turn["content"].upper()} for turn in rows[7]], rows[5][:1] + rows[6][1:]]
    for name, conversations in (("rows", rows), ("held_out", held_out)):
        text = "".join(json.dumps({"messages": messages}) + "\n" for messages in conversations)
        (folder / f"{name}.jsonl").write_text(text)
    config = {
        "base_model": str(folder / "model"),
        "datasets": [{"path": str(folder / "rows.jsonl"), "type": "chat_template"}],
        "test_datasets": [{"path": str(folder / "held_out.jsonl"), "type": "chat_template"}],
        "dataset_prepared_path": str(folder / "prepared"),
        "output_dir": str(folder / "out"),
        "learning_rate": 1e-4,
        "num_epochs": 1,
        "sequence_len": 256,
        **keys,
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def test_preprocess_stops_and_prints_the_worst_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_run(tmp_path)
    assert run_command("preprocess", str(config)) == 2
    error = capsys.readouterr().err
    assert "leaks: eval: 1 of 2 held-out samples" in error
    assert "rows.jsonl row 8: " in error
    assert "«It is 7. three" in error
    assert "data_gate_limits: {leaks: …}" in error
    assert run_command("preprocess", str(config), "data_gates=warn", "--show", "1") == 0
    output = capsys.readouterr()
    assert "Data gates" in output.out
    assert "<|im_start|>assistant" in output.out
    assert "leaks: eval: 1 of 2" in output.err


pytestmark_browser = pytest.mark.skipif(executable() is None, reason="no chromium: `apt-get install chromium`")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    config = write_run(tmp_path_factory.mktemp("data"))
    assert run_command("data", "report", str(config)) == 0
    with new_page(tmp_path_factory.mktemp("profile")) as page:
        page.resize(1200, 900)
        page.open((config.parent / "out" / "data.html").as_uri())
        yield page


@pytest.mark.browser
@pytestmark_browser
def test_every_section_is_there(page: Page) -> None:
    assert page.run("[...document.querySelectorAll('section')].map((part) => part.id)") == [
        "gates",
        "lengths",
        "roles",
        "tokens",
        "plan",
        "samples",
        "stores",
    ]
    first: list[str] = page.run(
        "[...document.querySelectorAll('#gates tbody tr:first-child td')].map((c) => c.innerText)"
    )
    assert first[0].startswith("leaks")
    assert "rows.jsonl row 8: a row of eval has the same text" in first[0]
    assert first[1:] == ["eval", "over", "1 of 2", "50 %", "1 %"]
    heights: list[float] = page.run(
        "[...document.querySelectorAll('.bars i')].map((b) => b.getBoundingClientRect().height)"
    )
    assert 200 < max(heights) < 215
    assert len(heights) > 20
    assert page.run("[...document.querySelectorAll('#roles tbody tr')].length") == 4
    assert "<b>" in page.run("document.querySelector('#samples pre').innerText")
    colours = (
        "[...document.querySelectorAll('#samples pre .t')].map((part) => getComputedStyle(part).textDecorationLine)"
    )
    assert set(page.run(colours)) == {"underline"}


@pytest.mark.browser
@pytestmark_browser
@pytest.mark.parametrize("width", [1200, 400])
@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_and_follows_the_colour_scheme(page: Page, width: int, dark: bool) -> None:
    page.resize(width, 844, dark=dark)
    assert page.run("document.documentElement.scrollWidth") <= width
    ground: str = page.run("getComputedStyle(document.body).backgroundColor")
    brightness = sum(int(part) for part in ground.removeprefix("rgb(").rstrip(")").split(","))
    assert (brightness < 120) if dark else (brightness > 600)
    assert page.complaints == []
    assert [address for address in page.requests if not address.startswith("data:")] == [page.run("location.href")]
