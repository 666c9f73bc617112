"""Formats: each turns one row into one `Example`. A new format is one function and one line in `FORMATS`."""

from __future__ import annotations

from eft.config.data import DatasetConfig
from eft.config.formats import is_own_function
from eft.core.errors import DataError, nearest
from eft.data.formats.chat import CHAT_FORMATS, check_roles_to_train
from eft.data.formats.example import UNMARKED, Example, Format, Part, TurnMark
from eft.data.formats.instruct import INSTRUCT_FORMATS
from eft.data.formats.own import function_format, mapping_format
from eft.data.formats.plain import PLAIN_FORMATS, pretokenized

__all__ = [
    "FORMATS",
    "UNMARKED",
    "Example",
    "Format",
    "Part",
    "TurnMark",
    "check_roles_to_train",
    "gives_conversations",
    "resolve_format",
]

FORMATS = {*CHAT_FORMATS, *INSTRUCT_FORMATS, *PLAIN_FORMATS}
"""The names of the built-in formats: those of the three tables."""


def resolve_format(spec: DatasetConfig) -> Format:
    """The format that `type` means, for the rows of this entry: one of `FORMATS`, the pre-tokenised one for null, a
    prompt described by a mapping, or the user's own function (see `own`).

    Raises:
        DataError: no such format, or the function cannot be imported.
    """
    type_ = spec.type
    if type_ is None:
        return pretokenized
    if isinstance(type_, dict):
        return mapping_format(spec.path, type_)
    if type_ in CHAT_FORMATS:
        return CHAT_FORMATS[type_](spec)
    if type_ in FORMATS:
        return (INSTRUCT_FORMATS | PLAIN_FORMATS)[type_]
    base = type_.partition(":")[0]
    if is_own_function(type_) and base not in FORMATS and all(type_.split(":", 1)):
        return function_format(spec.path, type_)
    close = nearest(type_, FORMATS)
    hint = f" Did you mean {close!r}?" if close else ""
    raise DataError(
        f"{spec.path}: type {type_!r} is no format; expected one of those in docs/data.md, such as 'chat_template', "
        f"'alpaca' or 'completion', a mapping with a prompt, or your own as `package.module:function`.{hint}"
    )


def gives_conversations(spec: DatasetConfig) -> bool | None:
    """Whether the format needs a chat template; None for a user's function, which only its result tells."""
    if is_own_function(spec.type):
        return None
    return isinstance(spec.type, str) and spec.type in CHAT_FORMATS
