"""Every seeded fault stops the run at its gate, through `eft.load_datasets`; clean data of many formats pass all."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import eft
from eft.config.templates import BUILT_IN_TEMPLATES
from eft.core.errors import DataError, DataGateError
from eft.data import gates
from eft.data.dataset_meta import DatasetMeta
from eft.data.gates import GATES
from tests.tiny import CHATML, SPECIALS, tiny_tokenizer

WITH_BOS = "{{ bos_token }}" + CHATML
TAGGED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CITIES = ("Rome", "Paris", "Oslo", "Bern", "Lima", "Cairo", "Quito", "Seoul", "Delhi", "Kyiv")
Parts = list[tuple[str, bool]]
"""Texts of a row that is given as ids, and whether each is trained."""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EFT_CACHE", str(tmp_path / "cache"))


def conversation(index: int) -> list[dict[str, Any]]:
    city = f"{CITIES[index % 10]} {index}"
    return [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": f"Where is {city}?"},
        {"role": "assistant", "content": f"{city} is on the map."},
        {"role": "user", "content": "Are you sure?"},
        {"role": "assistant", "content": f"Yes, {city} it is."},
    ]


def chats(count: int = 20) -> list[dict[str, Any]]:
    return [{"messages": conversation(index)} for index in range(count)]


def parts_of(messages: list[dict[str, Any]]) -> Parts:
    """A conversation in ChatML as it ought to be trained."""
    parts: Parts = []
    for message in messages:
        trained = message["role"] == "assistant"
        parts += [(f"<|im_start|>{message['role']}\n", False), (message["content"], trained)]
        parts += [("<|im_end|>", trained), ("\n", False)]
    return parts


def given(parts: Parts, tokenizer: Any) -> dict[str, Any]:
    """Ids and labels, as somebody else would have prepared them."""
    ids: list[int] = []
    labels: list[int] = []
    for text, trained in parts:
        piece = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += piece
        labels += piece if trained else [-100] * len(piece)
    return {"input_ids": ids, "labels": labels}


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(
    tmp_path: Path,
    rows: list[dict[str, Any]],
    tokenizer: Any = None,
    *,
    type: Any = "chat_template",
    held_out: list[dict[str, Any]] | None = None,
    stop: bool = True,
    entry: dict[str, Any] | None = None,
    **keys: Any,
) -> DatasetMeta:
    """`eft.load_datasets` over rows of one data set."""
    datasets = [{"path": write(tmp_path / "rows.jsonl", rows), "type": type, **(entry or {})}]
    if held_out is not None:
        keys["test_datasets"] = [{"path": write(tmp_path / "held_out.jsonl", held_out), "type": type}]
    config = {"base_model": "none", "learning_rate": 1e-3, "num_epochs": 1, "datasets": datasets, **keys}
    return eft.load_datasets(config, tokenizer or tiny_tokenizer(), stop_at_gates=stop)


def load_given(
    tmp_path: Path, change: Callable[[int, Parts], Parts], template: str = CHATML, **keys: Any
) -> DatasetMeta:
    """Twenty conversations as ids and labels, with a fault in each that `change` puts there."""
    tokenizer = tiny_tokenizer(template)
    rows = [given(change(index, parts_of(conversation(index))), tokenizer) for index in range(20)]
    return load(tmp_path, rows, tokenizer, type="pretokenized", **keys)


def stopped(match: str) -> Any:
    return pytest.raises(DataGateError, match=rf"(?s)over the limit of.*  {match}")


# ---- seeded faults ----


def test_mask_of_zeros(tmp_path: Path) -> None:
    def fault(index: int, parts: Parts) -> Parts:
        return [(text, trained and index % 2 == 0) for text, trained in parts]

    with stopped("untrained_rows: rows: 10 of 20 rows"):
        load_given(tmp_path, fault)
    with pytest.raises(DataError, match="none of its 20 rows can be trained on"):
        load_given(tmp_path, lambda _, parts: [(text, False) for text, _ in parts])


def test_mask_of_ones(tmp_path: Path) -> None:
    with stopped("fully_trained: rows: 20 of 20 samples") as caught:
        load_given(tmp_path, lambda _, parts: [(text, True) for text, _ in parts])
    assert "headers" in str(caught.value)
    assert "other_roles" in str(caught.value)


def test_double_bos(tmp_path: Path) -> None:
    with stopped("bos: rows: 20 of 20 samples without exactly one BOS"):
        load_given(tmp_path, lambda _, parts: [("<|endoftext|><|endoftext|>", False), *parts], WITH_BOS)


def test_double_bos_by_the_template(tmp_path: Path) -> None:
    with stopped("bos: rows: 20 of 20"):
        load(tmp_path, chats(), tiny_tokenizer("{{ bos_token }}" + WITH_BOS))


def test_missing_bos(tmp_path: Path) -> None:
    with stopped("bos: rows: 20 of 20"):
        load_given(tmp_path, lambda _, parts: parts, WITH_BOS)


def test_bos_in_the_middle(tmp_path: Path) -> None:
    with stopped("bos: rows: 20 of 20"):
        load_given(
            tmp_path, lambda _, p: [("<|endoftext|>", False), *p[:8], ("<|endoftext|>", False), *p[8:]], WITH_BOS
        )


def test_eos_untrained_because_padding_is_eos(tmp_path: Path) -> None:
    def fault(_: int, parts: Parts) -> Parts:
        return [(text, trained and text != "<|im_end|>") for text, trained in parts]

    with stopped("end_tokens: rows: 40 of 40 trained turns whose end token is not trained") as caught:
        load_given(tmp_path, fault)
    assert "mask padding by position" in str(caught.value)


def test_end_token_missing(tmp_path: Path) -> None:
    def fault(_: int, parts: Parts) -> Parts:
        return [part for part in parts if part != ("<|im_end|>", True)]

    with stopped("end_tokens: rows: 40 of 40"):
        load_given(tmp_path, fault)


def test_last_answer_without_end(tmp_path: Path) -> None:
    with stopped("end_tokens: rows: 20 of 40"):
        load_given(tmp_path, lambda _, parts: parts[:-2])


def test_end_token_outside_the_generation_tag(tmp_path: Path) -> None:
    template = TAGGED.replace(
        "{{ m.content + '<|im_end|>' }}{% endgeneration %}", "{{ m.content }}{% endgeneration %}{{ '<|im_end|>' }}"
    )
    with stopped("end_tokens: rows: 40 of 40") as caught:
        load(tmp_path, chats(), tiny_tokenizer(template))
    assert "generation_tags: ignore" in str(caught.value)
    load(tmp_path, chats(), tiny_tokenizer(template), entry={"generation_tags": "ignore"})


def test_header_trained(tmp_path: Path) -> None:
    def fault(_: int, parts: Parts) -> Parts:
        return [(text, trained or text == "<|im_start|>assistant\n") for text, trained in parts]

    with stopped("headers: rows: 20 of 20 samples that train a turn's opening"):
        load_given(tmp_path, fault)


def test_header_inside_the_generation_tag(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ '<|im_start|>assistant\n' }}"
        "{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    with stopped("headers: rows: 20 of 20"):
        load(tmp_path, chats(), tiny_tokenizer(template))


@pytest.mark.parametrize("role", ["system", "user", "tool"])
def test_another_roles_turn_trained(tmp_path: Path, role: str) -> None:
    def fault(_: int, parts: Parts) -> Parts:
        parts = [
            *parts[:12],
            ("<|im_start|>tool\n", False),
            ("21 degrees", False),
            ("<|im_end|>", False),
            ("\n", False),
            *parts[12:],
        ]
        of_role = [number for number, (text, _) in enumerate(parts) if text == f"<|im_start|>{role}\n"]
        return [(text, trained or number - 1 in of_role) for number, (text, trained) in enumerate(parts)]

    with stopped("other_roles: rows: 20 of 20 samples"):
        load_given(tmp_path, fault)


def test_tool_result_inside_the_generation_tag(tmp_path: Path) -> None:
    template = TAGGED.replace("m.role == 'assistant' %}", "m.role in ['assistant', 'tool'] %}")
    turns = [*conversation(0)[:3], {"role": "tool", "content": "21 degrees"}, *conversation(0)[3:]]
    with stopped("other_roles: rows: 20 of 20"):
        load(tmp_path, [{"messages": turns}] * 20, tiny_tokenizer(template), data_gate_limits={"duplicates": 1.0})


def test_empty_reasoning_trained(tmp_path: Path) -> None:
    def fault(_: int, parts: Parts) -> Parts:
        return [
            (f"<think>\n\n</think>\n\n{text}" if trained and text != "<|im_end|>" else text, trained)
            for text, trained in parts
        ]

    with stopped("empty_reasoning: rows: 20 of 20 samples that train an empty block of reasoning"):
        load_given(tmp_path, fault)


def test_empty_reasoning_inside_the_generation_tag(tmp_path: Path) -> None:
    template = TAGGED.replace(
        "{% generation %}{{ m.content", "{% generation %}{{ '<think>\n\n</think>\n\n' + m.content"
    )
    with stopped("empty_reasoning: rows: 20 of 20"):
        load(tmp_path, chats(), tiny_tokenizer(template))


def test_held_out_row_that_training_has_but_for_case_and_blanks(tmp_path: Path) -> None:
    turns = [
        {**turn, "content": turn["content"].upper().replace(" ", "  ").replace(".", " !")} for turn in conversation(3)
    ]
    held_out = [{"messages": turns}, *({"messages": conversation(index)} for index in range(100, 105))]
    with stopped("leaks: eval: 1 of 6 held-out samples") as caught:
        load(tmp_path, chats(), held_out=held_out)
    assert "rows.jsonl row 4" in str(caught.value)
    assert "a row of eval has the same text" in str(caught.value)


def test_exact_copy_of_a_held_out_row(tmp_path: Path) -> None:
    """It leaves the training part, and the gate says so."""
    held_out = [{"messages": conversation(index)} for index in (3, 100, 101)]
    meta = load(tmp_path, chats(), held_out=held_out)
    assert len(meta.train_dataset) == 19
    assert meta.gates is not None
    (leaks,) = [result for result in meta.gates.results if result.gate == "leaks"]
    assert (leaks.faulty, leaks.judged, leaks.note) == (0, 3, "1 exact copies were left out of training")


def test_duplicates(tmp_path: Path) -> None:
    with stopped("duplicates: rows: 10 of 30 samples equal to an earlier one"):
        load(tmp_path, [*chats(), *chats(10)])
    load(tmp_path, [*chats(), *chats(10)], dataset_exact_deduplication=True)


def test_answers_cut_off(tmp_path: Path) -> None:
    rows = [
        {"messages": [conversation(i)[1], {"role": "assistant", "content": "one two three " * 30}]} for i in range(20)
    ]
    with pytest.raises(DataGateError, match=r"over the limit of a gate:\n  cut_answers: rows: 20 of 20 samples"):
        load(tmp_path, rows, excess_length_strategy="truncate", sequence_len=32)


def test_template_that_is_not_the_one_that_is_served(tmp_path: Path) -> None:
    with stopped("template: rows: 20 of 20 conversations that apply_chat_template gives otherwise") as caught:
        load(tmp_path, chats(), entry={"chat_template": "zephyr"})
    assert "another template than the one that is saved" in str(caught.value)


def test_training_that_begins_elsewhere_than_the_prompt_ends(tmp_path: Path) -> None:
    """The prompt of a server would end before `Well: `, which the template writes without the tag."""
    template = TAGGED.replace("{% generation %}{{ m.content", "{{ 'Well: ' }}{% generation %}{{ m.content")
    with stopped("template: rows: 20 of 20") as caught:
        load(tmp_path, chats(), tiny_tokenizer(template))
    assert "no prompt of apply_chat_template ends where training begins" in str(caught.value)


def test_generation_prompt_of_another_template(tmp_path: Path) -> None:
    template = TAGGED.replace("{{ '<|im_start|>assistant\n' }}{% endif %}", "{{ '<|im_start|>model\n' }}{% endif %}")
    with pytest.raises(DataError, match="the text before this turn is not the prompt"):
        load(tmp_path, chats(), tiny_tokenizer(template))


def test_ids_that_are_not_the_templates(tmp_path: Path) -> None:
    """A store whose ids were changed behind its back."""
    meta = load(tmp_path, chats())
    (file,) = Path(meta.cache_note.split("tokenised into ")[1].split(" (")[0]).glob("tokens-00000.arrow")
    ids = meta.train_dataset.sample(0).input_ids
    content = file.read_bytes()
    at = content.index(ids.tobytes())
    changed = ids.copy()
    changed[5] += 1
    file.write_bytes(content[:at] + changed.tobytes() + content[at + len(changed.tobytes()) :])
    with stopped("template: rows: 1 of 20 conversations") as caught:
        load(tmp_path, chats())
    assert "from token 5 on apply_chat_template gives" in str(caught.value)


def test_the_worst_rows_come_with_the_error(tmp_path: Path) -> None:
    with stopped("headers") as caught:
        load_given(tmp_path, lambda _, p: [(text, trained or "assistant" in text) for text, trained in p])
    row = caught.value.rows[0]
    assert "rows.jsonl row 1: " in row.title
    assert "tokens," in row.title
    assert ("assistant\n", "trained") in row.pieces or any(kind == "trained special" for _, kind in row.pieces)
    assert row.note.startswith("headers")


# ---- clean data ----


def passes(meta: DatasetMeta) -> dict[str, str]:
    assert meta.gates is not None
    assert meta.gates.over == []
    assert meta.gates.unlocated == {}
    return {result.gate: result.status for result in meta.gates.results}


NO_SYSTEM = ("gemma", "mistral_v1", "mistral_v2v3", "mistral_v3_tekken")


@pytest.mark.parametrize("name", BUILT_IN_TEMPLATES)
def test_clean_conversations_pass_with_every_built_in_template(tmp_path: Path, name: str) -> None:
    tokenizer = tiny_tokenizer(None, specials=tuple(t for t in BUILT_IN_TEMPLATES[name] if t not in SPECIALS))
    rows = [{"messages": conversation(index)[name in NO_SYSTEM :]} for index in range(20)]
    rows += [{"messages": conversation(index)[1:]} for index in range(100, 105)]
    meta = load(tmp_path, rows, tokenizer_with(tokenizer, name), chat_template=name)
    states = passes(meta)
    assert states["template"] == states["headers"] == states["other_roles"] == "pass"
    assert meta.gates is not None
    roles = meta.gates.roles["rows"]
    trained = {role: count for role, (_, count) in roles.items() if count}
    wanted = int(meta.train_dataset.trainable_counts.sum())
    assert sum(trained.values()) == wanted
    # GLM's habit: what opens the user's turn also ends the assistant's.
    assert trained["assistant"] == wanted


def tokenizer_with(tokenizer: Any, name: str) -> Any:
    """As `prepare_tokenizer` leaves it: with the template of the run."""
    from eft.data.chat_template import resolve_template

    tokenizer.chat_template = resolve_template(tokenizer, name, None)
    return tokenizer


def test_tools_and_reasoning_pass(tmp_path: Path) -> None:
    call = [{"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Rome"}}}]
    tools = [
        {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {}}}}
    ]
    rows: list[dict[str, Any]] = [
        {
            "messages": [
                {"role": "user", "content": f"Weather {index}?"},
                {"role": "assistant", "content": "", "tool_calls": call},
                {"role": "tool", "content": f"{index} degrees", "name": "get_weather"},
                {"role": "assistant", "content": f"It is {index}.", "reasoning_content": "one two"},
            ],
            "tools": tools,
        }
        for index in range(20)
    ]
    for name in ("chatml", "qwen3", "qwen_25"):
        specials = tuple(t for t in BUILT_IN_TEMPLATES[name] if t not in SPECIALS)
        rows_of = (
            rows
            if name in ("chatml", "qwen3")
            else [
                {**row, "messages": [{k: v for k, v in m.items() if k != "reasoning_content"} for m in row["messages"]]}
                for row in rows
            ]
        )
        tokenizer = tokenizer_with(tiny_tokenizer(None, specials=specials), name)
        meta = load(tmp_path, rows_of, tokenizer, chat_template=name)
        assert passes(meta)["template"] == "pass"
        assert meta.gates is not None
        assert meta.gates.roles["rows"]["tool"][1] == 0


def test_rewritten_history_passes(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(tiny_tokenizer(None), "qwen3")
    rows = chats()
    for row in rows:
        row["messages"][2]["reasoning_content"] = row["messages"][4]["reasoning_content"] = "one two three"
    meta = load(tmp_path, rows, tokenizer, chat_template="qwen3")
    assert len(meta.train_dataset) == 40
    assert passes(meta)["template"] == "pass"


SIMPLE: dict[str, tuple[Any, list[dict[str, Any]]]] = {
    "alpaca": ("alpaca", [{"instruction": f"Say {i}.", "input": "", "output": f"{i}!"} for i in range(20)]),
    "sharegpt": (
        "sharegpt",
        [
            {"conversations": [{"from": "human", "value": f"Hi {i}"}, {"from": "gpt", "value": f"{i}"}]}
            for i in range(20)
        ],
    ),
    "plain text, cut into pieces": ("completion", [{"text": f"{i} hello world " * 80} for i in range(5)]),
    "pieces": (
        "input_output",
        [
            {"segments": [{"text": f"Q{i}", "label": False}, {"text": f"A{i}<|im_end|>", "label": True}]}
            for i in range(9)
        ],
    ),
    "ids, all trained": ("pretokenized", [{"input_ids": [9, 8, 7, i], "labels": [9, 8, 7, i]} for i in range(4, 40)]),
    "a prompt of one's own": (
        {"field_instruction": "q", "field_output": "a", "format": "{instruction} →"},
        [{"q": f"{i}?", "a": f"{i}."} for i in range(9)],
    ),
    "a single role": (
        "chat_template",
        [{"messages": [{"role": "assistant", "content": f"Line {i}."}]} for i in range(9)],
    ),
    "JSON answers and one letter": (
        "chat_template",
        [
            {"messages": [{"role": "user", "content": u}, {"role": "assistant", "content": a}]}
            for u, a in [("a", "s"), ("user", "assistant"), ("\n x", "im"), ('{"a": 1}', "[]"), ("é", "😀"), ("m", "t")]
        ],
    ),
}


@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize("name", SIMPLE)
def test_other_formats_pass(tmp_path: Path, name: str, add_bos: bool) -> None:
    type_, rows = SIMPLE[name]
    passes(load(tmp_path, rows, tiny_tokenizer(add_bos=add_bos), type=type_, sequence_len=128))


@pytest.mark.parametrize(
    "entry",
    [
        {"roles_to_train": ["user", "assistant"]},
        {"train_on_eos": "none"},
        {"train_on_eos": "all"},
        {"train_on_eos": "last"},
        {"turns_to_train": "last"},
        {"train_on_inputs": True},
        {"roles_to_train": ["system", "user", "assistant"]},
    ],
)
def test_what_was_asked_for_passes(tmp_path: Path, entry: dict[str, Any]) -> None:
    passes(load(tmp_path, chats(), entry=entry))


def test_marks_of_rows_pass(tmp_path: Path) -> None:
    rows = chats()
    for row in rows:
        row["messages"][1]["train"] = True
        row["messages"][2]["train"] = False
    passes(load(tmp_path, rows, entry={"message_field_training": "train"}))
    for row in rows:
        row["messages"][2]["parts"] = [{"begin_offset": 0, "end_offset": 3, "train": True}]
    passes(load(tmp_path, rows, entry={"message_field_training_detail": "parts"}))


def test_content_that_quotes_openings_passes(tmp_path: Path) -> None:
    """`keep`: the row's own text has special tokens, which are its own."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"What is USER: {i} <think></think>?"},
                {"role": "assistant", "content": "<think>\n\n</think>\n\nNo."},
            ]
        }
        for i in range(9)
    ]
    passes(load(tmp_path, rows))


def test_a_function_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("gates_formats")
    module.turns = lambda row: {"messages": row["messages"]}  # type: ignore[attr-defined]
    module.__file__ = __file__
    monkeypatch.setitem(sys.modules, "gates_formats", module)
    passes(load(tmp_path, chats(), type="gates_formats:turns"))


# ---- limits, actions, keeping ----


def test_limits_and_actions(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [*chats(), *chats(10)]
    meta = load(tmp_path, rows, data_gate_limits={"duplicates": 0.5})
    passes(meta)
    caplog.clear()
    meta = load(tmp_path, rows, data_gates="warn")
    assert meta.gates is not None
    assert [result.gate for result in meta.gates.over] == ["duplicates"]
    assert "duplicates: rows: 10 of 30" in caplog.text
    assert load(tmp_path, rows, data_gates="off").gates is None
    assert meta.ledger is not None
    assert {gate["gate"] for gate in meta.ledger.to_json()["gates"]} >= set(GATES) - {"leaks"}


def test_an_unknown_gate_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError.__mro__[1], match="duplicate"):
        load(tmp_path, chats(), data_gate_limits={"duplicate": 0.5})


def test_a_survey_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(tmp_path, chats())

    def never(*_: Any) -> Any:
        raise AssertionError("the kept survey was not used")

    from eft.data import gates_entry

    monkeypatch.setattr(gates_entry, "survey", never)
    load(tmp_path, chats(), seed=7)
    with pytest.raises(AssertionError, match="kept survey"):
        load(tmp_path, chats(), entry={"roles_to_train": ["user"]})


def test_results_name_every_gate(tmp_path: Path) -> None:
    meta = load(tmp_path, chats(), held_out=[{"messages": conversation(200)}])
    assert meta.gates is not None
    assert {result.gate for result in meta.gates.results} == set(GATES)
    assert "checks hold" in meta.gates.line()
    assert "21 of 21 conversations compared" in meta.gates.line()


def test_role_shares_are_exact(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    meta = load(tmp_path, chats(), tokenizer)
    assert meta.gates is not None
    roles = meta.gates.roles["rows"]
    assert sum(size for size, _ in roles.values()) == int(meta.train_dataset.lengths.sum())
    wanted = 0
    for row in chats():
        for turn in row["messages"]:
            if turn["role"] == "assistant":
                wanted += len(tokenizer(turn["content"] + "<|im_end|>")["input_ids"])
    assert roles["assistant"][1] == wanted
    assert roles["user"][1] == roles["system"][1] == 0
    assert np.isclose(gates.GateResult("bos", "x", 1, 4, 0.0).share, 0.25)
