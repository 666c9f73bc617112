"""`{% generation %}`: what is trained is what transformers' own mask says, token for token, whatever the tag covers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from eft.config.data import DataConfig, DatasetConfig
from eft.core.constants import IGNORE_INDEX
from eft.core.records import TokenSample
from eft.data.formats import resolve_format
from eft.data.readers import Row
from eft.data.tokenize import ExampleEncoder, Outcome, Rejected
from tests.tiny import tiny_tokenizer

HEAD = "{% for m in messages %}{% if m.role == 'assistant' %}"
FOOT = (
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
OPEN, CLOSE = "{% generation %}", "{% endgeneration %}"
START = "{{ '<|im_start|>assistant\n' }}"
THINK = "{% if m.reasoning_content %}{{ '<think>\n' + m.reasoning_content + '\n</think>\n\n' }}{% endif %}"
CALLS = (
    "{% for call in m.tool_calls or [] %}{{ '<tool_call>' + (call.function | tojson) + '</tool_call>' }}{% endfor %}"
)
TEMPLATES = {
    "text and end": f"{HEAD}{START}{OPEN}{{{{ m.content + '<|im_end|>' }}}}{CLOSE}{{{{ '\n' }}}}{FOOT}",
    "text alone": f"{HEAD}{START}{OPEN}{{{{ m.content }}}}{CLOSE}{{{{ '<|im_end|>\n' }}}}{FOOT}",
    "the line break, too": f"{HEAD}{START}{OPEN}{{{{ m.content + '<|im_end|>\n' }}}}{CLOSE}{FOOT}",
    "the header, too": f"{HEAD}{OPEN}{START}{{{{ m.content + '<|im_end|>' }}}}{CLOSE}{{{{ '\n' }}}}{FOOT}",
    "reasoning inside": f"{HEAD}{START}{OPEN}{THINK}{{{{ m.content + '<|im_end|>' }}}}{CLOSE}{{{{ '\n' }}}}{FOOT}",
    "reasoning outside": f"{HEAD}{START}{THINK}{OPEN}{{{{ m.content + '<|im_end|>' }}}}{CLOSE}{{{{ '\n' }}}}{FOOT}",
    "calls inside": f"{HEAD}{START}{OPEN}{{{{ m.content }}}}{CALLS}{{{{ '<|im_end|>' }}}}{CLOSE}{{{{ '\n' }}}}{FOOT}",
    "two tags in a turn": (
        f"{HEAD}{START}{OPEN}{{{{ m.content }}}}{CLOSE}{CALLS}{OPEN}{{{{ '<|im_end|>' }}}}{CLOSE}{{{{ '\n' }}}}{FOOT}"
    ),
    "an empty block": (
        f"{HEAD}{START}{OPEN}{{{{ '<think>\n\n</think>\n\n' + m.content + '<|im_end|>' }}}}{CLOSE}{{{{ '\n' }}}}{FOOT}"
    ),
    "in the middle of a word": (
        f"{HEAD}{START}{{{{ 'he' }}}}{OPEN}{{{{ 'llo ' + m.content }}}}{CLOSE}{{{{ '<|im_end|>\n' }}}}{FOOT}"
    ),
    "tool results, too": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role in ['assistant', 'tool'] %}"
        f"{OPEN}{{{{ m.content + '<|im_end|>' }}}}{CLOSE}{{% else %}}{{{{ m.content + '<|im_end|>' }}}}{{% endif %}}"
        "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "the last turn alone": (
        f"{HEAD}{START}{{% if loop.last %}}{OPEN}{{{{ m.content + '<|im_end|>' }}}}{CLOSE}{{% else %}}"
        f"{{{{ m.content + '<|im_end|>' }}}}{{% endif %}}{{{{ '\n' }}}}{FOOT}"
    ),
}
CALL = [{"type": "function", "function": {"name": "f", "arguments": {"city": "Rome"}}}]
CASES: dict[str, list[dict[str, Any]]] = {
    "single": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "world, hello"}],
    "multi-turn": [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "one 😀"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
        {"role": "assistant", "content": " é four.\n"},
    ],
    "reasoning": [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two", "reasoning_content": "four five"},
    ],
    "tools": [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "", "tool_calls": CALL},
        {"role": "tool", "content": "21"},
        {"role": "assistant", "content": "It is 21."},
    ],
}


def encode(name: str, messages: list[dict[str, Any]], **keys: Any) -> list[Outcome]:
    """The conversation three times, so that it is also put together from the pieces of its shape."""
    spec = DatasetConfig(path="data.jsonl", type="chat_template", **keys)
    example = resolve_format(spec)(Row("data.jsonl", 1, {"messages": messages}), spec)
    return ExampleEncoder(tiny_tokenizer(), TEMPLATES[name])([example] * 3, spec, DataConfig(datasets=[spec]))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", TEMPLATES)
def test_masks_are_those_of_transformers(name: str, case: str) -> None:
    messages = CASES[case]
    leaves_out = (case == "reasoning" and "reasoning" not in name) or (
        case == "tools" and name not in ("calls inside", "two tags in a turn")
    )
    outcomes = encode(name, messages)
    if leaves_out:
        assert all(isinstance(outcome, Rejected) and "leaves out" in outcome.reason for outcome in outcomes)
        return
    wanted = tiny_tokenizer().apply_chat_template(
        messages, chat_template=TEMPLATES[name], return_dict=True, return_assistant_tokens_mask=True
    )
    for sample in outcomes:
        assert isinstance(sample, TokenSample), sample
        assert sample.input_ids.tolist() == wanted["input_ids"]
        assert (sample.labels != IGNORE_INDEX).astype(int).tolist() == wanted["assistant_masks"]
        assert np.any(sample.labels != IGNORE_INDEX)


def test_tool_results_inside_the_tag_are_followed() -> None:
    """And stopped by a gate (test_data_gates)."""
    messages = [*CASES["multi-turn"][:3], {"role": "tool", "content": "21 degrees"}, *CASES["multi-turn"][3:]]
    name = "tool results, too"
    wanted = tiny_tokenizer().apply_chat_template(
        messages, chat_template=TEMPLATES[name], return_dict=True, return_assistant_tokens_mask=True
    )
    for sample in encode(name, messages):
        assert isinstance(sample, TokenSample)
        assert (sample.labels != IGNORE_INDEX).astype(int).tolist() == wanted["assistant_masks"]


@pytest.mark.parametrize(
    "keys",
    [
        {"generation_tags": "ignore"},
        {"roles_to_train": ["assistant", "user"]},
        {"train_on_eos": "all"},
        {"train_on_eot": "last"},
    ],
)
def test_another_wish_comes_before_the_tag(keys: dict[str, Any]) -> None:
    """The end is trained as the keys say, though the tag leaves it out."""
    for sample in encode("text alone", CASES["single"], **keys):
        assert isinstance(sample, TokenSample)
        assert sample.labels[-2] == tiny_tokenizer().eos_token_id


def test_last_turn_only_and_weights_go_with_the_tag() -> None:
    name, tokenizer = "the line break, too", tiny_tokenizer()
    newline = tokenizer("\n")["input_ids"][0]
    for sample in encode(name, CASES["multi-turn"], turns_to_train="last"):
        assert isinstance(sample, TokenSample)
        trained = tokenizer.decode(sample.input_ids[sample.labels != IGNORE_INDEX])
        assert trained == " é four.\n<|im_end|>\n"
        assert sample.labels[-1] == newline
    weighted = [{**turn, "weight": 0.5} if turn["role"] == "assistant" else turn for turn in CASES["multi-turn"]]
    for sample in encode(name, weighted):
        assert isinstance(sample, TokenSample)
        assert sample.weights is not None
        assert set(sample.weights[sample.labels != IGNORE_INDEX].tolist()) == {0.5}
        assert sample.labels[-1] == newline


def test_history_that_is_rewritten_is_split_with_the_tags_of_each_part() -> None:
    """Each turn is trained where it stands as it was written, on what the tag marks there."""
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}"
        "{% if loop.last and m.reasoning_content %}{{ '<think>\n' + m.reasoning_content + '\n</think>\n\n' }}"
        "{% endif %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}"
        "{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tokenizer = tiny_tokenizer()
    messages = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two", "reasoning_content": "four"},
        {"role": "user", "content": "three"},
        {"role": "assistant", "content": "five", "reasoning_content": "six"},
    ]
    spec = DatasetConfig(path="data.jsonl", type="chat_template")
    example = resolve_format(spec)(Row("data.jsonl", 1, {"messages": messages}), spec)
    (outcome,) = ExampleEncoder(tokenizer, template)([example], spec, DataConfig(datasets=[spec]))
    assert isinstance(outcome, tuple)
    trained = [tokenizer.decode(sample.input_ids[sample.labels != IGNORE_INDEX]) for sample in outcome]
    assert trained == [
        "<think>\nfour\n</think>\n\ntwo<|im_end|>",
        "<think>\nsix\n</think>\n\nfive<|im_end|>",
    ]
