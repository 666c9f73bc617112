"""Samples in the terminal: colours where there are any, marks where there are none."""

from __future__ import annotations

import io
import re

import numpy as np
from rich.console import Console

from eft.cli.rows import print_rows, row_text
from eft.core.records import ShownRow, TokenSample
from eft.data.gates_openings import openings_pattern
from eft.data.shown import shown_row
from tests.tiny import tiny_tokenizer

ROW = ShownRow(
    "data.jsonl row 1: 9 tokens, 4 trained",
    [
        ("<|im_start|>", "special"),
        ("user\n", "header"),
        ("Hi[b]", "context"),
        ("Ja", "trained"),
        ("<|im_end|>", "trained special"),
    ],
    "headers: what is wrong",
)


def printed(**options: object) -> str:
    file = io.StringIO()
    print_rows(Console(file=file, width=100, **options), [ROW])  # type: ignore[arg-type]
    return file.getvalue()


def test_without_colours_what_is_trained_stands_between_marks() -> None:
    for options in ({}, {"force_terminal": True, "no_color": True}):
        text = printed(**options)
        assert "<|im_start|>user\nHi[b]«Ja<|im_end|>»" in re.sub(r"\x1b\[[0-9;]*m", "", text)
        assert "data.jsonl row 1: 9 tokens, 4 trained" in text
        assert "headers: what is wrong" in text
    assert "\x1b" not in printed()


def test_with_colours_every_kind_has_its_own() -> None:
    text = printed(force_terminal=True, color_system="standard")
    assert "\x1b[4;32mJa" in text
    assert "«" not in text
    styles = {str(span.style) for span in row_text(ROW, plain=False).spans}
    assert styles == {"magenta", "cyan", "dim", "green underline", "bold green underline"}


def test_a_sample_is_cut_into_pieces_of_one_kind() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\none two<|im_end|>\n")["input_ids"]
    labels = np.array(ids, dtype=np.int32)
    at = [index for index, number in enumerate(ids) if number == tokenizer.eos_token_id]
    text = tokenizer("one two")["input_ids"]
    labels[: at[1] - len(text)] = -100
    labels[at[1] + 1 :] = -100
    sample = TokenSample(np.array(ids, dtype=np.int32), labels)
    row = shown_row("x row 1", sample, tokenizer, openings=openings_pattern(tokenizer))
    assert row.title == f"x row 1: {len(ids)} tokens, {len(text) + 1} trained"
    assert row.pieces == [
        ("<|im_start|>", "header"),
        ("user\n", "header"),
        ("hello", "context"),
        ("<|im_end|>", "special"),
        ("\n", "context"),
        ("<|im_start|>", "header"),
        ("assistant\n", "header"),
        ("one two", "trained"),
        ("<|im_end|>", "trained special"),
        ("\n", "context"),
    ]
    short = shown_row("x row 1", sample, tokenizer, most_tokens=4)
    assert f"… {len(ids) - 4} tokens …" in "".join(text for text, _ in short.pieces)
