"""One data set for the gates: what its survey goes by, and the survey's result, kept beside the store."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from eft.config.data import DataConfig, DatasetConfig
from eft.core import atomic
from eft.core.hashing import hash_json
from eft.core.records import TokenSample
from eft.data.block_set import BlockSet
from eft.data.conversation_text import read_conversation
from eft.data.gates_openings import Openings, learn_openings
from eft.data.gates_survey import Survey, SurveyRules, survey
from eft.data.gates_template import TemplateRules, compare_with_template
from eft.data.ledger import SourceLedger
from eft.data.sample_set import SampleSet, TokenView
from eft.data.shown import special_ids
from eft.data.store import TokenStore
from eft.data.token_facts import TokenizerFacts

if TYPE_CHECKING:  # it needs torch and Pillow, which data without images do not
    from eft.data.gates_images import ImageGate

GATES_VERSION = 1
"""Raised whenever a survey would find something else: kept results are stale."""

_CHUNK = 1024
_NO_TURNS = (None, "completion", "input_output", "pretokenized")
_RULE_KEYS = {
    "type",
    "roles_to_train",
    "train_on_eos",
    "train_on_eot",
    "train_on_inputs",
    "message_field_training",
    "message_field_training_detail",
    "rewritten_history",
    "special_tokens_in_content",
    "generation_tags",
    "turns_to_train",
}
_ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class GatedEntry:
    """An entry of `datasets` or `test_datasets` with its samples."""

    name: str
    spec: DatasetConfig
    cfg: DataConfig
    store: TokenStore | BlockSet
    account: SourceLedger
    tokenizer: PreTrainedTokenizerBase
    template: str | None
    """The Jinja text of its conversations; None where it has none."""
    images: ImageGate | None = None
    """Of rows with images."""

    @property
    def is_as_served(self) -> bool:
        """Its conversations are rendered by the template that is saved with the tokenizer (or none is)."""
        exported = self.tokenizer.chat_template
        return not isinstance(exported, str) or self.template == exported

    def values(self) -> dict[str, Any]:
        """The keys that decide what is right; does not count as reading them (E8): the format has read its own."""
        own = self.spec.model_dump(include=_RULE_KEYS)
        general = self.cfg.model_dump(
            include={"train_on_inputs", "sequence_len", "excess_length_strategy", "eot_tokens"}
        )
        own["train_on_inputs"] = (
            general["train_on_inputs"] if own["train_on_inputs"] is None else own["train_on_inputs"]
        )
        return {**general, **own}


@dataclass(frozen=True)
class GatedData:
    """What the gates judge of a run: its data, or what stands for them."""

    entries: list[GatedEntry]
    """Training data first, in the order of `train.bases`."""
    train: TokenView | None
    """None: there are held-out data only."""
    evals: dict[str, SampleSet]


def surveyed(entry: GatedEntry) -> Survey:
    """The survey of an entry's store: the kept one, or a new one."""
    tokenizer, values = entry.tokenizer, entry.values()
    facts = TokenizerFacts(tokenizer, values["eot_tokens"])
    openings = _openings(entry, facts)
    rules = _rules(entry, values, facts, openings)
    texts = _token_texts(entry, facts)
    if not isinstance(entry.store, TokenStore):
        return survey(entry.store, rules, openings, texts)
    facts_of_survey = [GATES_VERSION, asdict(rules), repr(openings), None if texts is None else len(texts)]
    path = entry.store.path / f"gates-{hash_json(facts_of_survey)[:16]}"
    kept, keys = path.with_suffix(".json"), path.with_suffix(".npy")
    try:
        return Survey.from_json(json.loads(kept.read_text(encoding="utf-8")), np.load(keys))
    except (OSError, ValueError):
        pass
    found = survey(entry.store, rules, openings, texts)
    try:
        atomic.write_bytes(keys, _npy(found.text_keys))
        atomic.write_json(kept, found.to_json())
    except OSError:
        pass  # a store that cannot be written to is surveyed anew each time
    return found


def _npy(values: Any) -> bytes:
    import io

    with io.BytesIO() as file:
        np.save(file, values)
        return file.getvalue()


def _openings(entry: GatedEntry, facts: TokenizerFacts) -> Openings | None:
    template = entry.template or entry.tokenizer.chat_template
    if not isinstance(template, str):
        return None
    renderer: Any = entry.tokenizer if entry.images is None else entry.images.renderer(template)
    return learn_openings(renderer, template, facts)


def _rules(entry: GatedEntry, values: dict[str, Any], facts: TokenizerFacts, openings: Openings | None) -> SurveyRules:
    tokenizer, type_ = entry.tokenizer, values["type"]
    is_own_text = isinstance(type_, str) and ":" in type_ and "." in type_
    ends = {int(tokenizer.eos_token_id)} if tokenizer.eos_token_id is not None else set()
    ends |= set(openings.end_ids if openings is not None else ())
    ends |= {int(tokenizer.convert_tokens_to_ids(token)) for token in values["eot_tokens"] or ()}
    bos = tokenizer.bos_token_id
    plain: list[int] = tokenizer("a")["input_ids"]
    all_roles = tuple(dict.fromkeys([*_ROLES, *(openings.of_role if openings is not None else ())]))
    marked = values["message_field_training"] is not None or values["message_field_training_detail"] is not None
    untrained: tuple[str, ...] | None = tuple(role for role in all_roles if role not in values["roles_to_train"])
    if values["train_on_inputs"]:
        untrained = None
    elif marked:
        untrained = ()
    has_prompts = type_ not in _NO_TURNS and entry.template is None and not is_own_text
    trains_ends = all(values[name] in ("turn", "all", None) for name in ("train_on_eos", "train_on_eot"))
    return SurveyRules(
        ends=tuple(sorted(ends)),
        specials=tuple(sorted({*special_ids(tokenizer), *ends})),
        bos=None if bos is None or bos == tokenizer.eos_token_id else int(bos),
        text_has_bos=bos is not None and plain[:1] == [bos],
        untrained_roles=untrained,
        judges_ends=trains_ends and values["message_field_training_detail"] is None and not values["train_on_inputs"],
        ends_text=type_ == "completion" or has_prompts,
        has_prompts=has_prompts,
        capacity=values["sequence_len"] if values["excess_length_strategy"] == "truncate" else 2**31 - 1,
    )


def _token_texts(entry: GatedEntry, facts: TokenizerFacts) -> list[bytes] | None:
    """What each token writes: of byte-level and of SentencePiece vocabularies; None where neither gives the text."""
    store, tokenizer = entry.store, entry.tokenizer
    shown = [store.sample(index).input_ids[:256].tolist() for index in range(min(4, len(store)))]
    for texts in (facts.token_bytes, _sentencepiece_bytes(tokenizer)):
        if all(_is_text_of(ids, texts, tokenizer) for ids in shown):
            # Of an image nothing is text: what is looked for is the turns around it.
            unwritten = entry.images.placeholders if entry.images is not None else ()
            return [b"" if number in unwritten else text for number, text in enumerate(texts)] if unwritten else texts
    return None


def _is_text_of(ids: list[int], texts: list[bytes], tokenizer: PreTrainedTokenizerBase) -> bool:
    if max(ids) >= len(texts):
        return False
    whole = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    joined = b"".join(texts[number] for number in ids)
    return "".join(whole.split()) == "".join(joined.decode(errors="replace").split())


def _sentencepiece_bytes(tokenizer: PreTrainedTokenizerBase) -> list[bytes]:
    vocabulary = tokenizer.get_vocab()
    texts = [b""] * (max(vocabulary.values()) + 1)
    for token, number in vocabulary.items():
        is_byte = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
        texts[number] = bytes([int(token[3:5], 16)]) if is_byte else token.replace("▁", " ").encode(errors="replace")
    for number, added in tokenizer.added_tokens_decoder.items():
        texts[number] = added.content.encode()
    return texts


def compared(entry: GatedEntry, most: int | None) -> tuple[list[tuple[int, str]], int]:
    """Samples that differ from `apply_chat_template`, with what differs, and how many were compared.

    Args:
        entry: the data set.
        most: how many conversations, evenly spread; None: all.
    """
    if entry.template is None or not len(entry.store):
        return [], 0
    values = entry.values()
    may_split = values["rewritten_history"] == "split"
    if entry.images is not None:
        chosen = [(index, conversation) for index, _, conversation in _conversations(entry.store, most)]
        found = list(entry.images.compared(chosen, entry.template, may_split=may_split))
        return [(index, fault) for index, fault in found if fault is not None], len(found)
    facts = TokenizerFacts(entry.tokenizer, values["eot_tokens"])
    only_assistant = values["roles_to_train"] == ["assistant"] and not values["train_on_inputs"]
    marked = values["message_field_training_detail"] is not None or values["message_field_training"] is not None
    rules = TemplateRules(
        template=entry.template,
        has_prompts=only_assistant
        and not marked
        and values["train_on_eos"] != "all"
        and values["train_on_eot"] != "all",
        may_split=may_split,
        may_cut=values["excess_length_strategy"] == "truncate",
        skips_special_text=values["special_tokens_in_content"] == "escape",
    )
    faults, judged = [], 0
    samples = _conversations(entry.store, most)
    while chunk := list(islice(samples, _CHUNK)):
        for index, fault in compare_with_template(chunk, entry.tokenizer, rules, facts):
            judged += 1
            if fault is not None:
                faults.append((index, fault))
    return faults, judged


def _conversations(store: TokenStore | BlockSet, most: int | None) -> Iterator[tuple[int, TokenSample, dict[str, Any]]]:
    """(number, sample, conversation) of `most` samples, evenly spread, or of all."""
    if most is not None and most < len(store):
        for index in np.unique(np.linspace(0, len(store) - 1, most, dtype=np.int64)).tolist():
            conversation = store.conversation(index)
            if conversation is not None:
                yield index, store.sample(index), conversation
        return
    index = 0
    for block in store.blocks():
        for text in block.conversations:
            if text is not None:
                yield index, store.sample(index), read_conversation(text)
            index += 1
