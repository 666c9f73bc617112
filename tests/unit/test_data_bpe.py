"""The fast encoder: the tokenizer's own ids on every text, or it is not used."""

from __future__ import annotations

import pickle
import unicodedata
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from eft.data import bpe
from eft.data.alignment import exact_offsets, labelled
from eft.data.bpe import _PIECES, KNOWN_RULES, FastEncoder, adversarial_texts, fast_encoder, first_difference
from eft.data.fast_tokenizer import FastTokenizer
from eft.data.token_facts import TokenizerFacts
from eft.data.turns import Span

CORPUS = [
    "The quick brown fox doesn't jump over the lazy dog's 1234567 fences, 'LL and 'Ve.\n\n  Indent\r\n\tcode() 123 456",
    "Grüße aus Köln, naïve café; 中文分词 和 日本語のテキスト; 한국어; हिन्दी में; עברית; ١٢٣ Ⅷ ½ 😀😀 👩\u200d🚀",
    "def f(x):\n    return {'a': x['b'] + 1}  # comment\n\n\nclass A:\n        pass\n" * 3,
]
PLAIN = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}


def split(pattern: str) -> Any:
    parts = [pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level(use_regex=False)]
    return pre_tokenizers.Sequence(parts)


def byte_level(**options: Any) -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, **options)


PRE_TOKENIZERS = {
    "gpt2": lambda: byte_level(),
    "digits": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level()]),
    **{f"cl100k {number}": lambda pattern=pattern: split(pattern) for number, pattern in enumerate(KNOWN_RULES)},
}


@cache
def a_tokenizer(
    pre_tokenizer: str = "gpt2", normalizes: bool = False, ignores_merges: bool = False, without: str = ""
) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.BPE(ignore_merges=ignores_merges))
    inner.pre_tokenizer = PRE_TOKENIZERS[pre_tokenizer]()
    if normalizes:
        inner.normalizer = normalizers.NFC()
    alphabet = [sign for sign in pre_tokenizers.ByteLevel.alphabet() if sign not in without]
    trainer = trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=alphabet, special_tokens=["<|start|>", "<|end|>"], show_progress=False
    )
    inner.train_from_iterator(CORPUS, trainer)
    others = ("<think>", True), ("</think>", False), ("  \n", True), ("<|end|>x", False)
    inner.add_tokens([AddedToken(text, normalized=normalized) for text, normalized in others])
    inner.decoder = decoders.ByteLevel()
    inner.post_processor = processors.ByteLevel(trim_offsets=True)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>")


def encoder_of(tokenizer: PreTrainedTokenizerFast) -> FastEncoder:
    encoder = fast_encoder(tokenizer, CORPUS)
    assert isinstance(encoder, FastEncoder), encoder
    return encoder


@pytest.mark.parametrize("pre_tokenizer", PRE_TOKENIZERS)
@pytest.mark.parametrize("options", [{}, {"normalizes": True}, {"ignores_merges": True}], ids=str)
def test_every_known_tokenizer_passes_its_proof(pre_tokenizer: str, options: dict[str, bool]) -> None:
    encoder_of(a_tokenizer(pre_tokenizer, **options))


PIECES = st.sampled_from(
    [*_PIECES, "<|start|>", "<|end|>", "<think>", "</think>", "  \n", "<|end", "\u0345", "\u1e9b\u0323"]
)
TEXTS = st.lists(st.one_of(st.text(max_size=12), PIECES, st.text("abz  \n\r'sS019.", max_size=12)), max_size=14).map(
    "".join
)


@settings(max_examples=150, deadline=None)
@given(texts=st.lists(TEXTS, max_size=4), which=st.sampled_from(list(PRE_TOKENIZERS)), normalizes=st.booleans())
def test_equal_ids_on_any_text(texts: list[str], which: str, normalizes: bool) -> None:
    tokenizer = a_tokenizer(which, normalizes)
    fast = FastTokenizer(tokenizer, _encoder(which, normalizes))
    assert fast(texts, **PLAIN)["input_ids"] == tokenizer(texts, **PLAIN)["input_ids"] if texts else True


@cache
def _encoder(which: str, normalizes: bool) -> FastEncoder:
    return FastEncoder(a_tokenizer(which, normalizes).backend_tokenizer.to_str())


@settings(max_examples=30, deadline=None)
@given(
    words=st.lists(st.binary(min_size=1, max_size=40).map(lambda data: data.decode("latin-1")), min_size=1),
    which=st.sampled_from(list(PRE_TOKENIZERS)),
)
def test_words_of_all_lengths_are_known_again_and_told_apart(words: list[str], which: str) -> None:
    # Of words that differ in their end only, in what follows them, or in zero bytes there.
    letters = ["a" * count for count in range(1, 40)]
    ends = [word[:-1] + end for word in letters for end in "bqA"]  # a bit apart from each other
    alike = [*words, *letters, *ends, *(word + "\0" for word in words)]
    texts = [between.join(alike) for between in (" ", "é", "!")] * 2
    encoder = FastEncoder(a_tokenizer(which).backend_tokenizer.to_str())
    assert first_difference(encoder, a_tokenizer(which), texts) is None


def test_too_many_long_tokens_that_come_before_merges_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bpe, "_WORD_SLOTS", 16)
    tokenizer = a_tokenizer(ignores_merges=True)
    encoder_of(tokenizer)
    monkeypatch.setattr(bpe, "SHORT_WORD", 0)
    assert fast_encoder(tokenizer, CORPUS) == "a vocabulary of very long tokens"


@pytest.mark.parametrize("piece", ["a", "ab", " ", "x\n", "\u00e9", "12", "'s"])
def test_long_runs_are_merged_as_short_ones(piece: str) -> None:
    tokenizer = a_tokenizer()
    texts = [piece * count for count in (1, 23, 24, 25, 48, 49, 50, 97, 1000, 20_000)]
    assert first_difference(_encoder("gpt2", False), tokenizer, texts) is None


def test_bytes_without_a_token_are_left_to_the_tokenizer() -> None:
    tokenizer = a_tokenizer(without="Ć")  # GPT-2's sign for the byte 6
    encoder = encoder_of(tokenizer)
    assert encoder.can_encode(encoder.batch(["abc", "\x06"])) == [True, False]
    texts = ["abc", "\x06", "the \x06 dog", "dog"]
    assert FastTokenizer(tokenizer, encoder)(texts, **PLAIN)["input_ids"] == tokenizer(texts, **PLAIN)["input_ids"]


def test_what_is_not_normal_is_left_to_the_tokenizer() -> None:
    encoder = _encoder("gpt2", True)
    assert encoder.can_encode(encoder.batch(["caf\u00e9", "cafe\u0301", "\u0378"])) == [True, False, False]


def with_json(change: Any) -> PreTrainedTokenizerFast:
    import json

    facts = json.loads(a_tokenizer().backend_tokenizer.to_str())
    change(facts)
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(facts)))


UNSUPPORTED = {
    "its normaliser Lowercase": lambda facts: facts.update(normalizer={"type": "Lowercase"}),
    "its pre-tokeniser Whitespace": lambda facts: facts.update(pre_tokenizer={"type": "Whitespace"}),
    "its pre-tokeniser ByteLevel": lambda facts: facts["pre_tokenizer"].update(add_prefix_space=True),
    "which takes blanks around it": lambda facts: facts["added_tokens"][0].update(rstrip=True),
    "dropout of its model": lambda facts: facts["model"].update(dropout=0.5),
}


@pytest.mark.parametrize("why", UNSUPPORTED)
def test_other_tokenizers_are_named(why: str) -> None:
    found = fast_encoder(with_json(UNSUPPORTED[why]), CORPUS)
    assert isinstance(found, str)
    assert why in found


def test_an_unknown_rule_is_named() -> None:
    inner = Tokenizer.from_str(a_tokenizer().backend_tokenizer.to_str())
    inner.pre_tokenizer = split(r"\p{L}+|\P{L}+")
    found = fast_encoder(PreTrainedTokenizerFast(tokenizer_object=inner), CORPUS)
    assert found == "the regular expression of its pre-tokeniser"


def test_truncation_that_an_earlier_call_left_does_not_spoil_the_proof() -> None:
    tokenizer = a_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(2)
    encoder_of(tokenizer)


def test_a_wrong_encoder_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers one by one where the tokenizer takes three at a time: ordinary text hardly shows it."""
    one, three = [pattern for pattern, (_, digits, _) in KNOWN_RULES.items() if r"\p{M}" not in pattern]
    monkeypatch.setitem(KNOWN_RULES, three, KNOWN_RULES[one])
    found = fast_encoder(a_tokenizer("cl100k 1"), ["no numbers here"])
    assert isinstance(found, str)
    assert found.startswith("other ids for ")


def test_a_pickled_encoder_encodes_the_same() -> None:
    encoder = _encoder("cl100k 1", False)
    copy = pickle.loads(pickle.dumps(encoder))
    for _ in range(2):  # words that were not seen before, and words that were
        one, other = (each.encode(each.batch(CORPUS)).ids for each in (encoder, copy))
        np.testing.assert_array_equal(one, other)


def test_the_adversarial_texts_hold_the_added_tokens() -> None:
    texts = adversarial_texts(["<|end|>"])
    assert "<|end|>'s" in texts
    assert len(texts) > 8000


@settings(max_examples=80, deadline=None)
@given(texts=st.lists(TEXTS, min_size=1, max_size=3), data=st.data())
def test_labels_are_those_of_the_tokenizer(texts: list[str], data: st.DataObject) -> None:
    tokenizer = a_tokenizer()
    facts = TokenizerFacts(tokenizer)
    fast = FastTokenizer(tokenizer, _encoder("gpt2", False))
    spans: list[list[Span] | None] = []
    for text in texts:
        cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=6)))
        weight = data.draw(st.sampled_from([1.0, 1.0, 0.5]))
        own = [Span(first, last, weight) for first, last in zip(cuts[::2], cuts[1::2], strict=False)]
        spans.append(own if data.draw(st.booleans()) else None)
    reference = tokenizer(texts, return_offsets_mapping=True, **PLAIN)
    found = fast.labelled(texts, spans, facts)
    for text, ids, offsets, own, sample in zip(
        texts, reference["input_ids"], reference["offset_mapping"], spans, found, strict=True
    ):
        assert sample is not None  # a byte-level vocabulary without a normaliser takes every text
        expected = labelled(ids, exact_offsets(ids, offsets, text, facts), own, facts)
        np.testing.assert_array_equal(sample.input_ids, expected.input_ids)
        np.testing.assert_array_equal(sample.labels, expected.labels)
        assert (sample.weights is None) is (expected.weights is None)
        if expected.weights is not None:
            np.testing.assert_array_equal(sample.weights, expected.weights)


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(TEXTS, min_size=1, max_size=4))
def test_only_what_may_not_be_normal_is_left_to_a_tokenizer_that_normalises(texts: list[str]) -> None:
    fast = FastTokenizer(a_tokenizer("gpt2", True), _encoder("gpt2", True))
    for text, sample in zip(texts, fast.labelled(texts, [None] * len(texts), TokenizerFacts(fast)), strict=True):
        is_normal = unicodedata.is_normalized("NFC", text)
        is_known = all(unicodedata.category(sign) != "Cn" for sign in text)
        assert (sample is not None) is (is_normal and is_known)


def test_other_calls_go_to_the_tokenizer() -> None:
    tokenizer = a_tokenizer()
    fast = FastTokenizer(tokenizer, _encoder("gpt2", False))
    assert fast("the dog")["input_ids"] == tokenizer("the dog")["input_ids"]
    assert fast(["the dog"], add_special_tokens=True)["input_ids"] == tokenizer(["the dog"])["input_ids"]
    assert len(fast) == len(tokenizer)
    assert fast.eos_token_id == tokenizer.eos_token_id
    assert pickle.loads(pickle.dumps(fast)).eos_token == "<|end|>"


def test_blanks_that_the_tokenizer_leaves_out_of_its_offsets_are_where_they_are() -> None:
    """Offsets of `.\\n` end before the break, so the token after it would seem to start there."""
    tokenizer = a_tokenizer("cl100k 0")
    text = "the dog.\n\n<|end|>"
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, facts = encoded["input_ids"], TokenizerFacts(tokenizer)
    offsets = exact_offsets(ids, encoded["offset_mapping"], text, facts)
    assert "".join(text[int(first) : int(last)] for first, last in offsets) == text
    sample = labelled(ids, offsets, [Span(0, len("the dog.\n\n"))], facts)
    assert sample.labels.tolist() == [*ids[:-1], -100]
