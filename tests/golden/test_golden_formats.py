"""Exact ids, labels and trained text of every format and of templates with different habits.

After an intended change: `python -m tests.golden.test_golden_formats` rewrites `formats.json`; read its diff, and raise
`MASKING_VERSION`.
"""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from eft.config.data import DataConfig, DatasetConfig
from eft.core.constants import IGNORE_INDEX
from eft.core.records import TokenSample
from eft.data.chat_template import resolve_template
from eft.data.formats import resolve_format
from eft.data.readers import Row
from eft.data.tokenize import encode_examples
from tests.tiny import tiny_tokenizer

GOLDEN = Path(__file__).with_name("formats.json")
CHAT = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "What is the capital of Italy?"},
    {"role": "assistant", "content": "Rome."},
    {"role": "user", "content": "And of France? 😀"},
    {"role": "assistant", "content": "Paris."},
]
CALL = [{"type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}]
TOOLS = [{"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}]
TOOL_CHAT = [
    {"role": "user", "content": "Weather in Rome?"},
    {"role": "assistant", "content": None, "tool_calls": CALL},
    {"role": "tool", "content": '{"celsius": 21}', "name": "get_weather"},
    {"role": "assistant", "content": [{"type": "text", "text": "It is "}, {"type": "text", "text": "21."}]},
]
# Its last turn ends with EOS in addition, and it is no prefix of a longer conversation (Phi-3).
FINAL_EOS = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
# History loses the reasoning block that the last turn has; the prompt may open and close it (Qwen3).
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}"
    "{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
# BOS of its own, no generation prompt, the user's turn is bracketed, blanks around texts are trimmed (Mistral).
BRACKETS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content | trim + eos_token }}{% endif %}{% endfor %}"
)

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "chat_template": ({"messages": CHAT}, {}),
    "chat_template, ShareGPT names": (
        {"conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "I am fine."}]},
        {"field_messages": "conversations", "message_property_mappings": {"role": "from", "content": "value"}},
    ),
    "chat_template, train_on_eos all": ({"messages": CHAT}, {"train_on_eos": "all"}),
    "chat_template, train_on_eos last": ({"messages": CHAT}, {"train_on_eos": "last"}),
    "chat_template, train_on_eos none": ({"messages": CHAT}, {"train_on_eos": "none"}),
    "chat_template, train_on_inputs": ({"messages": CHAT}, {"train_on_inputs": True}),
    "chat_template, user and assistant": ({"messages": CHAT}, {"roles_to_train": ["user", "assistant"]}),
    "chat_template, own chatml with tools": ({"messages": TOOL_CHAT, "tools": TOOLS}, {"chat_template": "chatml"}),
    "chat_template, final EOS": ({"messages": CHAT[1:]}, {"chat_template": FINAL_EOS}),
    "chat_template, thinking": ({"messages": CHAT[1:]}, {"chat_template": THINKING}),
    "chat_template, thinking with reasoning": (
        {"messages": [CHAT[1], {**CHAT[2], "reasoning_content": "one two"}]},
        {"chat_template": THINKING},
    ),
    "chat_template, brackets": (
        {"messages": [CHAT[1], {"role": "assistant", "content": "  Rome. \n"}, *CHAT[3:]]},
        {"chat_template": BRACKETS},
    ),
    "alpaca": ({"instruction": "Answer.", "input": "", "output": "Rome."}, {}),
    "alpaca with input and system": (
        {"instruction": "Answer.", "input": "one two", "output": "three", "system": "You are helpful."},
        {},
    ),
    "completion": ({"text": "hello world"}, {}),
    "input_output": (
        {
            "segments": [
                {"label": False, "text": "hello "},
                {"label": True, "text": "world"},
                {"label": False, "text": "!"},
            ]
        },
        {},
    ),
    "pretokenized": ({"input_ids": [5, 6, 7, 2], "labels": [-100, -100, 7, 2], "attention_mask": [1, 1, 1, 1]}, {}),
}


def encode(name: str) -> TokenSample:
    data, keys = CASES[name]
    tokenizer = tiny_tokenizer(
        add_bos=name.startswith(("completion", "input_output")), specials=("<|end|>", "<|user|>", "<|assistant|>")
    )
    chosen = keys.get("chat_template", "tokenizer_default")
    jinja = chosen if "{" in chosen else None
    spec = DatasetConfig(path="data.jsonl", type=name.split(",")[0].split(" ")[0], **keys)
    template = resolve_template(tokenizer, "jinja" if jinja else chosen, jinja)
    example = resolve_format(spec)(Row("data.jsonl", 1, data), spec)
    (sample,) = encode_examples([example], tokenizer, spec, DataConfig(datasets=[spec]), template)
    assert isinstance(sample, TokenSample), sample
    return sample


def described(sample: TokenSample) -> dict[str, Any]:
    tokenizer = tiny_tokenizer(specials=("<|end|>", "<|user|>", "<|assistant|>"))
    pairs = zip(sample.input_ids.tolist(), sample.labels.tolist(), strict=True)
    runs = [(key, [i for i, _ in run]) for key, run in groupby(pairs, key=lambda pair: pair[1] != IGNORE_INDEX)]
    return {
        "text": tokenizer.decode(sample.input_ids),
        "trained": [tokenizer.decode(ids) for is_trained, ids in runs if is_trained],
        "input_ids": json.dumps(sample.input_ids.tolist()),
        "labels": json.dumps(sample.labels.tolist()),
    }


@pytest.mark.parametrize("name", CASES)
def test_format_gives_exactly_the_golden_ids_labels_and_text(name: str) -> None:
    assert described(encode(name)) == json.loads(GOLDEN.read_text(encoding="utf-8"))[name]


if __name__ == "__main__":
    texts = {name: described(encode(name)) for name in CASES}
    GOLDEN.write_text(json.dumps(texts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
