"""The names of the row formats, and which keys of a data set entry each of them reads."""

from __future__ import annotations

from typing import Literal, get_args

FORMATS = Literal[
    "chat_template",
    "sharegpt",
    "pygmalion",
    "alpaca",
    "alpaca:instruct",
    "alpaca:chat",
    "alpaca:chatml",
    "alpaca_instruct",
    "alpaca_instruct.load_no_prompt",
    "alpaca_chat",
    "alpaca_chat.load_concise",
    "alpaca_chat.load_no_prompt",
    "alpaca_chat.load_qa",
    "alpaca_chat.load_camel_ai",
    "alpaca_w_system",
    "alpaca_w_system.load_chat",
    "alpaca_w_system.load_instruct",
    "alpaca_w_system.load_open_orca",
    "alpaca_w_system.load_open_orca_chatml",
    "gpteacher",
    "gpteacher:instruct",
    "gpteacher:chat",
    "gpteacher:chatml",
    "oasst",
    "oasst:instruct",
    "oasst:chat",
    "oasst:chatml",
    "jeopardy",
    "jeopardy:instruct",
    "jeopardy:chat",
    "jeopardy:chatml",
    "explainchoice",
    "explainchoice:instruct",
    "explainchoice:chat",
    "explainchoice:chatml",
    "concisechoice",
    "summarizetldr",
    "context_qa",
    "context_qa.load_v2",
    "context_qa.load_404",
    "creative_acr.load_answer",
    "orcamini",
    "metharme",
    "completion",
    "input_output",
    "pretokenized",
]
"""The built-in formats; `data.formats.FORMATS` has exactly these names. A user's own is `package.module:function`, or a
mapping with FIELD_MAPPING_KEYS."""

FIELD_MAPPING_KEYS = (
    "system_prompt",
    "system_format",
    "field_system",
    "field_instruction",
    "field_input",
    "field_output",
    "format",
    "no_input_format",
)
"""The keys of a `type` that is a mapping: a prompt of the user's own."""

_MASKS = (
    "roles",
    "roles_to_train",
    "turns_to_train",
    "train_on_eos",
    "train_on_eot",
    "chat_template",
    "chat_template_jinja",
    "rewritten_history",
    "special_tokens_in_content",
    "generation_tags",
)
_TURNS = (
    *_MASKS,
    "field_tools",
    "field_system",
    "field_thinking",
    "template_thinking_key",
    "split_thinking",
    "drop_system_message",
    "message_field_training",
    "message_field_training_detail",
    "message_field_weight",
)
_TRIPLE = ("field_instruction", "field_input", "field_output")
_CHAT = (*_TURNS, "field_messages", "message_property_mappings")
_FORMAT_KEYS: dict[str, tuple[str, ...]] = {
    "chat_template": _CHAT,
    "sharegpt": _TURNS,
    "alpaca": _TRIPLE,
    "alpaca:instruct": _TRIPLE,
    "alpaca:chat": _TRIPLE,
    "alpaca:chatml": _TRIPLE,
    "alpaca_instruct": _TRIPLE,
    "alpaca_instruct.load_no_prompt": _TRIPLE,
    "alpaca_chat": _TRIPLE,
    "alpaca_chat.load_concise": _TRIPLE,
    "alpaca_chat.load_no_prompt": _TRIPLE,
    "alpaca_w_system": (*_TRIPLE, "field_system"),
    "alpaca_w_system.load_chat": (*_TRIPLE, "field_system"),
    "alpaca_w_system.load_instruct": (*_TRIPLE, "field_system"),
    "completion": ("field",),
    "input_output": ("field_segments",),
}
"""Formats that are not listed read fixed columns and no key."""

FORMAT_KEYS = frozenset(name for names in _FORMAT_KEYS.values() for name in names)
"""The keys of an entry that are of use to some formats only."""


def is_own_function(type_: str | dict[str, str | None] | None) -> bool:
    """Whether a `type` is `package.module:function`."""
    return isinstance(type_, str) and ":" in type_ and type_ not in get_args(FORMATS)


def keys_of_format(type_: str | dict[str, str | None] | None) -> frozenset[str]:
    """Those of FORMAT_KEYS that a `type` reads."""
    if is_own_function(type_):
        return frozenset(_MASKS)
    return frozenset(_FORMAT_KEYS.get(type_, ()) if isinstance(type_, str) else ())


def formats_with_key(key: str) -> list[str]:
    """The formats that read a key of FORMAT_KEYS."""
    return [name for name, keys in _FORMAT_KEYS.items() if key in keys]
