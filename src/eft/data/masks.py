"""Which characters of a conversation are trained, and with what weight: by role, by turn, by part of a turn.

A conversation whose template shows earlier turns otherwise than when they were written becomes several renderings: each
trained turn belongs to exactly one of them, in which the text before it is what the model would be given there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from eft.config.data import DataConfig, DatasetConfig, EndTokens
from eft.data.formats import UNMARKED, TurnMark
from eft.data.turns import Layout, Span, UnprovableError, has_generation_tag

_EMPTY_REASONING = re.compile(r"\s*(?:<think>)?\s*</think>\s*")


@dataclass(frozen=True)
class MaskRules:
    """What is trained in the conversations of one data set."""

    roles_to_train: frozenset[str] = frozenset({"assistant"})
    last_turn_only: bool = False
    train_on_eos: EndTokens = "turn"
    train_on_eot: EndTokens = "turn"
    train_on_inputs: bool = False
    splits_history: bool = True
    escapes: bool = False
    """Text of special tokens in the row is tokenised as plain text; else see `refuses`."""
    refuses: bool = True
    """A row that contains the text of a special token is refused."""
    eot_tokens: tuple[str, ...] | None = None
    follows_tags: bool = False
    """What the template's `{% generation %}` tags mark is trained."""

    @classmethod
    def of(cls, spec: DatasetConfig, cfg: DataConfig, template: str = "") -> MaskRules:
        """The rules that the keys of an entry, and the global ones, mean. Reads only those that decide something.

        A template's `{% generation %}` tags count where the user asks for nothing else than what is trained by default.
        """
        in_content = spec.special_tokens_in_content
        chosen = cfg.train_on_inputs if spec.train_on_inputs is None else spec.train_on_inputs
        escapes, refuses = in_content == "escape", in_content == "error"
        if chosen:
            return cls(frozenset(), train_on_inputs=True, escapes=escapes, refuses=refuses)
        eot = spec.train_on_eos if spec.train_on_eot is None else spec.train_on_eot
        asks_nothing = spec.roles_to_train == ["assistant"] and spec.train_on_eos == eot == "turn"
        asks_nothing = asks_nothing and cfg.eot_tokens is None
        return cls(
            frozenset(spec.roles_to_train),
            spec.turns_to_train == "last",
            spec.train_on_eos,
            eot,
            splits_history=spec.rewritten_history == "split",
            eot_tokens=None if cfg.eot_tokens is None else tuple(cfg.eot_tokens),
            follows_tags=asks_nothing and has_generation_tag(template) and spec.generation_tags == "follow",
            escapes=escapes,
            refuses=refuses,
        )


@dataclass(frozen=True)
class Rendering:
    """A text to tokenise, and the spans of it that are trained; None: all of it."""

    layout: Layout
    spans: list[Span] | None
    is_part: bool = False
    """The conversation up to some turn, as its template rewrites history."""


def renderings(layout: Layout, marks: tuple[TurnMark, ...] | None, rules: MaskRules) -> list[Rendering]:
    """The conversation as it is trained: one rendering, or several where the template rewrites history.

    Raises:
        UnprovableError: a span cannot be proven, or the row and the config contradict each other.
    """
    if rules.train_on_inputs:
        if marks is not None and any(mark.train is not None or mark.parts for mark in marks):
            raise UnprovableError("says which of its parts are trained, where `train_on_inputs` trains everything")
        weight = {mark.weight for mark in marks or ()} - {1.0}
        if weight:
            raise UnprovableError("has turns of different weight, where `train_on_inputs` trains everything")
        return [Rendering(layout, None)]
    return _Conversation(layout, marks or (UNMARKED,) * len(layout.messages), rules).renderings()


def _own_start(layout: Layout, turn: int) -> int:
    """Where the model starts to write this turn, past a block of reasoning that the template opened or closed for a
    turn that has none: training on it would teach not to think."""
    start = layout.generation_start(turn)
    message = layout.messages[turn]
    if message.get("reasoning_content") or message["content"].lstrip().startswith(("<think>", "</think>")):
        return start
    empty = _EMPTY_REASONING.match(layout.text, start)
    return empty.end() if empty else start


@dataclass(frozen=True)
class _Conversation:
    layout: Layout
    marks: tuple[TurnMark, ...]
    rules: MaskRules

    def renderings(self) -> list[Rendering]:
        trained = self._trained_turns()
        spans: list[Span] = []
        left: list[int] = []
        for turn in trained:
            try:
                spans += self._turn_spans(self.layout, turn, is_last=turn == trained[-1])
            except UnprovableError as error:
                if not self._may_stand_alone(turn):
                    raise self._with_remedy(error) from error
                left.append(turn)
        spans += self._end_tokens_of_others(trained)
        if self.rules.follows_tags and not left and not any(mark != UNMARKED for mark in self.marks):
            spans += self._other_tags(spans)
        apart = self._apart(left, trained[-1]) if left else []
        return [*apart, Rendering(self.layout, spans)] if spans or not apart else apart

    def _trained_turns(self) -> list[int]:
        trained = [
            turn
            for turn, (message, mark) in enumerate(zip(self.layout.messages, self.marks, strict=True))
            if self._base(message["role"], mark) or any(part.train for part in mark.parts)
        ]
        return trained[-1:] if self.rules.last_turn_only else trained

    def _base(self, role: str, mark: TurnMark) -> bool:
        """Whether the turn as such is trained."""
        if mark.train is not None:
            return mark.train and mark.weight > 0
        return role in self.rules.roles_to_train and mark.weight > 0

    def _may_stand_alone(self, turn: int) -> bool:
        messages = self.layout.messages
        return self.rules.splits_history and messages[turn]["role"] == "assistant" and turn < len(messages) - 1

    def _with_remedy(self, error: UnprovableError) -> UnprovableError:
        remedy = "choose another `chat_template`"
        if not self.rules.splits_history:
            remedy = f"set `rewritten_history: split`, or {remedy}"
        return type(error)(f"{error}; {remedy}")

    def _apart(self, left: list[int], last_trained: int) -> list[Rendering]:
        """The turns that the whole conversation does not show as they were written: each in the shortest one that does,
        with those before it that it shows too."""
        found: list[Rendering] = []
        while left:
            layout = self.layout.up_to(left[-1])
            spans: list[Span] = []
            still_left: list[int] = []
            for turn in left:
                try:
                    spans += self._turn_spans(layout, turn, is_last=turn == last_trained)
                except UnprovableError as error:
                    if turn == left[-1]:
                        raise self._with_remedy(error) from error
                    still_left.append(turn)
            found.append(Rendering(layout, spans, is_part=True))
            left = still_left
        return found[::-1]

    def _other_tags(self, spans: list[Span]) -> list[Span]:
        """What the template's tags mark beside the turns of the assistant."""
        if self.rules.last_turn_only:
            return []
        known = {(span.start, span.stop) for span in spans}
        return [span for span in self.layout.tagged if (span.start, span.stop) not in known]

    # ---- one turn ----

    def _turn_spans(self, layout: Layout, turn: int, *, is_last: bool) -> Iterator[Span]:
        """The trained characters of one turn; proven in `layout` before the first one is given."""
        mark = self.marks[turn]
        message = layout.messages[turn]
        stop, end = layout.ends(turn)
        is_assistant = message["role"] == "assistant"
        start = _own_start(layout, turn) if is_assistant else layout.text_start(turn)
        layout.require_written(turn, Span(start, stop))
        if is_assistant:
            layout.require_as_written(turn, stop, end)
        if is_assistant and self.rules.follows_tags and mark.train is None and not mark.parts:
            last = stop if end is None else end.stop
            tagged = [span for span in layout.tagged if span.start < last and span.stop > start]
            return iter([Span(span.start, span.stop, mark.weight) for span in tagged])
        spans = list(self._text_spans(layout, turn, start, stop)) if mark.parts else [Span(start, stop, mark.weight)]
        if end is not None and mark.weight > 0 and self._trains_end(layout, end, is_trained=True, is_last=is_last):
            spans.append(
                Span(stop, end.stop, mark.weight) if not mark.parts_only else Span(end.start, end.stop, mark.weight)
            )
        return iter(spans)

    def _text_spans(self, layout: Layout, turn: int, start: int, stop: int) -> Iterator[Span]:
        """The spans of a turn that has parts with a mask of their own."""
        mark = self.marks[turn]
        base = self._base(layout.messages[turn]["role"], mark)
        content, trimmed = layout.content_span(turn)
        if base and not mark.parts_only:
            yield Span(start, content.start, mark.weight)
            yield Span(content.stop, stop, mark.weight)
        for part in mark.parts:
            if base if part.train is None else part.train:
                first = max(content.start, content.start + part.start - trimmed)
                last = min(content.stop, content.start + part.stop - trimmed)
                if first < last:
                    yield Span(first, last, mark.weight * part.weight)

    def _trains_end(self, layout: Layout, end: Span, *, is_trained: bool, is_last: bool) -> bool:
        is_eos = layout.text.endswith(layout.facts.eos_token or "\0", end.start, end.stop)
        rule = self.rules.train_on_eos if is_eos else self.rules.train_on_eot
        return rule == "all" or (is_trained and (rule == "turn" or (rule == "last" and is_last)))

    def _end_tokens_of_others(self, trained: list[int]) -> Iterator[Span]:
        """The end tokens of turns that are not trained, for the rule `all`."""
        if "all" not in (self.rules.train_on_eos, self.rules.train_on_eot):
            return
        for turn in range(len(self.layout.messages)):
            if turn not in trained:
                _, end = self.layout.ends(turn)
                if end is not None and self._trains_end(self.layout, end, is_trained=False, is_last=False):
                    yield end
