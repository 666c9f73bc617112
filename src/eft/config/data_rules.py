"""Rules about formats, masks and chat templates: of one data set entry, and of the run's template."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

from eft.config.axolotl_values import REFUSED_FORMATS, value_advice
from eft.config.data import DataConfig, DatasetConfig
from eft.config.formats import (
    FIELD_MAPPING_KEYS,
    FORMAT_KEYS,
    FORMATS,
    formats_with_key,
    is_own_function,
    keys_of_format,
)
from eft.config.templates import BUILT_IN_TEMPLATES, FALLBACK
from eft.core.errors import nearest

Found = tuple[str, str] | None
"""(key, what is wrong and what to do), or None."""
DatasetRule = Callable[[DatasetConfig], Found]
"""Looks at one entry of `datasets` or `test_datasets`."""

_TEMPLATE_NAMES = ("tokenizer_default", *BUILT_IN_TEMPLATES, "jinja")
_TYPICAL = "`chat_template`, `sharegpt`, `alpaca`, `completion`, `input_output`"

# The run's template


def template_text_needs_jinja(config: DataConfig) -> Found:
    if config.chat_template_jinja is not None and config.chat_template != "jinja":
        return (
            "chat_template_jinja",
            "`chat_template_jinja`: not used because `chat_template` is not `jinja`; set `chat_template: jinja`",
        )
    return None


def jinja_needs_template_text(config: DataConfig) -> Found:
    if config.chat_template == "jinja" and config.chat_template_jinja is None:
        return "chat_template", "`chat_template: jinja`: needs `chat_template_jinja` (the template's text or file)"
    return None


def template_is_known(config: DataConfig) -> Found:
    text = _unknown_template(config.chat_template)
    return ("chat_template", text) if text else None


def _unknown_template(value: str) -> str | None:
    """A word that is neither a built-in name nor looks like a path."""
    name = value.removeprefix(FALLBACK)
    known = _TEMPLATE_NAMES if name == value else tuple(BUILT_IN_TEMPLATES)
    if name in known or "/" in name or "." in name:
        return None
    close = nearest(name, known)
    advice = f"did you mean `{value.removesuffix(name)}{close}`?" if close else value_advice("chat_template", name)
    return f"`chat_template: {value}`: {advice}"


# The mixture


def shares_fit(config: DataConfig) -> Found:
    shares = [entry.token_share for entry in config.datasets]
    total = sum(share or 0.0 for share in shares)
    if total > 1 + 1e-9:
        return "datasets", f"`token_share` of `datasets`: {total:g} together; expected 1 at most"
    if None not in shares and abs(total - 1) > 1e-9:
        return "datasets", f"`token_share` of all `datasets`: {total:g} together; expected 1"
    if None in shares and total > 1 - 1e-9:
        return "datasets", "`token_share` of some `datasets`: 1 together, which leaves nothing for the others"
    if config.epoch_tokens is not None and not total:
        return "epoch_tokens", "`epoch_tokens`: not used because no data set has a `token_share`"
    return None


def shares_are_of_training(config: DataConfig) -> Found:
    for entry in config.test_datasets or ():
        for name in ("weight", "token_share", "max_rows", "max_tokens"):
            if name in entry.changed_keys():
                return (
                    "test_datasets",
                    f"`{name}` of `test_datasets`: held-out data are evaluated as they are; remove it",
                )
    return None


# One data set


def weight_or_share(entry: DatasetConfig) -> Found:
    if entry.token_share is not None and entry.weight != 1.0:
        return "weight", "`weight`: not used because `token_share` says how much of the data set is trained"
    return None


def format_is_known(entry: DatasetConfig) -> Found:
    type_ = entry.type
    known: tuple[str, ...] = get_args(FORMATS)
    if type_ is None or isinstance(type_, dict) or type_ in known:
        return None
    base, _, function = type_.partition(":")
    if is_own_function(type_) and base not in known and base and function:
        return None
    close = nearest(type_, known)
    advice = value_advice("type", type_) if close is None or type_ in REFUSED_FORMATS else f"did you mean `{close}`?"
    return (
        "type",
        f"`type: {type_}`: expected a format of docs/data.md ({_TYPICAL}, …), a mapping with a prompt, or "
        f"`package.module:function`; {advice}",
    )


def prompt_keys_are_known(entry: DatasetConfig) -> Found:
    for name in entry.type if isinstance(entry.type, dict) else ():
        if name not in FIELD_MAPPING_KEYS:
            close = nearest(name, FIELD_MAPPING_KEYS)
            hint = f"; did you mean `{close}`?" if close else f"; it may have {', '.join(FIELD_MAPPING_KEYS)}"
            return "type", f"`type`: unknown key `{name}`{hint}"
    return None


def keys_fit_format(entry: DatasetConfig) -> Found:
    used = keys_of_format(entry.type)
    for name in entry.changed_keys():
        if name in FORMAT_KEYS and name not in used:
            readers = formats_with_key(name)
            shown = ", ".join(f"`{reader}`" for reader in readers[:3]) + (", …" if len(readers) > 3 else "")
            type_ = "a mapping" if isinstance(entry.type, dict) else f"`{entry.type}`"
            return name, f"`{name}`: only used with `type` {shown}, not with {type_}; remove it"
    return None


def own_template_is_known(entry: DatasetConfig) -> Found:
    text = _unknown_template(entry.chat_template) if entry.chat_template is not None else None
    return ("chat_template", text) if text else None


def own_template_text_needs_jinja(entry: DatasetConfig) -> Found:
    if entry.chat_template_jinja is not None and entry.chat_template not in (None, "jinja"):
        return (
            "chat_template_jinja",
            "`chat_template_jinja`: not used because `chat_template` is not `jinja`; set `chat_template: jinja`",
        )
    return None


DATA_RULES: tuple[Callable[[DataConfig], Found], ...] = (
    template_text_needs_jinja,
    jinja_needs_template_text,
    template_is_known,
    shares_fit,
    shares_are_of_training,
)

DATASET_RULES: tuple[DatasetRule, ...] = (
    format_is_known,
    prompt_keys_are_known,
    keys_fit_format,
    own_template_is_known,
    own_template_text_needs_jinja,
    weight_or_share,
)
