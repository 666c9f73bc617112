"""Conversations put together from the pieces of their shape are those that the template renders, to the character."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from eft.config.data import DataConfig, DatasetConfig
from eft.core.records import TokenSample
from eft.data.conversations import ConversationEncoder, MaskRules, Rejected
from eft.data.formats import Example
from eft.data.template_reading import triggers_of
from tests.golden.test_golden_templates import TEMPLATES, golden_tokenizer, template_text
from tests.tiny import tiny_tokenizer

PIECES = (
    "hello", "What is it?", " ", "\n", "\n\n", "\t", "", "<think>", "</think>", "<tool_response>", "</tool_response>",
    "é😀", '"quoted" \\n', "{{ x }}", "<b>", "Qx0q", "{%", "<|im_end|>", "%d %b %Y", "user", "assistant", "system", "0",
)  # fmt: skip


def conversation(chance: random.Random) -> list[Any]:
    """Few shapes, many texts."""
    turns: list[Any] = []
    if chance.random() < 0.2:
        turns.append({"role": "system", "content": text(chance)})
    for _ in range(chance.choice([1, 1, 1, 2])):
        turns.append({"role": "user", "content": text(chance)})
        answer = {"role": "assistant", "content": text(chance)}
        if chance.random() < 0.15:
            answer["reasoning_content"] = text(chance)
        turns.append(answer)
    return turns


def text(chance: random.Random) -> str:
    pieces = PIECES if chance.random() < 0.3 else ("one", " two", " x.", "\n\ny", "é😀", '"', "\\", "{{ x }}")
    middle = "".join(chance.choice(pieces) for _ in range(chance.randint(0, 4)))
    return chance.choice([f"a{middle}z"] * 6 + [f" a{middle}z\n", "", middle])


def rules(**keys: Any) -> MaskRules:
    spec = DatasetConfig(path="d", special_tokens_in_content="keep", **keys)
    return MaskRules.of(spec, DataConfig(datasets=[spec]))


def require_equal(ours: Any, theirs: Any) -> None:
    assert type(ours) is type(theirs)
    if isinstance(ours, Rejected):
        assert ours == theirs
        return
    pairs = zip(*(each if isinstance(each, tuple) else (each,) for each in (ours, theirs)), strict=True)
    for one, other in pairs:
        assert np.array_equal(one.input_ids, other.input_ids)
        assert np.array_equal(one.labels, other.labels)
        assert one.weights is None
        assert other.weights is None


@pytest.mark.parametrize("name", TEMPLATES)
def test_conversations_from_pieces_are_those_of_the_template(name: str) -> None:
    """An encoder that has met a conversation's shape before, against one that renders it by itself."""
    chance = random.Random(name)
    tokenizer, template = golden_tokenizer(), template_text(name)
    for keys in ({}, {"train_on_eos": "all", "roles_to_train": ["user", "assistant"]}, {"rewritten_history": "raise"}):
        encoder = ConversationEncoder(tokenizer, template, rules(**keys))
        examples = [Example("d row 1", messages=conversation(chance)) for _ in range(60)]
        for example, outcome in zip(examples, encoder(examples), strict=True):
            (alone,) = ConversationEncoder(tokenizer, template, rules(**keys))([example])
            require_equal(outcome, alone)


def test_a_shape_is_rendered_a_few_times_however_many_rows_it_has() -> None:
    class Counting(PreTrainedTokenizerFast):
        calls = 0

        def apply_chat_template(self, *args: Any, **keys: Any) -> Any:
            type(self).calls += 1
            return super().apply_chat_template(*args, **keys)

    tokenizer = Counting(tokenizer_object=tiny_tokenizer().backend_tokenizer, eos_token="<|im_end|>")
    encoder = ConversationEncoder(tokenizer, template_text("chatml"), rules())
    turns = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    examples = [
        Example("d", messages=[{**turn, "content": turn["content"] + str(i)} for turn in turns]) for i in range(50)
    ]
    assert all(isinstance(outcome, TokenSample) for outcome in encoder(examples))
    assert 0 < Counting.calls <= 12
    encoder(examples)
    assert Counting.calls <= 12


@settings(max_examples=40, deadline=None)
@given(texts=st.lists(st.text(alphabet="ab \n\t<>/think", max_size=12), min_size=2, max_size=2))
def test_any_text_after_its_shape_is_known(texts: list[str]) -> None:
    tokenizer, template = golden_tokenizer(), template_text("qwen3")
    example = Example("d", messages=[{"role": "user", "content": texts[0]}, {"role": "assistant", "content": texts[1]}])
    encoder = ConversationEncoder(tokenizer, template, rules())
    encoder([example, example])
    (outcome,) = encoder([example])
    (alone,) = ConversationEncoder(tokenizer, template, rules())([example])
    require_equal(outcome, alone)


# What a template may do with texts, and the words that give it away (None: it cannot be read).
READINGS: dict[str, str | None] = {
    "{{ messages[0].content | trim }}": "",
    "{{ messages[0].content | upper }}": "",
    "{% if 'strength' in messages[0].content | lower %}y{% endif %}": "STRENGTH",
    "{{ messages[0].content | replace('#', '') }}": "#",
    "{{ messages[0].content | wordcount }}": None,
    "{% if messages[0].content | trim | length > 0 %}y{% endif %}": "",
    "{% if messages[0].content | length > 9 %}y{% endif %}": None,
    "{% if messages[0].content in ['x', 'y'] %}y{% endif %}": "y",
    "{% if messages[0].get('type') in ['text'] %}y{% endif %}": "",
    "{{ messages[0].content | length }}": None,
    "{% if messages | length > 1 %}x{% endif %}": "",
    "{% if messages[0].content == 'x' %}y{% endif %}": "x",
    "{% if messages[0].role == 'user' %}y{% endif %}": "",
    "{% if '/no_think' in messages[-1].content %}y{% endif %}": "/no_think",
    "{% if messages[0].content in 'abc' %}y{% endif %}": None,
    "{% if messages[0].content == messages[1].content %}y{% endif %}": None,
    "{{ messages[0].content.split('|')[0] }}": "|",
    "{{ messages[0].content.split() }}": None,
    "{{ messages[0].content.strip('\n') }}": "",
    "{{ messages[0].content.strip('#') }}": None,
    "{{ messages[0].content[:3] }}": None,
    "{% for m in messages[1:] %}{{ m.content }}{% endfor %}": "",
    "{% if messages[0].content is divisibleby 3 %}y{% endif %}": None,
    "{{ messages[0].content.startswith(messages[1].content) }}": None,
    "{% macro f(x) %}{{ x }}{% endmacro %}{{ f(messages[0].content) }}": "",
    "{{ unknown(messages[0].content) }}": None,
    "{% if messages[0].content[0] == '{' %}y{% endif %}": "{",
}


@pytest.mark.parametrize("template", READINGS)
def test_what_a_template_looks_for_in_texts(template: str) -> None:
    word, triggers = READINGS[template], triggers_of(template)
    if word is None:
        assert triggers is None
    else:
        assert triggers is not None
        assert triggers.search("hello") is None
        assert triggers.search(f"a{word or '<think>'}b") is not None
