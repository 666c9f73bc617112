"""Conversations with images → ids and labels, through the processor's own template, placeholders and tokenizer.

The text is rendered and its trained spans are proven as those of any conversation. The processor then writes as many
placeholder tokens for each image as the model will see, and says where: spans move along, placeholders are not trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from transformers import PreTrainedTokenizerBase

from eft.core.constants import IGNORE_INDEX
from eft.core.errors import DataError
from eft.core.records import TokenSample
from eft.data.alignment import exact_offsets, labelled, special_text
from eft.data.formats import Example
from eft.data.formats.example import MARK
from eft.data.images import ImageRef, ImageSize, open_image
from eft.data.masks import MaskRules, renderings
from eft.data.token_facts import TokenizerFacts
from eft.data.turns import RENDER_ERRORS, Layout, RewrittenError, Span, UnprovableError


@dataclass(slots=True)
class ImageSample(TokenSample):
    """A row after tokenisation, with what the processor needs to make its pixels again."""

    text: str = ""
    """The rendered conversation, one placeholder for each image."""
    images: tuple[ImageRef, ...] = ()


class PartsTokenizer:
    """The tokenizer as `Layout` asks it to render: for the template every MARK in a turn's text is an image part.

    Templates of vision-language models differ in whether they take a plain text for a turn without images.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str) -> None:
        self._tokenizer = tokenizer
        self._takes_text = self._shows_text(template)

    def apply_chat_template(self, messages: list[Any], *, chat_template: str, **options: Any) -> Any:
        """As the tokenizer's, of `messages` whose content is text."""
        shaped = [{**message, "content": self.shaped(message["content"])} for message in messages]
        return self._tokenizer.apply_chat_template(shaped, chat_template=chat_template, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, text: Any, **options: Any) -> Any:
        return self._tokenizer(text, **options)

    def shaped(self, content: str) -> Any:
        """A turn's content as the template takes it: the text, or a list of its parts."""
        if MARK not in content and self._takes_text:
            return content
        parts: list[dict[str, str]] = []
        for number, text in enumerate(content.split(MARK)):
            if number:
                parts.append({"type": "image"})
            if text:
                parts.append({"type": "text", "text": text})
        return parts

    def _shows_text(self, template: str) -> bool:
        probe = [{"role": "user", "content": "eftprobe"}]
        try:
            text = self._tokenizer.apply_chat_template(probe, chat_template=template, tokenize=False)
        except RENDER_ERRORS:
            return False
        return "eftprobe" in cast("str", text)


class _ImageLayout(Layout):
    """A rendered conversation in which MARK stands for what the template writes of an image."""

    def up_to(self, turn: int) -> Layout:
        return _ImageLayout(self.tokenizer, self.template, self.messages[: turn + 1], self.tools, self.facts)

    def require_written(self, turn: int, span: Span) -> None:
        message = self.messages[turn]
        if MARK not in message["content"]:
            super().require_written(turn, span)
            return
        written = "".join(self.text[span.start : span.stop].split())
        if not all("".join(part.split()) in written for part in message["content"].split(MARK)):
            raise self.refuse(turn, "the template leaves out or rewrites its text beside the images", RewrittenError)


class ImageRowEncoder:
    """Encodes conversations with images, one by one."""

    def __init__(self, processor: Any, template: str, rules: MaskRules, size: ImageSize) -> None:
        """`processor`: one of transformers' that has a tokenizer and an image processor."""
        if rules.escapes:
            raise DataError("special_tokens_in_content: escape is not offered for rows with images; use error or keep")
        self.processor = processor
        self._template = template
        self._rules = rules
        self._size = size
        self._facts = TokenizerFacts(processor.tokenizer, rules.eot_tokens)
        self._renderer = PartsTokenizer(processor.tokenizer, template)
        self.placeholders: set[int] = set()
        """Special tokens that were written for images so far."""

    def __call__(self, example: Example, images: Sequence[ImageRef]) -> list[ImageSample]:
        """The samples of a row: one, or several where the template rewrites history.

        Raises UnprovableError where no label would be right, DataError for an image that cannot be read.
        """
        assert example.messages is not None
        tokenizer = cast("PreTrainedTokenizerBase", self._renderer)
        layout = _ImageLayout(tokenizer, self._template, example.messages, example.tools, self._facts)
        literal = special_text(example.messages, example.tools, self._facts) if self._rules.refuses else None
        if literal is not None:
            place, token = literal
            raise UnprovableError(
                f"{place} has the text of the special token {token!r}; give images as parts ({{'type': 'image'}}), and "
                "set `special_tokens_in_content: keep` to train it as the token"
            )
        samples = []
        for each in renderings(layout, example.marks, self._rules):
            shown = sum(message["content"].count(MARK) for message in each.layout.messages)
            samples.append(self._sample(each.layout.text, each.spans, images[:shown]))
        return samples

    def _sample(self, text: str, spans: list[Span] | None, images: Sequence[ImageRef]) -> ImageSample:
        token = self.processor.image_token
        if text.count(token) != len(images):
            raise UnprovableError(
                f"the chat template writes {text.count(token)} image placeholders ({token}) for {len(images)} images; "
                "choose the template of the processor"
            )
        pixels = [open_image(ref, self._size) for ref in images]
        encoded = process(self.processor, [text], [pixels], return_offsets_mapping=True)
        ids, offsets = encoded["input_ids"][0], encoded["offset_mapping"][0]
        replaced = encoded["text_replacement_offsets"][0] if images else []
        expanded = _expanded(text, replaced)
        moved = None if spans is None else [_moved(span, replaced) for span in spans]
        characters = np.array(exact_offsets(ids, offsets, expanded, self._facts), dtype=np.int64).reshape(-1, 2)
        sample = labelled(ids, characters, moved, self._facts)
        for each in replaced:
            start, stop = each["new_span"]
            inside = (characters[:, 0] < stop) & (characters[:, 1] > start)
            sample.labels[inside] = IGNORE_INDEX
            self.placeholders.update(np.intersect1d(sample.input_ids[inside], self._facts.special_ids).tolist())
        return ImageSample(sample.input_ids, sample.labels, sample.weights, text, tuple(images))


def process(processor: Any, texts: list[str], images: list[list[Any]], **options: Any) -> Any:
    """What the processor makes of rendered texts and their images: as its own `apply_chat_template` does, BOS is added
    where the template wrote none."""
    bos = processor.tokenizer.bos_token
    adds_bos = bos is None or not texts[0].startswith(bos)
    return processor(
        text=texts,
        images=images if any(images) else None,
        add_special_tokens=adds_bos,
        return_text_replacement_offsets=True,
        **options,
    )


def _expanded(text: str, replaced: list[dict[str, Any]]) -> str:
    for each in reversed(replaced):
        start, stop = each["span"]
        text = text[:start] + each["replacement"] + text[stop:]
    return text


def _moved(span: Span, replaced: list[dict[str, Any]]) -> Span:
    """The span in the text in which placeholders were replaced."""

    def moved(position: int) -> int:
        grown = (len(each["replacement"]) - len(each["text"]) for each in replaced if each["span"][1] <= position)
        return position + sum(grown)

    return Span(moved(span.start), moved(span.stop), span.weight)
