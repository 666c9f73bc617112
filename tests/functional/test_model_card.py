"""The model card of a run and of a merge: what it says, what it must not say, and which files it leaves alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from eft import run
from eft.models import model_card
from eft.models.model_card import CARD_FILE, OTHER_CARD_FILE, RECEIPT_FILE, license_of, read_receipt, write_card
from eft.models.verify_export import manifest_problems
from tests.functional.conftest import MakeConfig
from tests.functional.test_merge_command import app

TOKEN = "hf_" + "aB3dE5gH7jK9" * 3
LORA: dict[str, Any] = {"adapter": "lora", "lora_target_linear": True}


def _card(folder: Path) -> tuple[dict[str, Any], str]:
    card = ModelCard.load(folder / CARD_FILE)
    return card.data.to_dict(), card.text


def _assert_nothing_private(folder: Path, *places: Path | str) -> None:
    for name in (CARD_FILE, RECEIPT_FILE):
        text = (folder / name).read_text()
        for secret in (TOKEN, str(Path.home()), str(Path.cwd()), *map(str, places)):
            assert secret not in text, f"{secret} in {name}"


@pytest.mark.parametrize("keys", [{}, LORA], ids=["full", "lora"])
def test_the_card_of_a_run(
    keys: dict[str, Any],
    make_config: MakeConfig,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Absolute paths (base, rows, output, inside a text) and a token are in the config, and a secret that the
    environment holds."""
    monkeypatch.setenv("HF_TOKEN", "a-secret-of-the-environment")
    remark = f"{{# {TOKEN} a-secret-of-the-environment /srv/private/rows.jsonl #}}"
    planted = {"chat_template": "jinja", "chat_template_jinja": f"{tokenizer.chat_template}{remark}"}
    config = make_config(max_steps=3, logging_steps=1, val_set_size=4, **keys, **planted)
    run.train(config)
    out = Path(config.output_dir)
    data, text = _card(out)
    assert data["library_name"] == ("peft" if keys else "transformers")
    assert data["tags"] == ["eft", "sft", *(["lora"] if keys else [])]
    assert "base_model" not in data  # a folder here means nothing to the hub
    assert "datasets" not in data
    for part in (
        "## How to load",
        "## Results",
        "## Data",
        "## The run, checked",
        "## Config",
        "max_steps: 3",
        "rows.jsonl",
    ):
        assert part in text, part
    assert "| steps | 3 (finished) |" in text
    assert "E6 COMPLETE" in text
    rows, base = Path(config.datasets[0].path).parent, Path(config.base_model)
    _assert_nothing_private(out, "a-secret-of-the-environment", "/srv", tmp_path, base, rows)
    receipt = read_receipt(out)
    assert len(receipt["data"]["sha256"]["training data"]) == 64
    assert {promise["status"] for promise in receipt["promises"]} <= {"pass", "not applicable"}
    assert manifest_problems(out) == []
    (out / CARD_FILE).unlink()
    assert manifest_problems(out) == [], "the card is outside the checksums"


def test_the_card_of_a_merge(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(max_steps=3, **LORA)
    run.train(config)
    done = CliRunner().invoke(app, [config.output_dir])
    assert done.exit_code == 0, done.output
    merged = Path(config.output_dir) / "merged"
    data, text = _card(merged)
    assert data["library_name"] == "transformers"
    for part in (
        "## The merge, checked",
        "## The run, checked",
        "max_steps: 3",
        "AutoModelForCausalLM.from_pretrained",
    ):
        assert part in text, part
    _assert_nothing_private(merged, tmp_path, Path(config.base_model))
    assert manifest_problems(merged) == []
    (Path(config.output_dir) / RECEIPT_FILE).unlink()
    assert CliRunner().invoke(app, [config.output_dir, "--overwrite"]).exit_code == 0
    assert "## The run, checked" not in _card(merged)[1]


RECEIPT = {
    "title": "x",
    "content": "adapter",
    "adapter": "lora",
    "auto_class": "AutoModelForCausalLM",
    "base_model": {"name": "org/base", "license": "apache-2.0", "revision": "main"},
    "data": {"sources": [], "hub": ["org/rows"], "sha256": {}},
    "versions": {},
    "code": "",
}


def test_what_the_hub_reads(tmp_path: Path) -> None:
    write_card(tmp_path, RECEIPT)
    data, text = _card(tmp_path)
    assert data["base_model"] == "org/base"
    assert data["base_model_relation"] == "adapter"
    assert data["license"] == "apache-2.0"
    assert data["datasets"] == ["org/rows"]
    assert 'from_pretrained("org/base", revision="main")' in text


def test_a_card_of_somebody_else_stays(tmp_path: Path) -> None:
    """Written by hand, or edited since; eft's own is written anew."""
    path = tmp_path / CARD_FILE
    write_card(tmp_path, RECEIPT)
    assert write_card(tmp_path, {**RECEIPT, "title": "again"}) == path
    assert "# again" in path.read_text()
    for text in ("mine\n", path.read_text().replace("# again", "# My model")):
        path.write_text(text)
        assert write_card(tmp_path, RECEIPT) == tmp_path / OTHER_CARD_FILE
        assert path.read_text() == text
        (tmp_path / OTHER_CARD_FILE).unlink()


def test_licences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert license_of(None) is None
    assert license_of(str(tmp_path)) is None
    for text in (
        "no front matter",
        "---\nlicense: {: broken\n---\n",
        "---\n- a list\n---\n",
        "---\nlicense: [mit]\n---\n",
    ):
        (tmp_path / CARD_FILE).write_text(text)
        assert license_of(str(tmp_path)) is None
    (tmp_path / CARD_FILE).write_text("---\nlicense: mit\n---\nx")
    assert license_of(str(tmp_path)) == "mit"
    monkeypatch.setattr(model_card, "hf_hub_download", lambda *_, **__: str(tmp_path / CARD_FILE))
    assert license_of("org/base") == "mit"

    def offline(*_: Any, **__: Any) -> str:
        raise OSError("no network")

    monkeypatch.setattr(model_card, "hf_hub_download", offline)
    assert license_of("org/base") is None


def test_a_resumed_run_writes_its_own_card_anew(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(max_steps=2)
    run.train(config)
    first = (tmp_path / "out" / CARD_FILE).read_text()
    run.train(config, overwrite=True)
    assert (tmp_path / "out" / CARD_FILE).read_text().startswith(first[:60])
    assert not (tmp_path / "out" / OTHER_CARD_FILE).exists()
    assert json.loads((tmp_path / "out" / RECEIPT_FILE).read_text())["results"]["steps"] == "2 (finished)"
