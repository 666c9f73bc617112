"""Instructions with one answer: a prompt in a fixed wording, which is context, and the answer, which is trained.

The wordings are those of the public formats, to the character: a model that was trained on one answers to no other.
The columns of the first group are named by `field_instruction`, `field_input`, `field_output` (and `field_system`); the
other formats have columns of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from eft.config.data import DatasetConfig
from eft.core.errors import DataError
from eft.core.records import Segment
from eft.data.formats.example import Example, Format
from eft.data.formats.fields import field, optional_text, text
from eft.data.readers import Row


@dataclass(frozen=True)
class Style:
    """How system text, instruction and input become a prompt."""

    system: str
    """With `{system}`; left out where the system text is empty."""
    turn: str
    """With `{instruction}` and `{input}`."""
    turn_without_input: str
    keeps_empty_system: bool = False

    def prompt(self, system: str, instruction: str, input_text: str) -> str:
        opening = self.system.format(system=system) if system or self.keeps_empty_system else ""
        if input_text:
            return opening + self.turn.format(instruction=instruction, input=input_text)
        return opening + self.turn_without_input.format(instruction=instruction)


INSTRUCT = Style(
    "{system}\n\n",
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
    "### Instruction:\n{instruction}\n\n### Response:\n",
)
CHAT = Style("SYSTEM: {system}\n", "USER: {instruction}\n{input}\nASSISTANT:", "USER: {instruction}\nASSISTANT:")
CHATML = Style(
    "<|im_start|>system\n{system}<|im_end|>\n",
    "<|im_start|>user\n{instruction}\n{input}<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\n{instruction}<|im_end|>\n<|im_start|>assistant\n",
)
_OPEN_ORCA = Style("### System:\n{system}\n", "", "### Human:\n{instruction}\n### Assistant:\n")
_ORCA_MINI = Style("### System:\n{system}\n\n", "", "### User:\n{instruction}\n\n### Response:\n", True)
_BARE = Style("{system}", "{instruction}\n{input}", "{instruction}")
_CONCISE_CHOICE = Style("{system}", CHAT.turn, CHAT.turn_without_input)
_SUMMARY = Style(
    "{system}",
    "USER: Summarize the following article as a TL;DR.\n{instruction}\n{input}\nASSISTANT:",
    "USER: Summarize the following article as a TL;DR.\n{instruction}\nASSISTANT:",
)
_CREATIVE = Style("{system}\n", CHAT.turn, CHAT.turn_without_input)


@dataclass(frozen=True)
class Opening:
    """The fixed system text of a format."""

    with_input: str
    without_input: str


ALPACA = Opening(
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.",
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
)
_CONCISE = Opening(
    "Below is an instruction from a USER that describes a task, paired with an input that provides further context. "
    "The ASSISTANT writes a response that concisely and appropriately completes the request.\n\n",
    "Below is an instruction from a USER that describes a task. "
    "The ASSISTANT writes a response that appropriately and concisely completes the request.\n\n",
)
_NONE = Opening("", "")


def _same(opening: str) -> Opening:
    return Opening(opening, opening)


_EXPLAIN_CHOICE = _same("Choose the answer that best answers the question. Explain your reasoning.\n")
_BRIEF_CHOICE = _same("Choose the answer that best answers the question. Be concise in your response.\n\n")
_IN_CONTEXT = _same("Use the following contextual information to concisely answer the question.\n")
_CREATIVELY = _same(
    "Answer the following question in a comprehensive, in-depth, and creative way. Additionally your response should "
    "be relevant, accurate, and free of any ambiguity."
)
_UNANSWERABLE = (
    "The context provided does not contain any information about your inquiry. Therefore, I'm unable to answer your "
    "question based on the given context."
)


# ---- what a row says ----


@dataclass(frozen=True)
class _Said:
    """The texts of one row."""

    instruction: str
    answer: str
    input: str = ""


_Read = Callable[[Row, DatasetConfig], _Said]


def _triple(row: Row, spec: DatasetConfig) -> _Said:
    where, data = row.where, row.data
    return _Said(
        text(where, data, spec.field_instruction, "field_instruction"),
        text(where, data, spec.field_output, "field_output"),
        optional_text(where, data, spec.field_input),
    )


def _columns(instruction: str, answer: str, input_text: str | None = None, *, needs_input: bool = False) -> _Read:
    """Fixed columns."""

    def read(row: Row, spec: DatasetConfig) -> _Said:
        where, data = row.where, row.data
        extra = ""
        if input_text is not None:
            extra = text(where, data, input_text) if needs_input else optional_text(where, data, input_text)
        return _Said(text(where, data, instruction), text(where, data, answer), extra)

    return read


def _jeopardy(row: Row, spec: DatasetConfig) -> _Said:
    said = _columns("question", "answer", "category", needs_input=True)(row, spec)
    return _Said(said.instruction, "what is " + said.answer, said.input)


def _choices(row: Row, spec: DatasetConfig) -> _Said:
    where, data = row.where, row.data
    choices = field(where, data, "choices", None, "a list of texts")
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise DataError(f"{where}: field 'choices' is not a list of texts")
    answer = "solution" if data.get("solution") is not None else "explanation"
    listed = "\n".join(f'- "{choice}"' for choice in choices)
    return _Said(text(where, data, "question"), text(where, data, answer), listed)


def _article(question: str, answer: str | None) -> _Read:
    def read(row: Row, spec: DatasetConfig) -> _Said:
        where, data = row.where, row.data
        asked = f"{text(where, data, 'article')}\n===\n{text(where, data, question)}"
        return _Said(asked, _UNANSWERABLE if answer is None else text(where, data, answer))

    return read


def _context(row: Row, spec: DatasetConfig) -> _Said:
    where, data = row.where, row.data
    asked = f"Context: {text(where, data, 'context')}\nQuestion: {text(where, data, 'question')}\n"
    return _Said(asked, "Answer: " + text(where, data, "answer"))


# ---- formats ----


def _prompted(read: _Read, opening: Opening, style: Style, num_eos: int = 1) -> Format:
    """A format with a fixed system text."""

    def apply(row: Row, spec: DatasetConfig) -> Example:
        said = read(row, spec)
        system = opening.with_input if said.input else opening.without_input
        return answered(row.where, style.prompt(system, said.instruction, said.input), said.answer, num_eos)

    return apply


def _with_system(read: _Read, style: Style, column: str | None = None) -> Format:
    """A format whose rows bring the system text, in `column` or where `field_system` says; it may be empty."""

    def apply(row: Row, spec: DatasetConfig) -> Example:
        said = read(row, spec)
        name = column or spec.field_system
        if name not in row.data:
            field(row.where, row.data, name, None if column else "field_system", "text")
        system = optional_text(row.where, row.data, name)
        return answered(row.where, style.prompt(system, said.instruction, said.input), said.answer)

    return apply


def answered(where: str, prompt: str, answer: str, num_eos: int = 1) -> Example:
    """A prompt, which is context, and an answer, which is trained with EOS."""
    return Example(where, segments=[Segment(prompt, train=False), Segment(answer, train=True, num_eos=num_eos)])


def _styles(name: str, read: _Read, opening: Opening) -> dict[str, Format]:
    styles = {"": INSTRUCT, ":instruct": INSTRUCT, ":chat": CHAT, ":chatml": CHATML}
    return {name + suffix: _prompted(read, opening, style) for suffix, style in styles.items()}


_QUESTION, _ORCA = _columns("question", "answer"), _columns("question", "response")

INSTRUCT_FORMATS: dict[str, Format] = {
    **_styles("alpaca", _triple, ALPACA),
    "alpaca_instruct": _prompted(_triple, ALPACA, INSTRUCT),
    "alpaca_instruct.load_no_prompt": _prompted(_triple, _NONE, INSTRUCT),
    "alpaca_chat": _prompted(_triple, ALPACA, CHAT),
    "alpaca_chat.load_concise": _prompted(_triple, _CONCISE, CHAT),
    "alpaca_chat.load_no_prompt": _prompted(_triple, _NONE, CHAT),
    "alpaca_chat.load_qa": _prompted(_QUESTION, _CONCISE, CHAT),
    "alpaca_chat.load_camel_ai": _prompted(_columns("message_1", "message_2"), _CONCISE, CHAT),
    "alpaca_w_system": _with_system(_triple, CHAT),
    "alpaca_w_system.load_chat": _with_system(_triple, CHAT),
    "alpaca_w_system.load_instruct": _with_system(_triple, INSTRUCT),
    "alpaca_w_system.load_open_orca": _with_system(_ORCA, _OPEN_ORCA, "system_prompt"),
    "alpaca_w_system.load_open_orca_chatml": _with_system(_ORCA, CHATML, "system_prompt"),
    **_styles("gpteacher", _columns("instruction", "response", "input"), ALPACA),
    **_styles("oasst", _columns("INSTRUCTION", "RESPONSE"), ALPACA),
    **_styles("jeopardy", _jeopardy, ALPACA),
    **_styles("explainchoice", _choices, _EXPLAIN_CHOICE),
    "concisechoice": _prompted(_choices, _BRIEF_CHOICE, _CONCISE_CHOICE),
    "summarizetldr": _prompted(_columns("article", "summary"), _NONE, _SUMMARY),
    "context_qa": _prompted(_article("question", "answer"), _IN_CONTEXT, CHAT),
    "context_qa.load_v2": _prompted(_context, _NONE, _BARE),
    "context_qa.load_404": _prompted(_article("unanswerable_question", None), _IN_CONTEXT, CHAT),
    "creative_acr.load_answer": _prompted(_columns("instruction", "revision"), _CREATIVELY, _CREATIVE),
    "orcamini": _with_system(_ORCA, _ORCA_MINI, "system_prompt"),
    "metharme": _prompted(_columns("prompt", "generation"), _NONE, _BARE, num_eos=3),
}
"""Name → format. `:instruct`, `:chat` and `:chatml` are wordings of the same rows."""
