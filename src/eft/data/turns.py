"""Where the turns of a rendered conversation are, proven from the template's own behaviour.

For each turn two questions are answered by rendering, never by searching for markers in the text:

- Where does the model start to write? At the end of the prompt that it would be given at that turn: the conversation up
  to there rendered with the generation prompt. The whole conversation must start with exactly that text.
- Where does the row's text end? The conversation is rendered once more with a probe text in that turn's place; whatever
  follows the probe there follows the turn's text here.

And the conversation up to and including the turn, rendered alone, must show the turn as the whole one does. Where it
does not, the template rewrites earlier turns, and no label on this text would be right (`RewrittenError`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from eft.core.records import Message
from eft.data.formats.chat import REASONING
from eft.data.token_facts import TokenizerFacts

_SWITCHES = ("enable_thinking", "thinking")
"""Variables by which templates choose between generation prompts. An empty reasoning block that the prompt itself can
open and close (Qwen3) is part of the prompt: the row has no such text, and training on it would teach not to think."""
RENDER_ERRORS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)


_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")


def has_generation_tag(template: str) -> bool:
    """Whether the template itself marks what the model writes."""
    return _GENERATION_TAG.search(template) is not None


class UnprovableError(Exception):
    """A span of this conversation cannot be proven; the message becomes `Rejected.reason`."""


class RewrittenError(UnprovableError):
    """The model would have been given another text at this turn than the one that stands in the conversation."""


class Span(NamedTuple):
    """Characters [start, stop) of the rendered conversation, and the weight of their tokens in the loss."""

    start: int
    stop: int
    weight: float = 1.0


@dataclass
class Layout:
    """One rendered conversation and where its turns are."""

    tokenizer: PreTrainedTokenizerBase
    template: str
    messages: list[Message]
    tools: list[dict[str, Any]] | None
    facts: TokenizerFacts
    _starts: dict[int, int] = field(default_factory=dict)
    _frames: dict[int, tuple[str, str]] = field(default_factory=dict)
    _additions: dict[tuple[str, str], str] = field(default_factory=dict)
    _throughs: dict[int, str | None] = field(default_factory=dict)

    def render(self, messages: list[Message], **variables: Any) -> str:
        """The template's text for these messages; raises whatever the template raises."""
        rendered = self.tokenizer.apply_chat_template(
            messages,
            tools=self.tools,
            chat_template=self.template,
            tokenize=False,
            **variables,
        )
        assert isinstance(rendered, str)
        return rendered

    def try_render(self, messages: list[Message], **variables: Any) -> str | None:
        """As `render`, None where the template refuses."""
        try:
            return self.render(messages, **variables)
        except RENDER_ERRORS:
            return None

    @cached_property
    def text(self) -> str:
        """The whole conversation, string [characters]."""
        try:
            text = self.render(self.messages)
        except RENDER_ERRORS as error:
            raise UnprovableError(f"the chat template refuses the conversation ({error})") from error
        if self.tools and self._without_tools() == text:
            raise UnprovableError(
                "the chat template leaves out the tool definitions; expected a template that renders `tools`, "
                "such as `chat_template: chatml`"
            )
        return text

    def _without_tools(self) -> str | None:
        try:
            return Layout(self.tokenizer, self.template, self.messages, None, self.facts).render(self.messages)
        except RENDER_ERRORS:
            return None

    @cached_property
    def tagged(self) -> list[Span]:
        """What stands inside the template's `{% generation %}` tags, in order, as transformers tells it."""
        texts, found = render_jinja_template(
            conversations=[self.messages],
            tools=self.tools,
            chat_template=self.template,
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        assert texts == [self.text]
        return [Span(start, stop) for start, stop in found[0] if start < stop]

    def up_to(self, turn: int) -> Layout:
        """The conversation that ends with this turn."""
        return Layout(self.tokenizer, self.template, self.messages[: turn + 1], self.tools, self.facts)

    def refuse(self, turn: int, problem: str, kind: type[UnprovableError] = UnprovableError) -> UnprovableError:
        return kind(f"turn {turn + 1} ({self.messages[turn]['role']}): {problem}")

    # ---- where the model starts to write ----

    def generation_start(self, turn: int) -> int:
        """The character at which the model would start to write this assistant turn."""
        if turn not in self._starts:
            prompts = list(self._prompts(turn))
            matching = [len(prompt) for prompt in prompts if self.text.startswith(prompt)]
            if prompts and not matching:
                raise self.refuse(
                    turn,
                    "the template rewrites earlier turns: the text before this turn is not the prompt that the model "
                    f"would be given here ({_first_difference(prompts[0], self.text)})",
                    RewrittenError,
                )
            self._starts[turn] = max(matching) if matching else self._opening_start(turn)
        return self._starts[turn]

    def _prompts(self, turn: int) -> Iterator[str]:
        """What the model may be given at this turn: the plain prompt first, then those that a switch gives."""
        before = self.messages[:turn]
        plain = self.try_render(before, add_generation_prompt=True) if before else None
        if plain is None:
            return
        yield plain
        for switch in _SWITCHES:
            # What a switch adds to the prompt is learnt once; it is rendered again only where it stands in the text.
            kind = (switch, before[-1]["role"])
            known = self._additions.get(kind)
            if switch not in self.template or (known is not None and not self.text.startswith(plain + known)):
                continue
            switched = self.try_render(before, add_generation_prompt=True, **{switch: False})
            if switched is not None:
                if switched.startswith(plain):
                    self._additions[kind] = switched[len(plain) :]
                yield switched

    def _opening_start(self, turn: int) -> int:
        """As `generation_start`, where the template renders no prompt because no user turn precedes."""
        head, _ = self.frame(turn)
        probe: list[Message] = [{"role": "user", "content": "x"}]
        plain, prompt = self.try_render(probe), self.try_render(probe, add_generation_prompt=True)
        if plain is not None and prompt is not None and prompt.startswith(plain):
            header = prompt[len(plain) :]
            if head.endswith(header) and self.text.startswith(head):
                return len(head)
        raise self.refuse(turn, "cannot be told from the template's own text, as no user turn precedes it")

    # ---- where a turn's text is ----

    def frame(self, turn: int) -> tuple[str, str]:
        """The conversation before and after a probe text that stands in this turn's place."""
        if turn not in self._frames:
            (probe,) = self._probes(1)
            rendered = self.try_render(
                [*self.messages[:turn], _replaced(self.messages[turn], probe), *self.messages[turn + 1 :]]
            )
            if rendered is None or rendered.count(probe) != 1:
                raise self.refuse(turn, "the template does not show where its text is")
            head, _, tail = rendered.partition(probe)
            self._frames[turn] = head, tail
        return self._frames[turn]

    def _probes(self, count: int) -> list[str]:
        """Texts that do not stand in the conversation."""
        letter = next(letters for n in range(1, 1000) if (letters := "eftprobe" + "x" * n) not in self.text)
        return [f"{letter}{index}z" for index in range(count)]

    @cached_property
    def _stops(self) -> dict[int, int]:
        """Where the text of assistant turns stops, for all of them by one rendering with a probe in each one's place.

        What stands between two probes there stands here between one turn's text and the start of the next one. A turn
        for which that does not hold is left out.
        """
        turns = [turn for turn, message in enumerate(self.messages) if message["role"] == "assistant"]
        probes = dict(zip(turns, self._probes(len(turns)), strict=True))
        probed = list(self.messages)
        for turn, probe in probes.items():
            probed[turn] = _replaced(self.messages[turn], probe)
        rendered = self.try_render(probed)
        if rendered is None or any(rendered.count(probe) != 1 for probe in probes.values()):
            return {}
        stops: dict[int, int] = {}
        following = len(self.text)
        for turn in reversed(turns):
            rendered, found, between = rendered.rpartition(probes[turn])
            if not found:
                break
            try:
                start = self.generation_start(turn)
            except UnprovableError:
                break
            if start <= following - len(between) and self.text.endswith(between, start, following):
                stops[turn] = following - len(between)
            following = start
        return stops

    def text_start(self, turn: int) -> int:
        """The first character of the row's own text in this turn."""
        head, _ = self.frame(turn)
        if not self.text.startswith(head):
            raise self.refuse(
                turn,
                "the template rewrites earlier turns: what precedes it depends on this turn's text",
                RewrittenError,
            )
        return len(head)

    def ends(self, turn: int) -> tuple[int, Span | None]:
        """Where the turn's text stops, and its end token: the first special token that follows the text before the next
        turn; None where the template writes none."""
        if self.messages[turn]["role"] == "assistant" and turn in self._stops:
            stop = self._stops[turn]
            return stop, self._end_token(turn, stop)
        try:
            _, tail = self.frame(turn)
        except UnprovableError:
            if "tool_calls" not in self.messages[turn]:
                raise
            tail = None
        if tail is not None and self.text.endswith(tail):
            stop = len(self.text) - len(tail)
            return stop, self._end_token(turn, stop)
        if "tool_calls" in self.messages[turn]:
            return self._end_of_calls(turn)
        raise self.refuse(
            turn, "the template rewrites earlier turns: what follows it depends on its text", RewrittenError
        )

    def _alone(self, turn: int) -> str | None:
        """The conversation up to and including this turn; None where the template refuses it."""
        if turn not in self._throughs:
            is_last = turn == len(self.messages) - 1
            self._throughs[turn] = self.text if is_last else self.try_render(self.messages[: turn + 1])
        return self._throughs[turn]

    def _through(self, turn: int) -> str | None:
        """The conversation up to and including this turn, where the whole conversation starts with that text."""
        through = self._alone(turn)
        return through if through is not None and self.text.startswith(through) else None

    def require_as_written(self, turn: int, stop: int, end: Span | None) -> None:
        """Refuse when the turn stood otherwise, or ended otherwise, in the conversation that ended with it."""
        alone = self._alone(turn)
        if alone is None:
            raise self.refuse(turn, "the chat template refuses the conversation that ends with it", RewrittenError)
        rest = alone[stop:]
        ends_alike = end is None or not rest.strip() or rest.startswith(self.text[stop : end.stop])
        if not (alone.startswith(self.text[:stop]) and ends_alike):
            raise self.refuse(
                turn,
                "the template rewrites earlier turns: when this turn was written, it stood otherwise "
                f"({_first_difference(alone, self.text)})",
                RewrittenError,
            )

    def _end_token(self, turn: int, stop: int) -> Span | None:
        """The end token after `stop`. An added token that is not marked special counts where it follows at once and no
        special one does.

        Some templates (GLM) end an assistant turn by nothing but the token that opens the next one: that is then what
        tells the model to stop. For other roles it is no end.
        """
        match = self.facts.end_token.search(self.text, stop)
        plain = self.facts.plain_end_token.match(self.text, stop)
        is_assistant = self.messages[turn]["role"] == "assistant"
        follows_at_once = match is not None and not self.text[stop : match.start()].strip()
        if match and not (is_assistant and follows_at_once):  # is it still this turn's?
            through = self._through(turn)
            if through is not None:
                match = self.facts.end_token.search(self.text, stop, len(through))
            elif not follows_at_once:
                beyond = turn + 1 < len(self.messages) and match.start() >= self.text_start(turn + 1)
                if is_assistant and not plain and not beyond:
                    raise self.refuse(turn, "the template does not show where it ends")
                match = None
        if match:
            return self._with_those_at_once(turn, Span(match.start(), match.end()))
        return Span(plain.start(1), plain.end(1)) if plain else None

    def _with_those_at_once(self, turn: int, end: Span) -> Span:
        """The end token with the further ones that follow it without anything between (Command R7B closes the answer,
        then the turn), up to EOS: the model writes them all before it stops."""
        while not self.text.endswith(self.facts.eos_token or "\0", end.start, end.stop):
            more = self.facts.end_token.match(self.text, end.stop)
            alone = self._alone(turn) if more else None
            if more is None or alone is None or not alone.startswith(more.group(), end.stop):
                break  # it opens the next turn
            end = Span(end.start, more.end())
        return end

    def _end_of_calls(self, turn: int) -> tuple[int, Span | None]:
        """As `ends`, for templates that insist on this turn's tool calls: the probe is their argument, and the end
        token is the last special one of the turn, as calls may hold special tokens of their own."""
        (probe,) = self._probes(1)
        calls = self.messages[turn]["tool_calls"]
        changed = [{**call, "function": {**call["function"], "arguments": {"p": probe}}} for call in calls]
        probed = self.try_render([*self.messages[:turn], {**self.messages[turn], "tool_calls": changed}])
        through = self._through(turn)
        if through is None or probed is None or probe not in probed:
            raise self.refuse(turn, "the template does not show where it ends")
        tail = probed.rpartition(probe)[2]
        matches = list(self.facts.end_token.finditer(tail))
        if not matches or tail[matches[-1].end() :].strip():
            stop = len(through.rstrip())
            return stop, self._end_token(turn, stop)
        rest = tail[matches[-1].start() :]
        if not through.endswith(rest):
            raise self.refuse(turn, "the template does not show where it ends")
        stop = len(through) - len(rest)
        return stop, Span(stop, stop + len(matches[-1].group()))

    def require_written(self, turn: int, span: Span) -> None:
        """Refuse when the template left out something that the row asks to train on."""
        message = self.messages[turn]
        written = "".join(self.text[span.start : span.stop].split())
        parts = [("content", message["content"]), ("reasoning_content", message.get("reasoning_content", ""))]
        parts += [("tool call", call["function"]["name"]) for call in message.get("tool_calls", [])]
        for name, value in parts:
            if "".join(value.split()) not in written:
                raise self.refuse(
                    turn,
                    f"the template leaves out or rewrites its {name}, so it cannot be trained as it stands in the row",
                    RewrittenError,
                )

    def content_span(self, turn: int) -> tuple[Span, int]:
        """Where the row's content stands in this turn, and how many of its first characters the template trimmed."""
        (probe,) = self._probes(1)
        probed = self.try_render(
            [*self.messages[:turn], {**self.messages[turn], "content": probe}, *self.messages[turn + 1 :]]
        )
        if probed is not None and probed.count(probe) == 1:
            head, _, tail = probed.partition(probe)
            content = self.messages[turn]["content"]
            span = Span(len(head), len(self.text) - len(tail))
            written = self.text[span.start : span.stop]
            if self.text.startswith(head) and self.text.endswith(tail) and written.strip() == content.strip():
                return span, content.find(written) if written else 0
        raise self.refuse(turn, "the template does not show where its content stands, so no part of it can be trained")


def _replaced(message: Message, text: str) -> Message:
    """The turn with nothing but this text."""
    replaced: Message = {**message, "content": text}
    replaced.pop("tool_calls", None)
    for name in REASONING:
        replaced.pop(name, None)  # type: ignore[misc]  # names that a template may read, beside those of a Message
    return replaced


def _first_difference(ours: str, theirs: str) -> str:
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    return f"{ours[at : at + 24]!r} would stand where {theirs[at : at + 24]!r} stands"
