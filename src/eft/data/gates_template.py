"""Stored conversations against `apply_chat_template`: the ids a server tokenises, for the whole and for every prompt.

Nothing of the masks' own code takes part: texts are rendered and tokenised by transformers, prompt by prompt.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from eft.core.constants import IGNORE_INDEX
from eft.core.records import Message, TokenSample
from eft.data.token_facts import TokenizerFacts
from eft.data.turns import RENDER_ERRORS

_SWITCHES = ("enable_thinking", "thinking")
_BATCH = 256
_SCAFFOLD = re.compile(r"\s*(<think>.*</think>)?\s*", re.DOTALL)


@dataclass(frozen=True)
class TemplateRules:
    """What the comparison goes by."""

    template: str
    has_prompts: bool
    """Trained stretches begin where the model would begin to write: only the assistant is trained, on whole turns."""
    may_split: bool
    """A row may have become several samples, each of them a part of the conversation."""
    may_cut: bool
    """Samples may lack the end of their conversation."""
    skips_special_text: bool
    """Rows with the text of special tokens are tokenised otherwise, as was asked for."""


@dataclass(frozen=True)
class _Case:
    index: int
    sample: TokenSample
    messages: list[Message]
    tools: list[dict[str, Any]] | None


def compare_with_template(
    samples: Sequence[tuple[int, TokenSample, Mapping[str, Any]]],
    tokenizer: PreTrainedTokenizerBase,
    rules: TemplateRules,
    facts: TokenizerFacts,
) -> Iterator[tuple[int, str | None]]:
    """(sample, what differs or None) for each of `samples`: (number, ids and labels, conversation).

    A conversation's ids must be those of `apply_chat_template(tokenize=True)`, and each trained stretch must begin
    where the prompt of its turn, tokenised by itself, ends.
    """
    for first in range(0, len(samples), _BATCH):
        cases = [
            _Case(index, sample, conversation["messages"], conversation["tools"])
            for index, sample, conversation in samples[first : first + _BATCH]
        ]
        yield from _Comparison(tokenizer, rules, facts).of(cases)


@dataclass(frozen=True)
class _Comparison:
    tokenizer: PreTrainedTokenizerBase
    rules: TemplateRules
    facts: TokenizerFacts

    def of(self, cases: list[_Case]) -> Iterator[tuple[int, str | None]]:
        if self.rules.skips_special_text:
            cases = [case for case in cases if not self._has_special_text(case)]
        whole = self._ids([(case.messages, case.tools) for case in cases], {})
        parts = [self._part(case, ids) for case, ids in zip(cases, whole, strict=True)]
        prompts = self._prompts(cases, parts)
        for case, (num_turns, fault), ends in zip(cases, parts, prompts, strict=True):
            if fault is None and num_turns is not None and ends is not None:
                fault = self._start_fault(case, ends)
            yield case.index, fault

    def _has_special_text(self, case: _Case) -> bool:
        texts = [str(value) for message in case.messages for value in message.values()]
        return self.facts.special.search("\0".join([*texts, str(case.tools or "")])) is not None

    def _ids(
        self, conversations: Sequence[tuple[list[Message], Any]], variables: Mapping[str, Any]
    ) -> list[list[int] | None]:
        """`apply_chat_template(tokenize=True)` of each; None where the template refuses."""
        plain = [index for index, (_, tools) in enumerate(conversations) if not tools]
        found: list[list[int] | None] = [None] * len(conversations)
        batch = self._try([conversations[index][0] for index in plain], None, variables)
        if batch is None:  # one of them is refused
            plain = []
        for index, ids in zip(plain, batch or (), strict=True):
            found[index] = ids
        done = set(plain)
        for index, (messages, tools) in enumerate(conversations):
            if index not in done:
                one = self._try([messages], tools, variables)
                found[index] = None if one is None else one[0]
        return found

    def _try(
        self, conversations: list[list[Message]], tools: Any, variables: Mapping[str, Any]
    ) -> list[list[int]] | None:
        if not conversations:
            return []
        try:
            ids: list[list[int]] = self.tokenizer.apply_chat_template(
                conversations,
                tools=tools,
                chat_template=self.rules.template,
                tokenize=True,
                return_dict=False,
                **variables,
            )
        except RENDER_ERRORS:
            return None
        return ids

    def _part(self, case: _Case, whole: list[int] | None) -> tuple[int | None, str | None]:
        """How many turns of the conversation the sample shows, or what is wrong with its ids."""
        ids = case.sample.input_ids
        if self._shows(whole, ids):
            return len(case.messages), None
        if self.rules.may_split:
            for turn in range(len(case.messages) - 1, -1, -1):
                if case.messages[turn]["role"] == "assistant":
                    (shown,) = self._ids([(case.messages[: turn + 1], case.tools)], {})
                    if self._shows(shown, ids):
                        return turn + 1, None
        if whole is None:
            return None, "the chat template refuses the conversation"
        at = _first_difference(ids, whole)
        there, here = (self.tokenizer.decode(list(part[at : at + 8])) for part in (whole, ids.tolist()))
        return None, f"from token {at} on apply_chat_template gives {there!r} where {here!r} is stored"

    def _shows(self, rendered: list[int] | None, ids: npt.NDArray[Any]) -> bool:
        """Whether these are a sample's ids, or the start of them is, where samples may be cut."""
        if rendered is None or len(rendered) < len(ids) or (len(rendered) > len(ids) and not self.rules.may_cut):
            return False
        return np.array_equal(ids, rendered[: len(ids)])

    def _prompts(self, cases: list[_Case], parts: list[tuple[int | None, str | None]]) -> list[set[int] | None]:
        """Per case, the tokens after which the model would begin to write: lengths of prompts that its ids start with.
        None where the template refuses a prompt, or prompts say nothing about the mask."""
        ends: list[set[int] | None] = [set() if self.rules.has_prompts else None for _ in cases]
        if not self.rules.has_prompts:
            return ends
        asked = [
            (number, turn)
            for number, (case, (num_turns, _)) in enumerate(zip(cases, parts, strict=True))
            for turn in range(1, num_turns or 0)
            if case.messages[turn]["role"] == "assistant"
        ]
        switches: list[Mapping[str, Any]] = [{}]
        switches += [{switch: False} for switch in _SWITCHES if switch in self.rules.template]
        for switch in switches:
            prompts = self._ids(
                [(cases[number].messages[:turn], cases[number].tools) for number, turn in asked],
                {"add_generation_prompt": True, **switch},
            )
            for (number, _), prompt in zip(asked, prompts, strict=True):
                ids, known = cases[number].sample.input_ids, ends[number]
                if prompt is None:
                    ends[number] = None
                elif known is not None and np.array_equal(ids[: len(prompt)], prompt):
                    known.add(len(prompt))
        return ends

    def _start_fault(self, case: _Case, ends: set[int]) -> str | None:
        sample = case.sample
        trained = sample.labels != IGNORE_INDEX
        starts = np.flatnonzero(trained & ~np.concatenate([[False], trained[:-1]])).tolist()
        for start in starts:
            before = max((end for end in ends if end <= start), default=None)
            if before == start:
                continue
            between = "" if before is None else self.tokenizer.decode(sample.input_ids[before:start].tolist())
            opens = before is None and case.messages[0]["role"] == "assistant"
            if opens or (before is not None and _SCAFFOLD.fullmatch(between)):
                continue
            shown = self.tokenizer.decode(sample.input_ids[start : start + 8].tolist())
            return f"no prompt of apply_chat_template ends where training begins, at token {start} ({shown!r})"
        return None


def _first_difference(ours: npt.NDArray[Any], theirs: Sequence[int]) -> int:
    least = min(len(ours), len(theirs))
    different = np.flatnonzero(ours[:least] != np.array(theirs[:least]))
    return int(different[0]) if len(different) else least
