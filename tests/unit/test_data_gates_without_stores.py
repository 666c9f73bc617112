"""The gates where there is no store: the first rows of a stream and its held-out data, and rows with images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from eft.core.errors import DataGateError
from eft.data.gates import GateReport, pass_gates
from eft.data.image_prepare import prepare_images
from eft.data.image_set import ImageSet
from eft.data.sample_set import TokenView
from eft.data.stream_prepare import prepare_stream
from tests.tiny import CHATML, tiny_tokenizer
from tests.tiny_vision import IDEFICS_TEMPLATE, LISTS_TEMPLATE, PARTS_TEMPLATE, tiny_idefics_processor, tiny_processor
from tests.unit.test_data_gates import chats, conversation, given, parts_of, write
from tests.unit.test_data_images import BLUE, RED, config_of, picture, row_with
from tests.unit.test_data_stream import config_of as stream_config

HEADER_INSIDE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ '<|im_start|>assistant\n' }}"
    "{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EFT_CACHE", str(tmp_path / "cache"))


def stopped(match: str) -> Any:
    return pytest.raises(DataGateError, match=rf"(?s)over the limit of.*  {match}")


# ---- streams ----


def streamed(
    folder: Path,
    rows: list[dict[str, Any]],
    template: str = CHATML,
    *,
    type: str = "chat_template",
    held_out: list[dict[str, Any]] | None = None,
    **keys: Any,
) -> GateReport:
    datasets = [{"path": write(folder / "rows.jsonl", rows), "type": type}]
    if held_out is not None:
        keys["test_datasets"] = [{"path": write(folder / "held_out.jsonl", held_out), "type": type}]
    config, tokenizer = stream_config([], datasets=datasets, sequence_len=256, **keys), tiny_tokenizer(template)
    report = pass_gates(config, prepare_stream(config, tokenizer), tokenizer)
    assert report is not None
    return report


def test_clean_streams_pass_all_gates(tmp_path: Path) -> None:
    held_out = [{"messages": conversation(index)} for index in range(100, 104)]
    report = streamed(tmp_path, chats(), held_out=held_out)
    assert report.over == []
    assert report.unlocated == {}
    assert (report.compared, report.conversations) == (24, 24)
    assert {result.source for result in report.results} == {
        "rows (its first block)",
        "held_out (evaluation)",
        "eval",
    }
    assert {result.gate for result in report.results} >= {"headers", "template", "duplicates", "leaks"}


def test_a_fault_of_the_template_stops_a_stream(tmp_path: Path) -> None:
    with stopped(r"headers: rows \(its first block\): 20 of 20 samples") as caught:
        streamed(tmp_path, chats(), HEADER_INSIDE)
    assert "rows.jsonl row 1: " in caught.value.rows[0].title


def test_a_fault_of_given_labels_stops_a_stream(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    rows = [given([(text, True) for text, _ in parts_of(conversation(i))], tokenizer) for i in range(20)]
    with stopped(r"fully_trained: rows \(its first block\): 20 of 20"):
        streamed(tmp_path, rows, type="pretokenized")


def test_rows_without_anything_to_train_stop_a_stream(tmp_path: Path) -> None:
    rows = [{"messages": conversation(i)[: 3 if i % 2 else 2]} for i in range(20)]
    with stopped(r"untrained_rows: rows \(its first block\): 10 of 20 rows"):
        streamed(tmp_path, rows)


def test_duplicates_and_leaks_in_a_streams_first_rows(tmp_path: Path) -> None:
    with stopped(r"duplicates: rows \(its first block\): 10 of 30"):
        streamed(tmp_path, [*chats(), *chats(10)])
    shouted = [{**turn, "content": turn["content"].upper()} for turn in conversation(3)]
    held_out = [{"messages": shouted}, *({"messages": conversation(index)} for index in range(100, 104))]
    with stopped(r"leaks: eval: 1 of 5 held-out samples"):
        streamed(tmp_path, chats(), held_out=held_out)
    copies = [{"messages": conversation(index)} for index in (3, 100, 101)]
    report = streamed(tmp_path, chats(), held_out=copies)
    (leaks,) = [result for result in report.results if result.gate == "leaks"]
    assert (leaks.faulty, leaks.note) == (0, "1 exact copies were left out of training")


def test_a_fault_of_the_held_out_rows_stops_a_stream(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    good = [given(parts_of(conversation(i)), tokenizer) for i in range(20)]
    bad = [given([(text, True) for text, _ in parts_of(conversation(i))], tokenizer) for i in range(100, 110)]
    with stopped(r"fully_trained: held_out \(evaluation\): 10 of 10"):
        streamed(tmp_path, good, type="pretokenized", held_out=bad)


# ---- rows with images ----


def with_images(folder: Path, count: int = 10, colour: tuple[int, int, int] = RED) -> list[dict[str, Any]]:
    """Conversations of two rounds, an image in the first question and every other time in the second."""
    name = f"{colour[0]}-{colour[2]}.png"
    picture(folder / name, colour)
    rows = []
    for index in range(count):
        row = row_with({"type": "image", "path": name}, text=f"What is number {index}?", answer=f"It is {index}.")
        more: list[Any] = [{"type": "image", "path": name}] if index % 2 else []
        row["messages"] += [
            {"role": "user", "content": [*more, {"type": "text", "text": "Are you sure?"}]},
            {"role": "assistant", "content": f"Yes, {index} it is."},
        ]
        rows.append(row)
    return rows


def judged(folder: Path, rows: list[dict[str, Any]], processor: Any = None, **keys: Any) -> GateReport:
    processor = processor or tiny_processor()
    config = config_of(folder, rows, **keys)
    report = pass_gates(config, prepare_images(config, processor), processor.tokenizer)
    assert report is not None
    return report


@pytest.mark.parametrize("name", [PARTS_TEMPLATE, LISTS_TEMPLATE, IDEFICS_TEMPLATE], ids=["parts", "lists", "idefics"])
def test_clean_rows_with_images_pass_all_gates(tmp_path: Path, name: str) -> None:
    processor = tiny_idefics_processor() if name == IDEFICS_TEMPLATE else tiny_processor(name)
    report = judged(tmp_path, with_images(tmp_path), processor, val_set_size=2)
    assert report.over == []
    assert report.unlocated == {}
    assert report.compared == 10
    states = {result.gate: result.status for result in report.results}
    assert states["headers"] == states["other_roles"] == states["end_tokens"] == states["template"] == "pass"
    assert states["duplicates"] == states["leaks"] == "pass"
    trained = {role for role, (_, count) in report.roles["rows"].items() if count}
    assert trained == {"assistant"}


@pytest.mark.parametrize(
    ("gate", "text", "is_trained"),
    [
        ("headers: rows: 10 of 10 samples", "<|im_start|>assistant\n", True),
        ("other_roles: rows: 10 of 10 samples", "Are you sure?", True),
        ("end_tokens: rows: 20 of 20 trained turns", "<|im_end|>", False),
    ],
)
def test_a_wrong_mask_of_rows_with_images(tmp_path: Path, gate: str, text: str, is_trained: bool) -> None:
    processor, config = tiny_processor(), config_of(tmp_path, with_images(tmp_path))
    prepared = prepare_images(config, processor)
    assert prepared.gated is not None
    (entry,) = prepared.gated.entries
    wrong = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    for index in range(len(entry.store)):
        sample = entry.store.sample(index)
        ids = sample.input_ids.tolist()
        for start in (at for at in range(len(ids)) if ids[at : at + len(wrong)] == wrong):
            sample.labels[start : start + len(wrong)] = wrong if is_trained else -100
    with stopped(gate) as caught:
        pass_gates(config, prepared, processor.tokenizer)
    assert "rows.jsonl row 1: " in caught.value.rows[0].title


def test_copies_and_leaks_go_by_text_and_pixels(tmp_path: Path) -> None:
    red, blue = with_images(tmp_path), with_images(tmp_path, colour=BLUE)
    assert judged(tmp_path, [*red, *blue]).over == []
    with stopped("duplicates: rows: 10 of 20 samples"):
        judged(tmp_path, [*red, *red])
    held_out = {"path": str(tmp_path / "held_out.jsonl"), "type": "chat_template"}
    for row in blue:
        row["messages"][1]["content"] = row["messages"][1]["content"].upper()
    write(tmp_path / "held_out.jsonl", blue)
    assert judged(tmp_path, red, test_datasets=[held_out]).over == []
    with stopped("leaks: eval: 10 of 10 held-out samples"):
        judged(tmp_path, with_images(tmp_path, colour=BLUE), test_datasets=[held_out])


def test_ids_that_are_not_the_processors_own(tmp_path: Path) -> None:
    processor, config = tiny_processor(), config_of(tmp_path, with_images(tmp_path))
    prepared = prepare_images(config, processor)
    assert isinstance(prepared.train, TokenView)
    (images,) = prepared.train.bases
    assert isinstance(images, ImageSet)
    images.samples[4].input_ids[-3] += 1
    with stopped("template: rows: 1 of 10 conversations") as caught:
        pass_gates(config, prepared, processor.tokenizer, compare_all=True)
    assert "rows.jsonl row 5" in str(caught.value)
    assert "apply_chat_template of the processor gives other ids" in str(caught.value)
