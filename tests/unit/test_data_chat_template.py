"""Masks come from structure: ids equal transformers', the trained text is what the model must write, else a refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from eft.config.data import DataConfig, DatasetConfig
from eft.core.constants import IGNORE_INDEX
from eft.core.errors import DataError
from eft.core.records import Segment, TokenSample
from eft.data.chat_template import CHATML, encode_conversation, encode_conversations, resolve_template, stop_token_of
from eft.data.formats import Example
from eft.data.tokenize import Rejected, encode_examples, tokenizer_fingerprint
from tests.tiny import CHATML as TINY_CHATML
from tests.tiny import tiny_tokenizer

SPECIALS = ("<|end|>", "<|call|>", "<|user|>", "<|assistant|>")
TOKENIZER = tiny_tokenizer(specials=SPECIALS)

DEFAULT_SYSTEM = (  # SmolLM2: a default system prompt where the row has none
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}{{ '<|im_start|>system\nDefault<|im_end|>\n' }}"
    "{% endif %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TRIMMED = TINY_CHATML.replace("message['content']", "message['content'] | trim")  # Llama, Gemma
NO_END = (  # GLM: nothing ends a turn but the token that opens the next one
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
PLAIN_TEXT = (  # no special token anywhere but at the very end
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% else %}{{ eos_token }}{% endif %}"
)
SYSTEM_LAST = (  # Mistral 7B v0.3: the system prompt moves to the last user turn
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' }}{% if loop.index0 + 1 >= "
    "messages | length - 1 and messages[0].role == 'system' %}{{ messages[0].content + '\n' }}{% endif %}"
    "{{ m.content + ' [/INST]' }}{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% endif %}"
    "{% endfor %}"
)
STRICT_CALLS = (  # Mistral, gpt-oss: a tool result must follow a call; calls have special tokens of their own
    "{% for m in messages %}{% if m.role == 'tool' and not messages[loop.index0 - 1].tool_calls %}"
    "{{ raise_exception('no call') }}{% endif %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{% for c in m.tool_calls or [] %}{{ '<|call|>' + c.function.name + (c.function.arguments | tojson) + '<|end|>' }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}{% if tools %}{{ '' }}{% endif %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DROPS_THINKING = (  # Qwen3, DeepSeek R1: reasoning leaves the history
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{{ m.content if loop.last else "
    "m.content.split('</think>')[-1] }}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def chat(*contents: str, system: str | None = None) -> list[Any]:
    """A conversation of user and assistant turns in alternation."""
    roles = ("user", "assistant")
    messages = [{"role": roles[index % 2], "content": content} for index, content in enumerate(contents)]
    return [{"role": "system", "content": system}, *messages] if system is not None else messages


def encode(messages: list[Any], template: str = TINY_CHATML, tools: Any = None, **rules: Any) -> TokenSample:
    rules = {"roles_to_train": ["assistant"], "train_on_eos": "turn", "train_on_inputs": False, **rules}
    sample = encode_conversation(TOKENIZER, template, messages, tools, where="data.jsonl row 17", **rules)
    expected = TOKENIZER.apply_chat_template(messages, tools=tools, chat_template=template, return_dict=False)
    assert sample.input_ids.tolist() == expected
    assert sample.input_ids.dtype == sample.labels.dtype == np.int32
    return sample


def trained(sample: TokenSample) -> list[str]:
    """The trained stretches, decoded."""
    is_trained = np.concatenate([[False], sample.labels != IGNORE_INDEX, [False]])
    edges = np.flatnonzero(np.diff(is_trained))
    return [TOKENIZER.decode(sample.input_ids[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def refusal(messages: list[Any], template: str, **keys: Any) -> str:
    with pytest.raises(DataError) as caught:
        encode(messages, template, **keys)
    assert str(caught.value).startswith("data.jsonl row 17: ")
    return str(caught.value)


def test_only_what_the_model_writes_is_trained() -> None:
    messages = chat("hello", "I am fine.", "<|im_end|> and 😀?", "日本 <|im_start|>user", system="Be short.")
    assert trained(encode(messages)) == ["I am fine.<|im_end|>", "日本 <|im_start|>user<|im_end|>"]


def test_empty_answer_trains_the_end_token() -> None:
    assert trained(encode(chat("hello", ""))) == ["<|im_end|>"]


def test_default_system_prompt_and_opening_assistant_turn() -> None:
    assert trained(encode(chat("hello", "one"), DEFAULT_SYSTEM)) == ["one<|im_end|>"]
    opening = [{"role": "assistant", "content": "welcome"}, *chat("hello", "one")]
    assert trained(encode(opening, DEFAULT_SYSTEM)) == ["welcome<|im_end|>", "one<|im_end|>"]
    assert trained(encode([*chat("hello", "one"), {"role": "assistant", "content": "two"}])) == [
        "one<|im_end|>",
        "two<|im_end|>",
    ]


def test_trimmed_texts() -> None:
    assert trained(encode(chat(" hello\n", "  one two \n", "x", " "), TRIMMED)) == ["one two<|im_end|>", "<|im_end|>"]


def test_a_template_without_end_tokens() -> None:
    assert trained(encode(chat("hello", "one", "two", "three"), NO_END)) == ["one<|user|>", "three"]
    assert trained(encode(chat("hello", "one", "two", "three"), PLAIN_TEXT)) == [" one", " three\n<|im_end|>"]
    assert stop_token_of(TOKENIZER, NO_END) is None
    assert stop_token_of(TOKENIZER, TINY_CHATML) == stop_token_of(TOKENIZER, CHATML) == "<|im_end|>"


def test_end_tokens_by_rule() -> None:
    messages = chat("hello", "one", "two", "three", "four")
    assert trained(encode(messages, train_on_eos="turn")) == ["one<|im_end|>", "three<|im_end|>"]
    assert trained(encode(messages, train_on_eos="none")) == ["one", "three"]
    assert trained(encode(messages, train_on_eos="last")) == ["one", "three<|im_end|>"]
    end = "<|im_end|>"
    assert trained(encode(messages, train_on_eos="all")) == [end, f"one{end}", end, f"three{end}", end]


def test_other_roles_are_trained_on_their_own_text() -> None:
    messages = chat("hello", "one", system="Be short.")
    assert trained(encode(messages, roles_to_train=["system", "user"])) == ["Be short.<|im_end|>", "hello<|im_end|>"]
    assert trained(encode(messages, roles_to_train=[])) == []


def test_train_on_inputs_trains_everything() -> None:
    sample = encode(chat("hello", "one"), train_on_inputs=True)
    assert np.array_equal(sample.labels, sample.input_ids)


def test_templates_that_insist_on_tool_calls() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    messages = [
        *chat("hello"),
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "It is 3."},
    ]
    assert trained(encode(messages, STRICT_CALLS)) == ['<|call|>f{"a": 1}<|end|><|im_end|>', "It is 3.<|im_end|>"]


def test_a_template_that_rewrites_history_is_refused_with_row_and_turn() -> None:
    messages = chat("one", "two", "three", "four", system="Be short.")
    message = refusal(messages, SYSTEM_LAST)
    assert "turn 3 (assistant): the template rewrites earlier turns" in message
    assert "'Be short" in message
    assert trained(encode(messages[:3], SYSTEM_LAST)) == [" two<|im_end|>"]


def test_a_template_that_leaves_out_what_is_trained_is_refused() -> None:
    messages = chat("one", "<think>hm</think>two", "three", "<think>ah</think>four")
    assert "turn 2 (assistant): the template leaves out or rewrites its content" in refusal(messages, DROPS_THINKING)
    assert trained(encode(messages[:2], DROPS_THINKING)) == ["<think>hm</think>two<|im_end|>"]
    reasoning = [*chat("one"), {"role": "assistant", "content": "two", "reasoning_content": "hm"}]
    assert "rewrites its reasoning_content" in refusal(reasoning, TINY_CHATML)
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    assert "rewrites its tool call" in refusal(
        [*chat("one"), {"role": "assistant", "content": "", "tool_calls": [call]}], TINY_CHATML
    )
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert "leaves out the tool definitions" in refusal(chat("one", "two"), TINY_CHATML, tools=tools)


def test_a_conversation_that_the_template_refuses() -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    assert "the chat template refuses the conversation (roles must alternate)" in refusal(chat("one"), template)


def test_blanks_swallowed_by_special_tokens_do_not_train_the_prompt() -> None:
    """Phi-3's `<|assistant|>` takes the blanks after it into its own characters."""
    from tokenizers import AddedToken

    tokenizer = tiny_tokenizer()
    swallowing = AddedToken("<|assistant|>", rstrip=True, special=True, normalized=False)
    tokenizer.add_special_tokens({"extra_special_tokens": [swallowing]})
    template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    (sample,) = encode_conversations(
        tokenizer,
        template,
        [Example("x", messages=chat("one", "  two"))],
        roles_to_train=["assistant"],
        train_on_eos="turn",
        train_on_inputs=False,
    )
    assert isinstance(sample, TokenSample)
    assert tokenizer.decode(sample.input_ids[sample.labels != IGNORE_INDEX]) == "two<|im_end|>"


def test_offsets_that_leave_out_blanks() -> None:
    """Llama 3's and SmolLM2's tokenizers trim blanks off a token's characters, so a token of blanks looks empty."""
    from tokenizers import processors

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    assert tokenizer("one  ", return_offsets_mapping=True)["offset_mapping"][-1] == (5, 5)
    (sample,) = encode_conversations(
        tokenizer,
        TINY_CHATML,
        [Example("x", messages=chat("hello ", "one  "))],
        roles_to_train=["assistant"],
        train_on_eos="none",
        train_on_inputs=False,
    )
    assert isinstance(sample, TokenSample)
    assert tokenizer.decode(sample.input_ids[sample.labels != IGNORE_INDEX]) == "one  "


def test_a_long_conversation_is_rendered_once_per_answer_and_little_more() -> None:
    class Counting(PreTrainedTokenizerFast):
        calls = 0

        def apply_chat_template(self, *args: Any, **keys: Any) -> Any:
            type(self).calls += 1
            return super().apply_chat_template(*args, **keys)

    tokenizer = Counting(tokenizer_object=tiny_tokenizer().backend_tokenizer, eos_token="<|im_end|>")
    messages = chat(*[str(number) for number in range(40)])
    encode_conversation(
        tokenizer,
        TINY_CHATML,
        messages,
        None,
        roles_to_train=["assistant"],
        train_on_eos="turn",
        train_on_inputs=False,
        where="x",
    )
    assert Counting.calls <= 20 + 2


def test_one_refused_conversation_leaves_the_others_of_its_batch() -> None:
    examples = [
        Example("x row 1", messages=chat("one", "two")),
        Example("x row 2", messages=chat("one", "two", "three", "four", system="s")),
        Example("x row 3", messages=chat("one", "five")),
    ]
    first, second, third = encode_conversations(
        TOKENIZER,
        SYSTEM_LAST,
        examples,
        roles_to_train=["assistant"],
        train_on_eos="turn",
        train_on_inputs=False,
    )
    assert isinstance(second, Rejected)
    assert second.reason.startswith("turn 3 (assistant): the template rewrites earlier turns")
    assert isinstance(first, TokenSample)
    assert isinstance(third, TokenSample)
    assert trained(first) == [" two<|im_end|>"]
    assert trained(third) == [" five<|im_end|>"]


PIECES = st.sampled_from(["<|im_end|>", "<|im_start|>assistant\n", "eftprobex0z", "\n", " ", "é😀", "{{ x }}", "hello"])
CONTENT = st.lists(st.one_of(PIECES, st.text(max_size=5)), max_size=5).map("".join)


@settings(max_examples=60, deadline=None)
@given(contents=st.lists(CONTENT, min_size=1, max_size=5), data=st.data())
def test_any_text_gives_transformers_ids_and_exactly_the_answers(contents: list[str], data: st.DataObject) -> None:
    template = data.draw(st.sampled_from([TINY_CHATML, CHATML, DEFAULT_SYSTEM]))
    messages = chat(*contents)
    sample = encode(messages, template)
    answers = "".join(content + "<|im_end|>" for content in contents[1::2])
    assert TOKENIZER.decode(sample.input_ids[sample.labels != IGNORE_INDEX]) == answers


# ---- choosing the template ----


def test_resolve_template(tmp_path: Path) -> None:
    assert resolve_template(TOKENIZER, "tokenizer_default", None) == TINY_CHATML
    assert resolve_template(TOKENIZER, "chatml", None) == CHATML
    assert resolve_template(TOKENIZER, "jinja", NO_END) == NO_END
    (tmp_path / "own.jinja").write_text(NO_END)
    assert resolve_template(TOKENIZER, "jinja", str(tmp_path / "own.jinja")) == NO_END
    assert resolve_template(TOKENIZER, str(tmp_path / "own.jinja"), None) == NO_END
    named = tiny_tokenizer(None)
    named.chat_template = {"default": NO_END, "tool_use": CHATML}
    assert resolve_template(named, "tokenizer_default", None) == NO_END


def test_resolve_template_errors(tmp_path: Path) -> None:
    def error(template: str, jinja: str | None = None, tokenizer: PreTrainedTokenizerFast = TOKENIZER) -> str:
        with pytest.raises(DataError) as caught:
            resolve_template(tokenizer, template, jinja)
        return str(caught.value)

    (tmp_path / "own.jinja").write_text(NO_END)
    assert "has no chat template of its own" in error("tokenizer_default", tokenizer=tiny_tokenizer(None))
    assert "did you mean chatml?" in error("chat_ml")
    assert "did you mean own.jinja?" in error(str(tmp_path / "onw.jinja"))
    assert "needs the text or file in `chat_template_jinja`" in error("jinja")
    assert "line 2 is not valid Jinja" in error("jinja", "{% for m in messages %}\n{% endif %}")
    from tokenizers import Tokenizer, models

    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    assert "chatml needs <|im_start|> and <|im_end|> as tokens" in error("chatml", tokenizer=bare)


# ---- segments and given ids ----


def examples_of(tokenizer: PreTrainedTokenizerFast, *examples: Example, **keys: Any) -> list[TokenSample | Rejected]:
    spec = DatasetConfig(path="data.jsonl", **keys)
    return encode_examples(examples, tokenizer, spec, DataConfig(datasets=[spec]), TINY_CHATML)


def test_segments_are_tokenised_one_by_one_with_one_bos() -> None:
    tokenizer = tiny_tokenizer(add_bos=True)
    parts = [Segment("hel", train=False), Segment("lo wor", train=True), Segment("ld", train=True)]
    (sample, with_own_bos) = examples_of(
        tokenizer,
        Example("x", segments=parts, add_eos=True),
        Example("x", segments=[Segment("<|endoftext|>hello<|im_end|>", train=True)], add_eos=True),
    )
    assert isinstance(sample, TokenSample)
    pieces = [tokenizer(part.text, add_special_tokens=False)["input_ids"] for part in parts]
    assert sample.input_ids.tolist() == [0, *pieces[0], *pieces[1], *pieces[2], 2]
    untrained = 1 + len(pieces[0])
    assert sample.labels.tolist() == [IGNORE_INDEX] * untrained + sample.input_ids.tolist()[untrained:]
    assert isinstance(with_own_bos, TokenSample)
    assert tokenizer.decode(with_own_bos.input_ids) == "<|endoftext|>hello<|im_end|>"


def test_train_on_inputs_of_the_data_set_comes_before_the_global_one() -> None:
    segments = [Segment("hello", train=False), Segment(" world", train=True)]
    for own, count in ((None, 0), (True, 1), (False, 0)):
        (sample,) = examples_of(TOKENIZER, Example("x", segments=segments), train_on_inputs=own)
        assert isinstance(sample, TokenSample)
        assert np.count_nonzero(sample.labels[:1] != IGNORE_INDEX) == count


def test_batches_may_mix_kinds_and_keep_their_order() -> None:
    ids = np.array([1, 5, len(TOKENIZER)], dtype=np.int32)
    good, bad = TokenSample(ids[:2], ids[:2]), TokenSample(ids, ids)
    results = examples_of(
        TOKENIZER,
        Example("x", sample=bad),
        Example("x", messages=chat("one", "two")),
        Example("x", sample=good),
        Example("x", segments=[Segment("hello", train=True)]),
    )
    assert isinstance(results[0], Rejected)
    assert f"input_ids[2] is {len(TOKENIZER)}, outside the tokenizer's vocabulary" in results[0].reason
    assert [type(result) for result in results[1:]] == [TokenSample] * 3
    assert results[2] is good


def test_what_no_row_can_mend_is_an_error() -> None:
    with pytest.raises(DataError, match="`roles_to_train` has 'asistant'"):
        examples_of(TOKENIZER, Example("x", messages=chat("one", "two")), roles_to_train=["asistant"])
    without_eos = tiny_tokenizer()
    without_eos.eos_token = None
    with pytest.raises(DataError, match="no EOS token"):
        examples_of(without_eos, Example("x", segments=[Segment("hello", train=True)], add_eos=True))
    spec = DatasetConfig(path="d")
    with pytest.raises(DataError, match="there is no chat template"):
        encode_examples([Example("x", messages=chat("one"))], TOKENIZER, spec, DataConfig(datasets=[spec]), None)


def test_the_tokenizers_fingerprint_is_that_of_its_ids() -> None:
    plain = tokenizer_fingerprint(tiny_tokenizer())
    used = tiny_tokenizer()
    used(["hello", "hello world"], padding=True, truncation=True, max_length=4)
    assert tokenizer_fingerprint(used) == plain
    changed = [
        tiny_tokenizer(add_bos=True),
        tiny_tokenizer(specials=("<|x|>",)),
        tiny_tokenizer(),
        tiny_tokenizer(),
    ]
    changed[-2].add_tokens(["newword"])
    changed[-1].split_special_tokens = True
    assert len({plain, *map(tokenizer_fingerprint, changed)}) == 5
    assert tokenizer_fingerprint(tiny_tokenizer(CHATML)) == plain
