"""Conversations → ids and labels, with masks that come from the template's structure.

The whole text is tokenised once, so the ids are those of `apply_chat_template`; a token is trained where its characters
overlap a trained span.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jinja2
import numpy as np
from transformers import PreTrainedTokenizerBase

from eft.core.constants import IGNORE_INDEX
from eft.core.errors import DataError, nearest
from eft.core.records import Message, TokenSample
from eft.data.formats import Example
from eft.data.turns import RENDER_ERRORS, Layout, Span, TokenizerFacts, UnprovableError

TrainOnEos = Literal["turn", "all", "last", "none"]

CHATML = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] + '\\n\\n' }}
    {%- endif %}
    {{- 'You can call these functions:\\n<tools>' }}
    {%- for tool in tools %}
        {{- '\\n' + (tool | tojson) }}
    {%- endfor %}
    {{- '\\n</tools>\\nTo call one, answer with its name and arguments as JSON:\\n<tool_call>\\n' }}
    {{- '{"name": …, "arguments": {…}}\\n</tool_call><|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if not (tools and loop.first and message['role'] == 'system') %}
        {{- '<|im_start|>' + message['role'] + '\\n' }}
        {%- if message['reasoning_content'] %}
            {{- '<think>\\n' + message['reasoning_content'] + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- message['content'] }}
        {%- for call in message['tool_calls'] or [] %}
            {{- '\\n' if message['content'] or not loop.first else '' }}
            {{- '<tool_call>\\n{"name": ' + (call['function']['name'] | tojson) }}
            {{- ', "arguments": ' + (call['function']['arguments'] | tojson) + '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
"""The built-in `chatml`: ChatML, tool calls as JSON between `<tool_call>` tags, reasoning between `<think>` tags."""


@dataclass(frozen=True)
class Rejected:
    """An example that gives no sample, and why; the reason does not repeat the file and row."""

    reason: str


# ---- choosing the template ----


def resolve_template(tokenizer: PreTrainedTokenizerBase, template: str, jinja: str | None) -> str:
    """The Jinja text that `chat_template` (and `chat_template_jinja`) mean.

    Args:
        tokenizer: gives its own template for `tokenizer_default`.
        template: `tokenizer_default`, `chatml`, `jinja`, or the path of a Jinja file.
        jinja: text or path of a file, with `jinja`.

    Raises:
        DataError: the tokenizer has no template, no such file, or the text is not valid Jinja.
    """
    if template == "tokenizer_default":
        text = _own_template(tokenizer)
    elif template == "chatml":
        missing = [token for token in ("<|im_start|>", "<|im_end|>") if token not in tokenizer.get_vocab()]
        if missing:
            raise DataError(
                f"chat_template: chatml needs {' and '.join(missing)} as tokens, which the tokenizer has not; add "
                "`tokens: ['<|im_start|>', '<|im_end|>']`, or use another chat_template"
            )
        text = CHATML
    elif template == "jinja":
        if not jinja:
            raise DataError("chat_template: jinja needs the text or file in `chat_template_jinja`")
        is_text = "{" in jinja or "\n" in jinja
        text = jinja if is_text else _template_file(jinja, "chat_template_jinja")
    else:
        text = _template_file(template, "chat_template")
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}], chat_template=text, tokenize=False)
    except jinja2.TemplateSyntaxError as error:
        problem = f"line {error.lineno} is not valid Jinja: {error.message}"
        raise DataError(f"chat_template {template!r}: {problem}") from error
    except RENDER_ERRORS:
        pass  # the template refuses this one conversation; those of the rows are judged one by one
    return text


def _own_template(tokenizer: PreTrainedTokenizerBase) -> str:
    own = tokenizer.chat_template
    if isinstance(own, dict):
        if "default" not in own:
            raise DataError(f"the tokenizer has chat templates {', '.join(own)} but no 'default'; set `chat_template`")
        own = own["default"]
    if not own:
        raise DataError(
            f"the tokenizer {tokenizer.name_or_path or ''} has no chat template of its own; expected `chat_template: "
            "chatml` (which needs its <|im_start|> and <|im_end|> as tokens), or `jinja`, or a file"
        )
    return str(own)


def _template_file(name: str, key: str) -> str:
    path = Path(name).expanduser()
    if path.is_file():
        return path.read_text(encoding="utf-8")
    names = ["tokenizer_default", "chatml", "jinja"]
    close = nearest(path.name, [*names, *(entry.name for entry in path.parent.glob("*.jinja*"))])
    hint = f"; did you mean {close}?" if close else ""
    raise DataError(f"{key}: no file {name!r}; expected a Jinja file's path or one of {', '.join(names)}{hint}")


def stop_token_of(tokenizer: PreTrainedTokenizerBase, template: str) -> str | None:
    """The token that ends an assistant turn of this template; None where it writes none, so that a model trained on it
    never learns to stop. Raises DataError where the template cannot render a question and an answer."""
    messages: list[Message] = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    layout = Layout(tokenizer, template, messages, None, TokenizerFacts(tokenizer))
    try:
        _, end = layout.ends(1)
    except UnprovableError as error:
        raise DataError(f"the chat template cannot be used: {error}") from error
    return layout.text[end.start : end.stop] if end else None


# ---- encoding ----


@dataclass(frozen=True)
class _Rules:
    """What is trained."""

    roles_to_train: frozenset[str]
    train_on_eos: TrainOnEos
    train_on_inputs: bool


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    messages: list[Message],
    tools: list[dict[str, Any]] | None,
    *,
    roles_to_train: Sequence[str],
    train_on_eos: TrainOnEos,
    train_on_inputs: bool,
    where: str,
) -> TokenSample:
    """Ids and labels of one conversation. Raises DataError naming `where` and the turn; see `encode_conversations`."""
    (result,) = encode_conversations(
        tokenizer,
        template,
        [Example(where, messages=messages, tools=tools)],
        roles_to_train=roles_to_train,
        train_on_eos=train_on_eos,
        train_on_inputs=train_on_inputs,
    )
    if isinstance(result, Rejected):
        raise DataError(f"{where}: {result.reason}")
    return result


def encode_conversations(
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    examples: Sequence[Example],
    *,
    roles_to_train: Sequence[str],
    train_on_eos: TrainOnEos,
    train_on_inputs: bool,
) -> list[TokenSample | Rejected]:
    """Ids and labels of many conversations, tokenised in one call.

    The ids equal `apply_chat_template(tokenize=True)`: the template writes its own BOS and nothing is added. Trained
    are the turns of `roles_to_train`: for the assistant what it must generate (from the end of the generation prompt,
    tool calls and reasoning included), for other roles the text of the turn; end tokens by `train_on_eos`.

    Returns:
        one result per example, in order; Rejected where the template refuses the conversation, where a span cannot be
        proven or where the template leaves out a part of a trained turn.

    Raises:
        DataError: the tokenizer gives no character offsets (it is not a fast one).
    """
    if not tokenizer.is_fast:
        kind = type(tokenizer).__name__
        raise DataError(f"the tokenizer {kind} gives no character offsets; expected a fast tokenizer")
    rules = _Rules(frozenset(roles_to_train), train_on_eos, train_on_inputs)
    facts = TokenizerFacts(tokenizer)
    results: list[TokenSample | Rejected] = []
    texts: list[str] = []
    spans: list[list[Span] | None] = []
    for example in examples:
        assert example.messages is not None
        try:
            layout = Layout(tokenizer, template, example.messages, example.tools, facts)
            texts.append(layout.text)
            spans.append(None if train_on_inputs else _trained_spans(layout, rules))
        except UnprovableError as error:
            results.append(Rejected(str(error)))
            if len(texts) > len(spans):
                texts.pop()
        else:
            results.append(_PENDING)
    encoded = iter(_tokenize(tokenizer, texts, spans, facts))
    return [next(encoded) if result is _PENDING else result for result in results]


_PENDING = Rejected("not tokenised yet")


def _trained_spans(layout: Layout, rules: _Rules) -> list[Span]:
    """The characters to train on, by turn."""
    turns = range(len(layout.messages))
    trained = [turn for turn in turns if layout.messages[turn]["role"] in rules.roles_to_train]
    spans: list[Span] = []
    for turn in turns if rules.train_on_eos == "all" else trained:
        stop, end = layout.ends(turn)
        with_end = rules.train_on_eos in ("turn", "all") or (rules.train_on_eos == "last" and turn == trained[-1])
        if turn in trained:
            is_assistant = layout.messages[turn]["role"] == "assistant"
            start = layout.generation_start(turn) if is_assistant else layout.text_start(turn)
            layout.require_written(turn, Span(start, stop))
            spans.append(Span(start, end.stop if end and with_end else stop))
        elif end and with_end:
            spans.append(end)
    return spans


def _tokenize(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], spans: list[list[Span] | None], facts: TokenizerFacts
) -> list[TokenSample]:
    """Ids of the texts, with labels where a span (None: everything) is trained."""
    if not texts:
        return []
    encoded = tokenizer(
        texts, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False
    )
    samples = []
    for ids, offsets, wanted in zip(encoded["input_ids"], encoded["offset_mapping"], spans, strict=True):
        input_ids = np.array(ids, dtype=np.int32)
        labels = input_ids.copy()
        if wanted is not None:
            characters = np.array(offsets, dtype=np.int64).reshape(-1, 2)
            labels[~_overlaps(input_ids, characters, wanted, facts)] = IGNORE_INDEX
        samples.append(TokenSample(input_ids, labels))
    return samples


def _overlaps(input_ids: Any, offsets: Any, spans: list[Span], facts: TokenizerFacts) -> Any:
    """bool [length]: the tokens whose characters overlap a span.

    `offsets` int64 [length, 2] are those of the tokenizer, which may leave out blanks that a token swallowed (a token
    of blanks then looks empty): a token reaches back to the end of the one before it.
    """
    trained = np.zeros(len(input_ids), dtype=bool)
    stops = np.maximum.accumulate(offsets[:, 1]) if len(offsets) else offsets[:, 1]
    starts = np.minimum(offsets[:, 0], np.concatenate([[0], stops[:-1]]))
    for span in spans:
        first = int(np.searchsorted(stops, span.start, side="right"))
        last = int(np.searchsorted(starts, span.stop, side="left"))
        # A special token that swallows the blanks after it (Phi-3) overlaps the span without belonging to it.
        while first < last and starts[first] < span.start and np.isin(input_ids[first], facts.special_ids):
            first += 1
        trained[first:last] = True
    return trained
