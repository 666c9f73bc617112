"""A config as YAML that loads to an equal config, with or without the origin of each value."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from eft.config.load import DEFAULT, LoadedConfig
from eft.config.problems import hide_credentials
from eft.config.root import TrainConfig
from eft.config.section import Section
from eft.config.source import resolve_plain

_PLAIN_TEXT = re.compile(r"[A-Za-z_./~][A-Za-z0-9_./\\+@-]*( [A-Za-z0-9_./\\+@-]+)*")


class EffectiveLine(NamedTuple):
    """One line of the effective config."""

    yaml: str
    key: str
    """`learning_rate`, `datasets[0].path`; empty for a heading."""
    is_changed: bool
    """Whether the value differs from the default."""


def dump_config(config: TrainConfig) -> str:
    """The whole config as YAML: `load_config` gives an equal config. Credentials inside addresses are left out."""
    return "".join(f"{line.yaml}\n" for line in effective_lines(config))


def show_config(loaded: LoadedConfig, *, only_set: bool = False) -> Iterator[tuple[EffectiveLine, str]]:
    """Every line, with the origin of its value: none for headings, nor where `loaded.origins` does not say.

    `only_set` leaves out what was written nowhere.
    """
    heading: EffectiveLine | None = None
    for line in effective_lines(loaded.config):
        origin = loaded.origins.get(line.key, "")
        if only_set and (origin == DEFAULT or not line.key):
            heading = heading if line.key else line
            continue
        if heading is not None:
            yield heading, ""
            heading = None
        yield line, origin


def effective_lines(config: TrainConfig) -> Iterator[EffectiveLine]:
    """The lines of the YAML text, in the order of the sections, each section under a comment."""
    changed = config.changed_keys()
    for section in TrainConfig.__bases__:
        assert issubclass(section, Section)
        yield EffectiveLine(f"# {section.__name__.removesuffix('Config')}", "", False)
        for name in section.model_fields:
            yield from _lines(name, config.__dict__[name], name in changed)


def _lines(name: str, value: Any, is_changed: bool) -> Iterator[EffectiveLine]:
    if not (isinstance(value, list) and value and isinstance(value[0], Section)):
        yield EffectiveLine(f"{name}: {_flow(value)}", name, is_changed)
        return
    yield EffectiveLine(f"{name}:", name, is_changed)
    for i, entry in enumerate(value):
        changed = entry.changed_keys()
        for number, (inner, item) in enumerate(entry.__dict__.items()):
            indent = "  - " if number == 0 else "    "
            yield EffectiveLine(f"{indent}{inner}: {_flow(item)}", f"{name}[{i}].{inner}", inner in changed)


def _flow(value: Any) -> str:
    """A value on one line of YAML."""
    if isinstance(value, str):
        return _text(hide_credentials(value))
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_text(str(key))}: {_flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_flow(item) for item in value) + "]"
    return json.dumps(value)


def _text(value: str) -> str:
    """Text as it is where nothing can mistake it for something else, else quoted."""
    if _PLAIN_TEXT.fullmatch(value) and isinstance(resolve_plain(value, bool | None), str):
        return value
    quoted = json.dumps(value, ensure_ascii=False)
    return "".join(char if char.isprintable() else _escape(char) for char in quoted)


def _escape(char: str) -> str:
    """A YAML escape of one character."""
    return f"\\u{ord(char):04x}" if ord(char) < 0x10000 else f"\\U{ord(char):08x}"
