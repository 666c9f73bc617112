"""What leaves the machine with a model: no secrets, no absolute paths; everything else as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eft.core.redaction import redact, redacted

TOKEN = "hf_" + "aB3dE5gH7jK9" * 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"see {TOKEN}.", "see ***."),
        ("https://me:pa55@host/rows.jsonl", "https://***@host/rows.jsonl"),
        (f"https://{TOKEN}@host/rows.jsonl", "https://***@host/rows.jsonl"),
        ("s3://bucket/rows.jsonl?X-Amz-Signature=0123abc&x=1", "s3://bucket/rows.jsonl"),
        ("read /srv/data/rows.jsonl row 3, (/tmp/x)", "read …/rows.jsonl row 3, (…/x)"),
        ("file:///srv/data/rows.jsonl", "…/rows.jsonl"),
        (r"C:\Users\me\rows.jsonl", "…/rows.jsonl"),
        ("~/rows/rows.jsonl", "…/rows.jsonl"),
        (f"{Path.cwd()}/data/rows.jsonl", "…/rows.jsonl"),
        (f"{Path.cwd()}", "…"),
        ("ghp_" + "a" * 30, "***"),
        ("key sk-proj-" + "b" * 20, "key ***"),
    ],
)
def test_texts(text: str, expected: str) -> None:
    assert redacted(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "org/model",
        "data/rows.jsonl",
        "../rows.jsonl",
        "https://huggingface.co/org/model",
        "s3://bucket/a/rows.jsonl",
        "</s>",
        "and/or/not",
        r".*layers\.\d+\.mlp",
        "1.2 tokens/s, 3/4",
        "<|im_end|>",
    ],
)
def test_what_stays(text: str) -> None:
    assert redacted(text) == text
    assert redact(text) == text


def test_values() -> None:
    value = {
        "path": "/home/of me/my rows.jsonl",
        "n": 3,
        "list": ["/a", None, True],
        "api_key": "x",
        "pad_token": "<p>",
    }
    assert redact(value) == {
        "path": "…/my rows.jsonl",
        "n": 3,
        "list": ["…/a", None, True],
        "api_key": "***",
        "pad_token": "<p>",
    }


def test_the_environment_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "just-words-here")
    monkeypatch.setenv("SOME_VALUE", "other words")
    assert redacted("a just-words-here b other words") == "a *** b other words"


@given(st.lists(st.text(st.characters(categories=["L", "N"]), min_size=1), min_size=2, max_size=6), st.text())
def test_no_folder_of_an_absolute_path_stays(parts: list[str], before: str) -> None:
    shown = redact("/" + "/".join(parts))
    assert shown == "…/" + parts[-1] or shown.endswith("***")
    again = redacted(redacted(before))
    assert again == redacted(before)
