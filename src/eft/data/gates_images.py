"""Rows with images for the gates: their ids without what stands for images, and what the processor makes of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from eft.core.records import Message
from eft.data.block_set import BlockSet
from eft.data.encoded import StoredSample, encode_samples
from eft.data.formats import Example
from eft.data.formats.example import MARK
from eft.data.image_rows import ImageSample, PartsTokenizer
from eft.data.image_set import ImageSet
from eft.data.images import ImageRef, ImageSize, open_image
from eft.data.turns import RENDER_ERRORS


@dataclass(frozen=True)
class ImageGate:
    """What the gates need of a data set with images beside its samples."""

    processor: Any
    samples: Sequence[ImageSample]
    size: ImageSize
    placeholders: frozenset[int]
    """Special tokens that stand for images."""

    def renderer(self, template: str) -> PartsTokenizer:
        """Renders texts by a template that may insist on parts."""
        return PartsTokenizer(self.processor.tokenizer, template)

    def compared(
        self, chosen: Sequence[tuple[int, dict[str, Any]]], template: str, *, may_split: bool
    ) -> Iterator[tuple[int, str | None]]:
        """(sample, what differs or None) for each (sample, conversation): its ids must be those of the processor's
        `apply_chat_template(tokenize=True)`, for the whole or, where `may_split`, up to one of the assistant's turns.
        """
        renderer = self.renderer(template)
        for index, conversation in chosen:
            sample, messages = self.samples[index], conversation["messages"]
            ends = [len(messages)]
            if may_split:
                ends += [n for n in range(len(messages) - 1, 0, -1) if messages[n - 1]["role"] == "assistant"]
            found = (
                self._ids(renderer, messages[:end], conversation["tools"], sample.images, template) for end in ends
            )
            same = any(ids is not None and np.array_equal(ids, sample.input_ids) for ids in found)
            yield index, None if same else "apply_chat_template of the processor gives other ids"

    def _ids(
        self, renderer: PartsTokenizer, messages: list[Message], tools: Any, images: Sequence[ImageRef], template: str
    ) -> Any:
        if sum(message["content"].count(MARK) for message in messages) != len(images):
            return None  # the sample shows another part of the conversation
        refs = iter(images)
        filled: list[Any] = []
        for message in messages:
            content = renderer.shaped(message["content"])
            for part in content if isinstance(content, list) else ():
                if part["type"] == "image":
                    part["image"] = open_image(next(refs), self.size)
            filled.append({**message, "content": content})
        try:
            encoded = self.processor.apply_chat_template(
                filled, tools=tools, chat_template=template, tokenize=True, return_dict=True
            )
        except RENDER_ERRORS:
            return None
        return np.array(encoded["input_ids"]).reshape(-1)


def gated_images(samples: ImageSet, examples: Sequence[Example]) -> BlockSet:
    """The samples with the conversations of their rows, for `gates_survey`; equal where text and pixels are."""
    stored = [
        StoredSample(int(row), 0, sample, _conversation(example, pixels))
        for row, sample, example, pixels in zip(samples.row_ids, samples.samples, examples, samples.pixels, strict=True)
    ]
    return BlockSet(encode_samples(samples.group_names[0], stored), samples.origins, samples.sample_digests)


def _conversation(example: Example, pixels: bytes) -> bytes:
    """With the hash of its images, so that equal texts about other images differ."""
    content = {"messages": example.messages, "tools": example.tools, "pixels": pixels.hex()}
    return json.dumps(content, default=str).encode()
