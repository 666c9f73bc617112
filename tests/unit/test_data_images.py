"""Rows with images: ids as the processor gives them, labels on text alone, and a message for whatever is wrong."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from eft.config.load import config_from_mapping
from eft.config.root import TrainConfig
from eft.core.constants import IGNORE_INDEX
from eft.core.errors import ConfigError, DataError
from eft.data.image_prepare import prepare_images
from eft.data.image_rows import ImageSample
from eft.data.image_set import ImageCollator
from eft.data.images import ImageRef, ImageSize, open_image
from eft.data.prepare import PreparedData
from tests.tiny_vision import IMAGE_TOKENS, LISTS_TEMPLATE, PARTS_TEMPLATE, tiny_idefics_processor, tiny_processor

PROCESSOR = tiny_processor()
RED, BLUE = (200, 10, 10), (10, 10, 200)


def picture(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (40, 30)) -> Path:
    Image.new("RGB", size, colour).save(path)
    return path


def picture_bytes(colour: tuple[int, int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), colour).save(buffer, "PNG")
    return buffer.getvalue()


def row_with(part: Any, *, text: str = "what is this?", answer: str = "hello world", **columns: Any) -> dict[str, Any]:
    content = [part, {"type": "text", "text": text}]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}], **columns}


def in_parts(content: Any) -> list[dict[str, Any]]:
    """As transformers' own template takes it."""
    parts = [content] if isinstance(content, str) else content
    return [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]


def config_of(folder: Path, rows: list[dict[str, Any]] | None = None, **keys: Any) -> TrainConfig:
    path = folder / "rows.jsonl"
    if rows is not None:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "base_model": "none",
        "output_dir": "none",
        "learning_rate": 1e-3,
        "processor_type": "AutoProcessor",
        "datasets": [{"path": str(path), "type": "chat_template"}],
        "dataset_prepared_path": str(folder / "prepared"),
        "shuffle_merged_datasets": False,
    }
    return config_from_mapping({**values, **keys})


def prepared(folder: Path, rows: list[dict[str, Any]], processor: Any = PROCESSOR, **keys: Any) -> PreparedData:
    return prepare_images(config_of(folder, rows, **keys), processor)


def samples(folder: Path, rows: list[dict[str, Any]], processor: Any = PROCESSOR, **keys: Any) -> list[ImageSample]:
    train = prepared(folder, rows, processor, **keys).train
    found = [train.sample(index) for index in range(len(train))]
    assert all(isinstance(sample, ImageSample) for sample in found)
    return found  # type: ignore[return-value]


def trained_text(sample: ImageSample) -> str:
    return str(PROCESSOR.tokenizer.decode(sample.input_ids[sample.labels != IGNORE_INDEX]))


@pytest.mark.parametrize("template", [PARTS_TEMPLATE, LISTS_TEMPLATE])
def test_ids_are_the_processors_own_and_only_the_answer_is_trained(tmp_path: Path, template: str) -> None:
    processor = tiny_processor(template)
    path = picture(tmp_path / "red.png", RED)
    red = {"type": "image", "path": str(path)}
    rows = [
        row_with(red),
        row_with({"type": "text", "text": "no image here: "}),
        {
            "messages": [
                {"role": "system", "content": "You are a helpful assistant."},
                {"role": "user", "content": [red, "and", red]},
                {"role": "assistant", "content": "one two"},
                {"role": "user", "content": [{"type": "text", "text": "and this "}, red]},
                {"role": "assistant", "content": "three"},
            ]
        },
    ]
    found = samples(tmp_path, rows, processor)
    for sample, row in zip(found, rows, strict=True):
        turns = [{**turn, "content": in_parts(turn["content"])} for turn in row["messages"]]
        theirs = processor.apply_chat_template(turns, tokenize=True, return_dict=True)
        ids = np.array(theirs["input_ids"]).reshape(-1)
        assert sample.input_ids.tolist() == ids.tolist()
        assert int((ids == processor.image_token_id).sum()) == IMAGE_TOKENS * len(sample.images)
        assert not np.any(sample.labels == processor.image_token_id)
        trained = sample.labels != IGNORE_INDEX
        assert np.array_equal(sample.labels[trained], sample.input_ids[trained])
    texts = [trained_text(sample) for sample in found]
    assert texts == ["hello world<|im_end|>", "hello world<|im_end|>", "one two<|im_end|>three<|im_end|>"]


def test_a_processor_that_cuts_images_into_a_grid(tmp_path: Path) -> None:
    """Its replacement of a placeholder has other special tokens and line breaks, none of which is trained either."""
    processor = tiny_idefics_processor()
    red, blue = picture(tmp_path / "red.png", RED, (60, 40)), picture(tmp_path / "blue.png", BLUE, (40, 90))
    turns = [
        {"role": "user", "content": [{"type": "image", "path": str(red)}, "what?"]},
        {"role": "assistant", "content": "red\n one"},
        {"role": "user", "content": ["and ", {"type": "image", "path": str(blue)}]},
        {"role": "assistant", "content": "blue"},
    ]
    (sample,) = samples(tmp_path, [{"messages": turns}], processor)
    theirs = processor.apply_chat_template(
        [{**turn, "content": in_parts(turn["content"])} for turn in turns], tokenize=True, return_dict=True
    )
    assert sample.input_ids.tolist() == np.array(theirs["input_ids"]).reshape(-1).tolist()
    assert int((sample.input_ids == processor.image_token_id).sum()) == 8 * 4, "two images of four parts"
    trained = sample.labels != IGNORE_INDEX
    assert processor.tokenizer.decode(sample.input_ids[trained]) == "red\n one<|im_end|>blue<|im_end|>"
    (everything,) = samples(tmp_path, [{"messages": turns}], processor, train_on_inputs=True)
    text = (
        "<|im_start|>user:what?<|im_end|>\n<|im_start|>assistant:red\n one<|im_end|>\n<|im_start|>user:and <|im_end|>"
    )
    kept = everything.input_ids[everything.labels != IGNORE_INDEX]
    assert processor.tokenizer.decode(kept) == text + "\n<|im_start|>assistant:blue<|im_end|>\n"
    batch = ImageCollator(processor, ImageSize(), 0)([[sample], [sample]])
    assert batch["pixel_values"].shape[:2] == (2, 8)
    assert batch["extra_inputs"] == ("pixel_values", "pixel_attention_mask")


def test_image_tokens_are_never_trained_whatever_is_asked_for(tmp_path: Path) -> None:
    picture(tmp_path / "red.png", RED)
    row = row_with({"type": "image", "path": "red.png"})
    (everything,) = samples(tmp_path, [row], train_on_inputs=True)
    assert np.array_equal(everything.labels == IGNORE_INDEX, everything.input_ids == PROCESSOR.image_token_id)
    spec = [{"path": str(tmp_path / "rows.jsonl"), "type": "chat_template", "roles_to_train": ["user"]}]
    (user,) = samples(tmp_path, [row], datasets=spec)
    assert trained_text(user) == "\nwhat is this?<|im_end|>"


@pytest.mark.parametrize("kind", ["path", "url", "data", "base64", "openai", "column", "placeholder", "hf", "bytes"])
def test_every_way_to_give_an_image_is_the_same_sample(tmp_path: Path, kind: str) -> None:
    content = picture_bytes(RED)
    (tmp_path / "red.png").write_bytes(content)
    (expected,) = samples(tmp_path, [row_with({"type": "image", "path": str(tmp_path / "red.png")})])
    text = base64.b64encode(content).decode()
    rows = {
        "path": row_with({"type": "image", "path": "red.png"}),
        "url": row_with({"type": "image", "url": (tmp_path / "red.png").as_uri()}),
        "data": row_with({"type": "image", "url": f"data:image/png;base64,{text}"}),
        "base64": row_with({"type": "image", "base64": text}),
        "openai": row_with({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{text}"}}),
        "column": row_with({"type": "image"}, images=["red.png"]),
        "placeholder": {
            "messages": [
                {"role": "user", "content": "<image>what is this?"},
                {"role": "assistant", "content": "hello world"},
            ],
            "image": "red.png",
        },
        "hf": row_with({"type": "image"}, images=[{"bytes": None, "path": "red.png"}]),
    }
    if kind == "bytes":
        row = row_with({"type": "image"}, images=[{"bytes": content, "path": None}])
        row["messages"][1]["content"] = [{"type": "text", "text": "hello world"}]
        pq.write_table(pa.Table.from_pylist([row]), tmp_path / "rows.parquet")
        spec = [{"path": str(tmp_path / "rows.parquet"), "type": "chat_template"}]
        train = prepare_images(config_of(tmp_path, datasets=spec), PROCESSOR).train
        (found,) = [train.sample(0)]
    else:
        (found,) = samples(tmp_path, [rows[kind]])
    assert isinstance(found, ImageSample)
    assert found.text == expected.text
    assert np.array_equal(found.input_ids, expected.input_ids)
    assert np.array_equal(found.labels, expected.labels)
    (one,), (other,) = found.images, expected.images
    assert np.array_equal(np.array(open_image(one, ImageSize())), np.array(open_image(other, ImageSize())))


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (row_with({"type": "image", "path": "gone.png"}), ["turn 1, image 1", "there is no file", "gone.png"]),
        (row_with({"type": "image", "path": "text.png"}), ["turn 1, image 1", "text.png is no image"]),
        (row_with({"type": "image", "path": "cut.png"}), ["turn 1, image 1", "cut.png cannot be read as an image"]),
        (row_with({"type": "image", "base64": "!!"}), ["turn 1, image 1", "not base64"]),
        (row_with({"type": "image", "url": "https://x.y/z.png"}), ["turn 1, image 1", "on the network"]),
        (row_with({"type": "image"}), ["turn 1, image 1", "names no file"]),
        (row_with({"type": "image"}, images=["red.png", "red.png"]), ["1 of its images stand in no turn"]),
        (row_with({"type": "image", "path": 3}), ["turn 1, image 1", "is a int"]),
        (row_with({"type": "image", "path": {}}), ["turn 1, image 1", "has no fields"]),
        (row_with({"type": "video", "path": "red.png"}), ["turn 1", "parts of type video"]),
        (row_with({"type": "text", "text": "an <image> in the text"}), ["special token '<image>'"]),
        (row_with({"type": "text", "text": "\ufdd0"}), ["turn 1", "U+FDD0"]),
        ({"messages": "no list"}, ["'messages'"]),
    ],
)
def test_what_is_wrong_with_an_image_is_said_with_row_and_turn(
    tmp_path: Path, row: dict[str, Any], words: list[str]
) -> None:
    picture(tmp_path / "red.png", RED)
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "cut.png").write_bytes(picture_bytes(RED)[:60])
    good = row_with({"type": "image", "path": "red.png"})
    with pytest.raises(DataError) as error:
        samples(tmp_path, [good, row])
    assert "rows.jsonl row 2" in str(error.value)
    assert all(word in str(error.value) for word in words), str(error.value)
    data = prepared(tmp_path, [good, row], malformed_rows="drop")
    assert len(data.train) == 1
    (account,) = data.ledger.sources
    assert account.dropped["malformed"].rows == 1
    assert words[-1] in account.dropped["malformed"].first_rows[0]


def test_the_ledger_counts_image_tokens_and_what_is_too_long(tmp_path: Path) -> None:
    picture(tmp_path / "red.png", RED)
    rows = [
        row_with({"type": "image", "path": "red.png"}),
        row_with({"type": "image", "path": "red.png"}, text="one " * 90),
    ]
    data = prepared(tmp_path, rows, sequence_len=64)
    (account,) = data.ledger.sources
    account.check()
    assert account.dropped["too_long"].rows == 1
    assert account.trainable + account.context == len(data.train.sample(0).input_ids)
    with pytest.raises(DataError, match=r"row 2: \d+ tokens, those of its images included, exceed sequence_len 64"):
        prepared(tmp_path, rows, sequence_len=64, excess_length_strategy="raise")


def test_rows_that_differ_in_their_pixels_alone_are_different_rows(tmp_path: Path) -> None:
    picture(tmp_path / "red.png", RED)
    picture(tmp_path / "blue.png", BLUE)
    rows = [row_with({"type": "image", "path": name}) for name in ("red.png", "blue.png", "red.png")]
    test = tmp_path / "test.jsonl"
    test.write_text(json.dumps(rows[0]) + "\n")
    data = prepared(tmp_path, rows, test_datasets=[{"path": str(test), "type": "chat_template"}])
    assert len(data.train) == 1, "both red ones are held out, the blue one stays"
    assert data.ledger.of("train")[0].dropped["held_out_duplicate"].rows == 2


def test_images_are_resized_as_asked(tmp_path: Path) -> None:
    path = picture(tmp_path / "red.png", RED, (40, 20))
    ref = ImageRef(str(path), "here")
    assert open_image(ref, ImageSize()).size == (40, 20)
    square = open_image(ref, ImageSize(30, "lanczos"))
    assert square.size == (30, 30)
    assert square.getpixel((15, 0)) == (0, 0, 0), "padded, not stretched"
    assert open_image(ref, ImageSize((7, 9))).size == (7, 9)


def test_a_batch_has_pixels_for_its_images_and_labels_for_its_text(tmp_path: Path) -> None:
    picture(tmp_path / "red.png", RED)
    picture(tmp_path / "blue.png", BLUE)
    rows = [
        row_with({"type": "image", "path": "red.png"}),
        row_with("no image"),
        row_with({"type": "image", "path": "blue.png"}),
    ]
    found = samples(tmp_path, rows)
    collator = ImageCollator(PROCESSOR, ImageSize(), PROCESSOR.tokenizer.pad_token_id)
    batch = collator([[sample] for sample in found])
    assert batch["extra_inputs"] == ("pixel_values",)
    assert batch["pixel_values"].shape == (2, 3, 28, 28)
    assert "position_ids" not in batch
    assert batch["num_tokens"] == sum(len(sample.input_ids) for sample in found)
    for row, sample in enumerate(found):
        assert batch["input_ids"][row, : len(sample.input_ids)].tolist() == sample.input_ids.tolist()
        assert batch["shift_labels"][row, : len(sample.labels) - 1].tolist() == sample.labels[1:].tolist()
    alone = PROCESSOR(text=[found[2].text], images=[[open_image(found[2].images[0], ImageSize())]], return_tensors="pt")
    assert torch.equal(batch["pixel_values"][1], alone["pixel_values"][0])
    assert collator([])["extra_inputs"] == (), "the dummy has no image"


def test_an_image_that_goes_missing_later_is_named(tmp_path: Path) -> None:
    path = picture(tmp_path / "red.png", RED)
    (sample,) = samples(tmp_path, [row_with({"type": "image", "path": "red.png"})])
    path.unlink()
    with pytest.raises(DataError, match=r"rows\.jsonl row 1, turn 1, image 1: there is no file"):
        ImageCollator(PROCESSOR, ImageSize(), 0)([[sample]])


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"sample_packing": True}, ["sample_packing", "rows with images cannot be packed"]),
        ({"streaming": True, "max_steps": 3}, ["streaming", "processor_type"]),
        ({"excess_length_strategy": "truncate"}, ["excess_length_strategy", "cannot be cut"]),
        ({"image_size": [1, 2, 3]}, ["image_size", "[width, height]"]),
        ({"datasets": [{"path": "x", "type": "alpaca"}]}, ["processor_type", "chat_template"]),
        ({"processor_type": None, "image_size": 28}, ["image_size", "processor_type"]),
        ({"image_resize_algorithm": "lanczos"}, ["image_resize_algorithm", "image_size"]),
    ],
)
def test_what_images_do_not_go_with_is_said_by_name(tmp_path: Path, keys: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        config_of(tmp_path, **keys)
    assert all(word in str(error.value) for word in words), str(error.value)
