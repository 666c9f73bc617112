"""How a chat template opens the turns of each role, learnt by rendering texts that cannot be mistaken.

The gates look for these openings in what the ids say. They share nothing with the masks but the template itself: a mask
that is wrong is seen because its labels stand where another role's turn stands.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from eft.core.records import Message
from eft.data.token_facts import TokenizerFacts
from eft.data.turns import Layout, UnprovableError

_PROBES = tuple(f"Zqprobe{letter}qZ" for letter in "ABCD")
_SCAFFOLD = re.compile(r"(<think>\s*(</think>\s*)?)$")
_CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}


@dataclass(frozen=True)
class Openings:
    """What the template writes before the text of a turn."""

    of_role: dict[str, bytes]
    """Role → the text that opens its turns, UTF-8; a role that could not be learnt is missing."""
    of_pair: dict[tuple[str, str], bytes]
    """The same for a role that is opened otherwise after this other one."""
    end_ids: tuple[int, ...]
    """The tokens that end an assistant turn; none where the template writes no end."""
    num_bos: int
    """BOS tokens in a conversation of two rounds."""
    is_marked: bool
    """The assistant's turns are opened by special tokens, so that they can be told in ids of unknown origin."""

    def before(self, previous: str, role: str) -> bytes | None:
        """What opens a turn of `role` after one of `previous`."""
        return self.of_pair.get((previous, role), self.of_role.get(role))


def learn_openings(tokenizer: PreTrainedTokenizerBase, template: str, facts: TokenizerFacts) -> Openings | None:
    """None for a template that cannot render two rounds of question and answer, or changes their texts."""
    learner = _Learner(tokenizer, template, facts)
    text = learner.rendered(("user", "assistant", "user", "assistant"))
    if text is None:
        return None
    start, first, second, _ = _gaps(text)
    user = learner.after_end(_shared_end(start, second))
    assistant = learner.assistant(first)
    if not user.strip() or not assistant.strip():
        return None
    roles = {"user": user, "assistant": assistant}
    pairs: dict[tuple[str, str], str] = {("", "user"): start if user not in start else user}
    learner.system(roles, pairs, user)
    learner.tool(roles, pairs, user, assistant)
    bos = tokenizer.bos_token or "\0"
    return Openings(
        {role: opening.encode() for role, opening in roles.items()},
        {pair: opening.encode() for pair, opening in pairs.items()},
        learner.end_ids(),
        text.count(bos) if tokenizer.bos_token != tokenizer.eos_token else 0,
        all(facts.end_token.search(opening) or facts.special.search(opening) for opening in (user, assistant)),
    )


def openings_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str] | None:
    """Matches what opens a turn in the tokenizer's own template; None where that is not known."""
    template = tokenizer.chat_template
    openings = learn_openings(tokenizer, template, TokenizerFacts(tokenizer)) if isinstance(template, str) else None
    if openings is None:
        return None
    texts = sorted({text.decode() for text in openings.of_role.values()}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, texts)))


def _gaps(text: str) -> list[str]:
    """What stands before each probe, from the one before it."""
    gaps, at = [], 0
    for probe in _PROBES:
        found = text.find(probe, at)
        if found < 0:
            break
        gaps.append(text[at:found])
        at = found + len(probe)
    return gaps


def _shared_end(first: str, second: str) -> str:
    pairs = enumerate(zip(first[::-1], second[::-1], strict=False))
    length = next((index for index, (a, b) in pairs if a != b), min(len(first), len(second)))
    return first[len(first) - length :]


@dataclass(frozen=True)
class _Learner:
    tokenizer: PreTrainedTokenizerBase
    template: str
    facts: TokenizerFacts

    def _layout(self, messages: list[Message]) -> Layout:
        return Layout(self.tokenizer, self.template, messages, None, self.facts)

    def rendered(self, roles: Sequence[str], *, calls: bool = False) -> str | None:
        """A conversation of these roles with a probe each, in order and whole; None where that is not what comes out.
        `calls`: the assistant turn before a tool's has a call instead of a text."""
        messages: list[Message] = []
        probes = iter(_PROBES)
        shown = []
        for index, role in enumerate(roles):
            if calls and role == "assistant" and roles[index + 1 : index + 2] == ("tool",):
                messages.append({"role": role, "content": "", "tool_calls": [{**_CALL, "id": "call00001"}]})
                continue
            shown.append(next(probes))
            message: Message = {"role": role, "content": shown[-1]}
            messages.append({**message, "name": "f", "tool_call_id": "call00001"} if role == "tool" else message)
        text = self._layout(messages).try_render(messages)
        places = [] if text is None else [text.find(probe) for probe in shown]
        return text if places and min(places) >= 0 and places == sorted(places) else None

    def assistant(self, gap: str) -> str:
        """The generation prompt as it stands between a question and its answer."""
        asked: list[Message] = [{"role": "user", "content": _PROBES[0]}]
        layout = self._layout(asked)
        plain, prompt = layout.try_render(asked), layout.try_render(asked, add_generation_prompt=True)
        if plain is not None and prompt is not None and prompt.startswith(plain):
            # Some templates (Mistral) open the answer at the end of the question, in the prompt or not.
            asked_end = plain.find(_PROBES[0]) + len(_PROBES[0])
            for opening in (prompt[len(plain) :], prompt[asked_end:]):
                opening = _SCAFFOLD.sub("", opening)
                if opening.strip() and opening in gap:
                    return opening
        return _SCAFFOLD.sub("", gap)

    def system(self, roles: dict[str, str], pairs: dict[tuple[str, str], str], user: str) -> None:
        """The system turn at the start, and the user turn after it."""
        text = self.rendered(("system", "user", "assistant"))
        if text is None:
            return
        start, after, _ = _gaps(text)
        if start.strip():
            roles["system"] = start
        if user not in after:  # the system text stands inside the user's turn
            pairs["system", "user"] = after

    def tool(self, roles: dict[str, str], pairs: dict[tuple[str, str], str], user: str, assistant: str) -> None:
        """Tool results after a call, and after one another."""
        text = self.rendered(("user", "assistant", "tool", "tool", "assistant"), calls=True)
        gaps = _gaps(text) if text is not None else []
        if len(gaps) == 4:
            pairs["tool", "tool"] = self.after_end(gaps[2])
        else:
            text = self.rendered(("user", "assistant", "tool", "assistant"), calls=True)
            gaps = _gaps(text) if text is not None else []
        if len(gaps) < 3:
            return
        opening = self.after_end(gaps[1])
        if opening.strip() and opening not in (user, assistant):
            roles["tool"] = opening
        if assistant not in gaps[-1]:
            pairs["tool", "assistant"] = self.after_end(gaps[-1])

    def after_end(self, gap: str) -> str:
        """The text of a gap behind the end of the turn before: from the last special token that is no end on."""
        ends = set(self.end_ids())
        starts = [
            match.start() for match in self.facts.special.finditer(gap) if self.facts.special_of[match.group()] in ends
        ]
        if starts:
            last = self.facts.special.match(gap, starts[-1])
            assert last is not None
            rest = gap[last.end() :].lstrip()
            return rest or gap[starts[-1] :]
        return gap

    def end_ids(self) -> tuple[int, ...]:
        """The ids that an assistant turn ends with."""
        messages: list[Message] = [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": "y"},
            {"role": "user", "content": "z"},
        ]
        found: set[int] = set()
        for turns in (messages, messages[:2]):
            layout = self._layout(turns)
            try:
                _, end = layout.ends(1)
            except UnprovableError:
                continue
            if end is not None:
                ids = self.tokenizer(layout.text[end.start : end.stop], add_special_tokens=False)["input_ids"]
                found.add(int(ids[-1]))
        return tuple(sorted(found))
