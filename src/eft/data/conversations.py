"""Conversations → ids and labels, with masks that come from the template's structure.

The whole text is tokenised once, so the ids are those of `apply_chat_template`; a token is trained where its characters
overlap a trained span.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from eft.core.errors import DataError
from eft.core.records import TokenSample
from eft.data.alignment import escaped, exact_offsets, foreign_specials, labelled, special_text
from eft.data.fast_tokenizer import FastTokenizer
from eft.data.formats import Example
from eft.data.masks import MaskRules, renderings
from eft.data.seen import HISTORY, SPECIAL_TEXT
from eft.data.skeletons import Skeletons, Text
from eft.data.token_facts import TokenizerFacts
from eft.data.turns import Layout, Span, UnprovableError

__all__ = ["NOT_UNICODE", "ConversationEncoder", "MaskRules", "Outcome", "Rejected", "is_unicode"]

NOT_UNICODE = "has half of a character (a lone surrogate), so its text is not valid Unicode"


@dataclass(frozen=True)
class Rejected:
    """An example that gives no sample, and why; the reason does not repeat the file and row."""

    reason: str


Outcome = TokenSample | Rejected | tuple[TokenSample, ...]
"""What became of one row: its sample, why there is none, or several samples in order."""


@dataclass(slots=True)
class _Piece:
    """A text to tokenise, with its trained spans and the places that are tokenised as plain text."""

    text: Text
    literals: list[Span]


class ConversationEncoder:
    """Encodes the conversations of one data set; keeps what it learns of the template from one call to the next.

    Args:
        tokenizer: a fast tokenizer.
        template: the Jinja text.
        rules: what is trained.

    Raises:
        DataError: the tokenizer gives no character offsets (it is not a fast one), or lacks one of `eot_tokens`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str, rules: MaskRules) -> None:
        if not tokenizer.is_fast:
            kind = type(tokenizer).__name__
            raise DataError(f"the tokenizer {kind} gives no character offsets; expected a fast tokenizer")
        self._tokenizer, self._template, self._rules = tokenizer, template, rules
        self._facts = TokenizerFacts(tokenizer, rules.eot_tokens)
        self._skeletons = Skeletons(tokenizer, template, rules, self._facts)
        self.met: set[str] = set()
        """SPECIAL_TEXT and HISTORY, where the last call met them."""

    def __call__(self, examples: Sequence[Example]) -> list[Outcome]:
        """Ids and labels of many conversations, tokenised in one call.

        The ids equal `apply_chat_template(tokenize=True)`: the template writes its own BOS and nothing is added.
        Trained are the turns that the rules and the rows' own marks choose: for the assistant what it must generate
        (from the end of the generation prompt, tool calls and reasoning included), for other roles the text of the
        turn; end tokens by `train_on_eos` and `train_on_eot`.

        Returns:
            one outcome per example, in order; Rejected where the template refuses the conversation, where a span cannot
            be proven or where the template leaves out a part of a trained turn.
        """
        found: list[list[_Piece] | Rejected] = []
        self.met = set()
        for example in examples:
            try:
                found.append(self._pieces(example))
            except UnprovableError as error:
                found.append(Rejected(str(error)))
                self.met.add(HISTORY)
        samples = iter(self._tokenised([each for part in found if isinstance(part, list) for each in part]))
        return [part if isinstance(part, Rejected) else _gathered([next(samples) for _ in part]) for part in found]

    def _pieces(self, example: Example) -> list[_Piece]:
        texts = self._skeletons.texts(example)
        pieces = self._rendered(example) if texts is None else [_Piece(text, []) for text in texts]
        for piece in pieces:
            if not is_unicode(piece.text.text):
                raise UnprovableError(NOT_UNICODE)
            if piece.text.is_part:
                self.met.add(HISTORY)
        return pieces

    def _rendered(self, example: Example) -> list[_Piece]:
        """The conversation rendered by itself."""
        assert example.messages is not None
        layout = Layout(self._tokenizer, self._template, example.messages, example.tools, self._facts)
        if not is_unicode(layout.text):
            raise UnprovableError(NOT_UNICODE)
        rules, literal = self._rules, special_text(example.messages, example.tools, self._facts)
        if literal is not None:
            self.met.add(SPECIAL_TEXT)
        if literal is not None and rules.refuses:
            place, token = literal
            raise UnprovableError(
                f"{place} has the text of the special token {token!r}, which servers turn into that token; set "
                "`special_tokens_in_content: escape` to train it as plain text, `keep` to train it as the token"
            )
        return [
            _Piece(
                Text(each.layout.text, each.spans, each.is_part),
                foreign_specials(each.layout) if literal is not None and rules.escapes else [],
            )
            for each in renderings(layout, example.marks, rules)
        ]

    def _tokenised(self, pieces: list[_Piece]) -> list[TokenSample | Rejected]:
        whole = iter(self._labelled([piece.text for piece in pieces if not piece.literals]))
        samples: list[TokenSample | Rejected] = []
        for piece in pieces:
            try:
                samples.append(self._escaped(piece) if piece.literals else next(whole))
            except UnprovableError as error:
                samples.append(Rejected(str(error)))
        return samples

    def _labelled(self, texts: list[Text]) -> list[TokenSample]:
        """The samples of texts that are tokenised as they stand."""
        found: list[TokenSample | None] = [None] * len(texts)
        if isinstance(self._tokenizer, FastTokenizer):
            spans = [text.spans for text in texts]
            found = self._tokenizer.labelled([text.text for text in texts], spans, self._facts)
        rest = [text for text, ours in zip(texts, found, strict=True) if ours is None]
        encoded: Iterator[Any] = iter(())
        if rest:
            batch = self._tokenizer(
                [text.text for text in rest],
                add_special_tokens=False,
                return_offsets_mapping=True,
                return_attention_mask=False,
                verbose=False,
            )
            encoded = zip(batch["input_ids"], batch["offset_mapping"], strict=True)
        return [
            self._aligned(text, *next(encoded)) if ours is None else ours
            for text, ours in zip(texts, found, strict=True)
        ]

    def _escaped(self, piece: _Piece) -> TokenSample:
        return self._aligned(piece.text, *escaped(self._tokenizer, piece.text.text, piece.literals, self._facts))

    def _aligned(self, text: Text, ids: Any, offsets: Any) -> TokenSample:
        return labelled(ids, exact_offsets(ids, offsets, text.text, self._facts), text.spans, self._facts)


def is_unicode(text: str) -> bool:
    """Whether the text can be written as UTF-8: no tokenizer takes it otherwise."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _gathered(samples: list[TokenSample | Rejected]) -> Outcome:
    """The samples of one row; one that was rejected rejects them all."""
    rejected = next((sample for sample in samples if isinstance(sample, Rejected)), None)
    if rejected is not None:
        return rejected
    kept = tuple(sample for sample in samples if isinstance(sample, TokenSample))
    return kept[0] if len(kept) == 1 else kept
