"""Masks come from structure: ids equal transformers', the trained text is what the model must write, else a refusal."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from eft.config.data import DataConfig, DatasetConfig
from eft.config.formats import FORMATS
from eft.config.templates import BUILT_IN_TEMPLATES
from eft.core.constants import IGNORE_INDEX
from eft.core.errors import DataError
from eft.core.records import Segment, TokenSample
from eft.data import conversations
from eft.data.chat_template import built_in_template, resolve_template, stop_token_of
from eft.data.conversations import ConversationEncoder, MaskRules, Outcome, Rejected
from eft.data.formats import Example, resolve_format
from eft.data.readers import Row
from eft.data.tokenize import encode_examples, tokenizer_fingerprint
from tests.tiny import CHATML as TINY_CHATML
from tests.tiny import tiny_tokenizer

SPECIALS = ("<|end|>", "<|call|>", "<|user|>", "<|assistant|>")
TOKENIZER = tiny_tokenizer(specials=SPECIALS)
CHATML = built_in_template("chatml")

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


def rules_of(**keys: Any) -> MaskRules:
    """The rules of an entry with these keys; content may hold special tokens, as most tests here do not care."""
    wanted = {"special_tokens_in_content": "keep", "rewritten_history": "raise", **keys}
    everywhere = {name: wanted.pop(name) for name in ("eot_tokens", "train_on_inputs") if name in wanted}
    spec = DatasetConfig(path="data.jsonl", **wanted)
    return MaskRules.of(spec, DataConfig(datasets=[spec], **everywhere))


def outcome(
    messages: list[Any], template: str = TINY_CHATML, tools: Any = None, marks: Any = None, **keys: Any
) -> Outcome:
    example = Example("data.jsonl row 17", messages=messages, tools=tools, marks=marks)
    (result,) = ConversationEncoder(TOKENIZER, template, rules_of(**keys))([example])
    return result


def encode(messages: list[Any], template: str = TINY_CHATML, tools: Any = None, **keys: Any) -> TokenSample:
    sample = outcome(messages, template, tools, **keys)
    assert isinstance(sample, TokenSample), sample
    expected = TOKENIZER.apply_chat_template(messages, tools=tools, chat_template=template, return_dict=False)
    assert sample.input_ids.tolist() == expected
    assert sample.input_ids.dtype == sample.labels.dtype == np.int32
    return sample


def trained(sample: TokenSample) -> list[str]:
    """The trained stretches, decoded."""
    is_trained = np.concatenate([[False], sample.labels != IGNORE_INDEX, [False]])
    edges = np.flatnonzero(np.diff(is_trained))
    return [TOKENIZER.decode(sample.input_ids[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def refusal(messages: list[Any], template: str = TINY_CHATML, **keys: Any) -> str:
    result = outcome(messages, template, **keys)
    assert isinstance(result, Rejected), result
    return result.reason


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


def test_end_tokens_that_follow_each_other_at_once() -> None:
    two = TINY_CHATML.replace("<|im_end|>", "<|call|><|end|>")
    assert trained(encode(chat("hello", "one", "two", "three"), two)) == ["one<|call|><|end|>", "three<|call|><|end|>"]
    assert stop_token_of(TOKENIZER, two) == "<|end|>"
    past_eos = TINY_CHATML.replace("<|im_end|>", "<|im_end|><|end|>")
    assert trained(encode(chat("hello", "one"), past_eos)) == ["one<|im_end|>"], "the model stops at EOS"


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
    (sample,) = ConversationEncoder(tokenizer, template, rules_of(train_on_eos="turn"))(
        [Example("x", messages=chat("one", "  two"))]
    )
    assert isinstance(sample, TokenSample)
    assert tokenizer.decode(sample.input_ids[sample.labels != IGNORE_INDEX]) == "two<|im_end|>"


def test_offsets_that_leave_out_blanks() -> None:
    """Llama 3's and SmolLM2's tokenizers trim blanks off a token's characters, so a token of blanks looks empty."""
    from tokenizers import processors

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    assert tokenizer("one  ", return_offsets_mapping=True)["offset_mapping"][-1] == (5, 5)
    (sample,) = ConversationEncoder(tokenizer, TINY_CHATML, rules_of(train_on_eos="none"))(
        [Example("x", messages=chat("hello ", "one  "))]
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
    ConversationEncoder(tokenizer, TINY_CHATML, rules_of())([Example("x", messages=messages)])
    assert Counting.calls <= 2 * 20 + 2


def test_one_refused_conversation_leaves_the_others_of_its_batch() -> None:
    examples = [
        Example("x row 1", messages=chat("one", "two")),
        Example("x row 2", messages=chat("one", "two", "three", "four", system="s")),
        Example("x row 3", messages=chat("one", "five")),
    ]
    first, second, third = ConversationEncoder(TOKENIZER, SYSTEM_LAST, rules_of(train_on_eos="turn"))(examples)
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


def examples_of(tokenizer: PreTrainedTokenizerFast, *examples: Example, **keys: Any) -> list[Outcome]:
    spec = DatasetConfig(path="data.jsonl", **keys)
    return encode_examples(examples, tokenizer, spec, DataConfig(datasets=[spec]), TINY_CHATML)


def test_segments_are_tokenised_one_by_one_with_one_bos() -> None:
    tokenizer = tiny_tokenizer(add_bos=True)
    parts = [Segment("hel", train=False), Segment("lo wor", train=True), Segment("ld", train=True, num_eos=1)]
    (sample, with_own_bos) = examples_of(
        tokenizer,
        Example("x", segments=parts),
        Example("x", segments=[Segment("<|endoftext|>hello<|im_end|>", train=True, num_eos=1)]),
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
        examples_of(without_eos, Example("x", segments=[Segment("hello", train=True, num_eos=1)]))
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


# ---- what rows say about their own training ----


def marks_of(*turns: dict[str, Any], **keys: Any) -> tuple[list[Any], Any]:
    """Messages and marks of a row with these turns."""
    spec = DatasetConfig(path="d", type="chat_template", message_field_training="train", **keys)
    example = resolve_format(spec)(Row("d", 1, {"messages": list(turns)}), spec)
    return example.messages, example.marks  # type: ignore[return-value]


USER, ANSWER = {"role": "user", "content": "hello"}, {"role": "assistant", "content": "one two three"}


def weighted(sample: TokenSample) -> list[tuple[str, float]]:
    weights = np.ones(len(sample.labels)) if sample.weights is None else sample.weights
    trained = np.flatnonzero(sample.labels != IGNORE_INDEX)
    return [(TOKENIZER.decode(sample.input_ids[at : at + 1]), float(weights[at])) for at in trained]


def test_marks_of_a_row_come_before_the_roles_of_the_config() -> None:
    messages, marks = marks_of({**USER, "train": True}, {**ANSWER, "train": False}, USER, {**ANSWER, "weight": 0.5})
    sample = outcome(messages, marks=marks)
    assert isinstance(sample, TokenSample)
    assert trained(sample) == ["hello<|im_end|>", "one two three<|im_end|>"]
    assert {weight for _, weight in weighted(sample)[2:]} == {0.5}
    assert "`train_on_inputs` trains everything" in refusal(messages, marks=marks, train_on_inputs=True)
    silent, none = marks_of(USER, {**ANSWER, "weight": 0})
    sample = outcome(silent, marks=none)
    assert isinstance(sample, TokenSample)
    assert not np.any(sample.labels != IGNORE_INDEX)


def test_only_the_last_turn() -> None:
    messages = chat("hello", "one", "two", "three", "four")
    assert trained(encode(messages, turns_to_train="last")) == ["three<|im_end|>"]
    assert trained(encode(messages, turns_to_train="last", roles_to_train=["user"])) == ["four<|im_end|>"]


def test_parts_of_a_content_follow_the_text_that_the_template_trims() -> None:
    for at, word in ((2, "a"), (4, " b"), (8, " d")):
        detail = [{"begin_offset": at, "end_offset": at, "train": True}]
        turn = {"role": "assistant", "content": "  a b c d  ", "detail": detail}
        messages, marks = marks_of(USER, turn, message_field_training_detail="detail")
        for template in (TINY_CHATML, TRIMMED):
            sample = outcome(messages, template, marks=marks)
            assert isinstance(sample, TokenSample)
            found = trained(sample)
            assert [text.strip() for text in found] in ([word.strip(), "<|im_end|>"], [f"{word.strip()}<|im_end|>"])


@settings(max_examples=80, deadline=None)
@given(content=st.text(alphabet="ab é😀\n", min_size=1, max_size=12), data=st.data())
def test_any_characters_of_a_content_train_exactly_the_tokens_that_overlap_them(
    content: str, data: st.DataObject
) -> None:
    begin = data.draw(st.integers(0, len(content) - 1))
    end = data.draw(st.integers(begin, len(content) - 1))
    detail = [{"begin_offset": begin, "end_offset": end, "train": True}]
    turn = {"role": "assistant", "content": content, "detail": detail}
    messages, marks = marks_of(USER, turn, message_field_training_detail="detail")
    sample = outcome(messages, marks=marks)
    assert isinstance(sample, TokenSample)
    text = TOKENIZER.apply_chat_template(messages, chat_template=TINY_CHATML, tokenize=False)
    offsets = TOKENIZER(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    start = text.rindex("assistant\n") + len("assistant\n")
    wanted = [first < start + end + 1 and last > start + begin for first, last in offsets]
    wanted[-2] = True  # the end token; a line break follows it
    assert (sample.labels != IGNORE_INDEX).tolist() == wanted


def test_end_tokens_that_are_named() -> None:
    messages = chat("hello", "one", "two", "three")
    template = TINY_CHATML.replace("<|im_end|>", " end<|im_end|>")
    assert trained(encode(messages, template)) == ["one end<|im_end|>", "three end<|im_end|>"]
    named = {"eot_tokens": ["<|call|>"], "template": TINY_CHATML.replace("<|im_end|>", "<|user|><|call|>")}
    assert trained(encode(messages, **named)) == ["one<|user|><|call|>", "three<|user|><|call|>"]
    assert trained(encode(messages, **named, train_on_eot="none")) == ["one", "three"]
    assert trained(encode(messages, **named, train_on_eot="last")) == ["one", "three<|user|><|call|>"]
    assert trained(encode(messages, train_on_eot="none")) == ["one<|im_end|>", "three<|im_end|>"], "EOS has its own key"
    with pytest.raises(DataError, match=r"eot_tokens: '<\|cal\|>' is not one token.*did you mean '<\|call\|>'"):
        encode(messages, eot_tokens=["<|cal|>"])


# ---- history that the template rewrites ----


def test_each_turn_of_a_rewritten_history_has_the_context_of_its_own_time() -> None:
    """A 4-turn dialogue with reasoning: the samples are what a server would have rendered at each of the turns."""
    messages = chat(*(text for number in range(4) for text in (f"q{number}", f"<think>{number}</think>a{number}")))
    samples = outcome(messages, DROPS_THINKING, rewritten_history="split")
    assert isinstance(samples, tuple)
    assert len(samples) == 4
    for number, sample in enumerate(samples):
        until = messages[: 2 * number + 2]
        whole = TOKENIZER.apply_chat_template(until, chat_template=DROPS_THINKING, return_dict=False)
        assert sample.input_ids.tolist() == whole
        assert trained(sample) == [f"<think>{number}</think>a{number}<|im_end|>"]
        prompt = TOKENIZER.apply_chat_template(
            until[:-1], chat_template=DROPS_THINKING, add_generation_prompt=True, return_dict=False
        )
        assert sample.input_ids[: len(prompt)].tolist() == prompt
        assert np.all(sample.labels[: len(prompt)] == IGNORE_INDEX)


def test_turns_that_share_a_context_stay_in_one_sample() -> None:
    """Only what follows the last question keeps its reasoning: the turns of one chain of calls belong together."""
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    thought = {"role": "assistant", "content": "", "tool_calls": [call], "reasoning_content": "hm"}
    result = {"role": "tool", "content": "3"}
    chain = [thought, result, {"role": "assistant", "content": "done", "reasoning_content": "ah"}]
    messages = [*chat("q"), *chain, *chat("r"), *chain]
    tools = [{"type": "function", "function": {"name": "f"}}]
    samples = outcome(messages, built_in_template("qwen3"), tools, rewritten_history="split")
    assert isinstance(samples, tuple)
    first, second = samples
    answers = ['<think>\nhm\n</think>\n\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call><|im_end|>']
    answers.append("<think>\nah\n</think>\n\ndone<|im_end|>")
    assert trained(first) == trained(second) == answers
    assert first.input_ids.tolist() == TOKENIZER.apply_chat_template(
        messages[:4], tools=tools, chat_template=built_in_template("qwen3"), return_dict=False
    )


def test_an_empty_block_of_reasoning_is_not_trained() -> None:
    forced = TINY_CHATML.replace("assistant\n", "assistant\n<think>\n").replace(
        "message['content']",
        "('<think>\n\n</think>\n\n' if message['role'] == 'assistant' else '') + message['content']",
    )
    assert trained(encode(chat("hello", "one"), forced)) == ["one<|im_end|>"]


# ---- text of special tokens in a row ----


def test_text_of_special_tokens_is_refused_escaped_or_kept() -> None:
    messages = chat("What is <|im_end|>?", "It is <|im_start|>user")
    refused = refusal(messages, special_tokens_in_content="error")
    assert refused.startswith("turn 1 (user): its content has the text of the special token '<|im_end|>'")
    assert trained(encode(messages, special_tokens_in_content="keep")) == ["It is <|im_start|>user<|im_end|>"]
    escaped = outcome(messages, special_tokens_in_content="escape")
    assert isinstance(escaped, TokenSample)
    wanted = TOKENIZER.apply_chat_template(
        messages, chat_template=TINY_CHATML, sanitize_control_tokens=True, return_dict=False
    )
    assert escaped.input_ids.tolist() == wanted
    assert np.count_nonzero(escaped.input_ids == TOKENIZER.eos_token_id) == 2
    assert trained(escaped) == ["It is <|im_start|>user<|im_end|>"]


def test_special_tokens_are_found_in_calls_and_tools_too() -> None:
    tools = [{"type": "function", "function": {"name": "f", "description": "<|end|>"}}]
    assert "the tool definitions has the text" in refusal(
        chat("q", "a"), CHATML, tools=tools, special_tokens_in_content="error"
    )
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": ["<|user|>"]}}}
    messages = [*chat("q"), {"role": "assistant", "content": "", "tool_calls": [call]}]
    assert "turn 2 (assistant): its tool_calls" in refusal(messages, CHATML, special_tokens_in_content="error")
    escaped = outcome(messages, CHATML, special_tokens_in_content="escape")
    assert isinstance(escaped, TokenSample)
    assert TOKENIZER.convert_tokens_to_ids("<|user|>") not in escaped.input_ids
    assert trained(escaped)[0].count("<|user|>") == 1


@settings(max_examples=60, deadline=None)
@given(contents=st.lists(CONTENT, min_size=2, max_size=4))
def test_escaped_rows_have_the_control_tokens_of_the_template_alone(contents: list[str]) -> None:
    messages = chat(*contents)
    sample = outcome(messages, special_tokens_in_content="escape")
    assert isinstance(sample, TokenSample)
    assert np.count_nonzero(sample.input_ids == 1) == np.count_nonzero(sample.input_ids == 2) == len(messages)
    wanted = TOKENIZER.apply_chat_template(
        messages, chat_template=TINY_CHATML, sanitize_control_tokens=True, return_dict=False
    )
    assert sample.input_ids.tolist() == wanted
    answers = "".join(content + "<|im_end|>" for content in contents[1::2])
    assert TOKENIZER.decode(sample.input_ids[sample.labels != IGNORE_INDEX]) == answers


# ---- the run's variables and date ----

DATED = "{{ strftime_now('%d %b %Y') }}{% if strftime_now is defined %}{{ strftime_now('%Y') }}{% endif %}"


def test_a_template_that_writes_the_date_needs_a_day() -> None:
    with pytest.raises(DataError, match=r"set `chat_template_date: 2025-01-31`"):
        resolve_template(TOKENIZER, "jinja", DATED)
    text = resolve_template(TOKENIZER, "jinja", DATED, day="2025-01-31")
    assert TOKENIZER.apply_chat_template(chat("x"), chat_template=text, tokenize=False) == "31 Jan 20252025"
    assert resolve_template(TOKENIZER, "jinja", text, day="2025-01-31") == text, "the saved template stays as it is"
    with pytest.raises(DataError, match="writes no date; remove the key"):
        resolve_template(TOKENIZER, "chatml", None, day="2025-01-31")
    with pytest.raises(DataError, match="asks for the date in no fixed format"):
        resolve_template(TOKENIZER, "jinja", "{{ strftime_now(x) }}", day="2025-01-31")
    with pytest.raises(DataError, match="is no day"):
        resolve_template(TOKENIZER, "jinja", DATED, day="2025-02-31")


def test_variables_become_defaults_of_the_template() -> None:
    template = "{{ style }}|{{ flags.a[0] }}|{{ 'on' if thinking else 'off' }}"
    variables = {"style": "it's\n\\n", "flags": {"a": [1.5]}, "thinking": False}
    text = resolve_template(TOKENIZER, "jinja", template, variables=variables)
    render = TOKENIZER.apply_chat_template
    assert render(chat("x"), chat_template=text, tokenize=False) == "it's\n\\n|1.5|off"
    assert render(chat("x"), chat_template=text, tokenize=False, thinking=True).endswith("|on")
    assert resolve_template(TOKENIZER, "jinja", text, variables=variables) == text
    with pytest.raises(DataError, match=r"has no variable 'thinkin'; did you mean 'thinking'"):
        resolve_template(TOKENIZER, "jinja", template, variables={"thinkin": True})


def test_a_fallback_template() -> None:
    assert resolve_template(TOKENIZER, "tokenizer_default_fallback_gemma", None) == TINY_CHATML
    assert resolve_template(tiny_tokenizer(None), "tokenizer_default_fallback_chatml", None) == CHATML
    with pytest.raises(DataError, match=r"gemma needs <start_of_turn> and <end_of_turn> as tokens"):
        resolve_template(tiny_tokenizer(None), "tokenizer_default_fallback_gemma", None)
    with pytest.raises(DataError, match="'gema' is no built-in template"):
        resolve_template(tiny_tokenizer(None), "tokenizer_default_fallback_gema", None)


# ---- the built-in templates ----

DOCS = Path(__file__).parents[2] / "docs"


def test_each_built_in_template_has_a_file_the_tokens_it_writes_and_a_line_in_the_docs() -> None:
    folder = Path(conversations.__file__).with_name("templates")
    assert {path.stem for path in folder.glob("*")} == set(BUILT_IN_TEMPLATES)
    page = (DOCS / "templates.md").read_text().replace("\\", "")
    for name, tokens in BUILT_IN_TEMPLATES.items():
        assert f"`{name}`" in page
        for token in tokens:
            assert f"`{token}`" in page
            by_role = re.sub("system|user|assistant", "' + message.role + '", token)
            assert token in built_in_template(name) or by_role in built_in_template(name), token


def test_each_format_is_in_the_docs() -> None:
    page = (DOCS / "data.md").read_text()
    for name in get_args(FORMATS):
        short = name.partition(":")[0]
        _, dot, variant = short.partition(".")
        assert f"`{short}`" in page or (dot and f"`….{variant}`" in page), name


def test_a_built_in_template_that_needs_bos_or_eos_says_so() -> None:
    tokenizer = tiny_tokenizer(None)
    tokenizer.bos_token = None
    with pytest.raises(DataError, match=r"alpaca needs a bos_token; set `special_tokens: \{bos_token: …\}`"):
        resolve_template(tokenizer, "alpaca", None)


# ---- weights, parts and long texts ----


def test_parts_by_characters_leave_reasoning_untrained() -> None:
    detail = [{"begin_offset": 4, "end_offset": 6, "train": True}]
    turn = {"role": "assistant", "content": "one two three", "reasoning_content": "hm", "detail": detail}
    messages, marks = marks_of(USER, turn, message_field_training_detail="detail")
    sample = outcome(messages, CHATML, marks=marks)
    assert isinstance(sample, TokenSample)
    assert trained(sample) == [" two", "<|im_end|>"]
    content = [{"type": "text", "text": "one", "train": False}, {"type": "text", "text": " two"}]
    messages, marks = marks_of(USER, {"role": "assistant", "content": content, "reasoning_content": "hm"})
    sample = outcome(messages, CHATML, marks=marks)
    assert isinstance(sample, TokenSample)
    assert trained(sample) == ["<think>\nhm\n</think>\n\n", " two<|im_end|>"]


@pytest.mark.parametrize("weights", [(2, 0.5), (0.5, 2)])
def test_a_token_of_two_parts_has_the_greater_weight(weights: tuple[float, float]) -> None:
    parts = zip(("hel", "lo"), weights, strict=True)
    content = [{"type": "text", "text": text, "weight": weight} for text, weight in parts]
    messages, marks = marks_of(USER, {"role": "assistant", "content": content})
    sample = outcome(messages, marks=marks)
    assert isinstance(sample, TokenSample)
    assert weighted(sample) == [("hello", 2.0), ("<|im_end|>", 1.0)]


def test_a_long_text_is_cut_into_all_of_its_tokens() -> None:
    example = Example("x", segments=[Segment("one two three four five", train=True, num_eos=1)], is_cut_to_fit=True)
    spec = DatasetConfig(path="d", type="completion")
    (whole,) = encode_examples([example], TOKENIZER, spec, DataConfig(datasets=[spec]), None)
    assert isinstance(whole, TokenSample)
    for length in range(2, len(whole.input_ids) + 2):
        cfg = DataConfig(datasets=[spec], sequence_len=length)
        (cut,) = encode_examples([example], TOKENIZER, spec, cfg, None)
        pieces = cut if isinstance(cut, tuple) else (cut,)
        assert np.concatenate([piece.input_ids for piece in pieces]).tolist() == whole.input_ids.tolist()
        assert np.concatenate([piece.labels for piece in pieces]).tolist() == whole.labels.tolist()
        assert {len(piece.input_ids) for piece in pieces[:-1]} <= {length}
        assert 1 <= len(pieces[-1].input_ids) <= length
