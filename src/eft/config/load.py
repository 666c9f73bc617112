"""YAML file or mapping to a checked `TrainConfig`. Every problem is reported at once, with its line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from eft.config.axolotl_keys import (
    AXOLOTL_DATASET_KEYS,
    AXOLOTL_KEYS,
    COMPUTED,
    ELSEWHERE,
    RENAMED,
    Foreign,
    asks_for_nothing,
)
from eft.config.data import DatasetConfig
from eft.config.problems import add_validation_problems, show_value
from eft.config.root import TrainConfig
from eft.config.rules import rule_problems
from eft.config.section import Section
from eft.config.source import (
    Document,
    KeyPath,
    Origin,
    Problem,
    child_hint,
    dotted,
    literal_values,
    parse_override,
    read_yaml,
)
from eft.core.errors import nearest

COMMAND_LINE = "command line"
DEFAULT = "default"
_AFTER_ALL_LINES = 1 << 30
_PLACEHOLDERS: dict[str, Any] = {"base_model": "?", "learning_rate": 1.0, "datasets": [{"path": "?"}]}
_ENTRY_PLACEHOLDERS: dict[str, dict[str, Any]] = {"lr_groups": {"name": "?", "modules": ["?"], "lr": 1.0}}
"""Stand in for required keys that are missing or wrong, so that the rules can still look at all the others."""


@dataclass(frozen=True)
class LoadedConfig:
    """A checked config, and where its values came from."""

    config: TrainConfig
    origins: dict[str, str]
    """Key (`learning_rate`, `datasets[0].path`) to `run.yaml:12`, `command line` or `default`."""
    accepted: list[str] = field(default_factory=list)
    """Axolotl keys that eft lacks and that ask for nothing (null, off, Axolotl's default)."""
    unsupported: list[str] = field(default_factory=list)
    """Axolotl keys that were ignored because `allow_unsupported` was given."""

    def notes(self) -> list[str]:
        """Lines for the user about keys that had no effect."""
        notes = []
        if self.accepted:
            notes.append(f"no effect, as in Axolotl when off or default: {', '.join(self.accepted)}")
        if self.unsupported:
            notes.append(f"ignored on request (--allow-unsupported): {', '.join(self.unsupported)}")
        return notes


def load_config(path: Path, overrides: Sequence[str] = (), *, allow_unsupported: bool = False) -> LoadedConfig:
    """Read, override and check a config file.

    Args:
        path: the YAML file.
        overrides: `key=value` texts; dots reach inside (`datasets.0.path=x`); values are YAML.
        allow_unsupported: ignore keys that Axolotl knows and eft does not, instead of refusing them.

    Raises:
        ConfigError: with every problem found, each with file and line or `command line`.
    """
    document = read_yaml(path, TrainConfig)
    _rename(document)
    for number, text in enumerate(overrides):
        _apply_override(document, text, Origin(COMMAND_LINE, _AFTER_ALL_LINES + number))
    return _check(document, allow_unsupported)


def config_from_mapping(
    mapping: Mapping[str, Any], source: str = "<dict>", *, allow_unsupported: bool = False
) -> TrainConfig:
    """The same checks for a mapping (nested mappings of any class; None means absent).

    Raises:
        ConfigError: with every problem found.
    """
    return load_mapping(mapping, source, allow_unsupported=allow_unsupported).config


def load_mapping(
    mapping: Mapping[str, Any], source: str = "<dict>", *, allow_unsupported: bool = False
) -> LoadedConfig:
    """As `config_from_mapping`, with origins and notes."""
    values = {key: value for key, value in _plain(mapping).items() if value is not None}
    document = Document(source, values, {(key,): Origin(source, i) for i, key in enumerate(values)})
    return _check(document, allow_unsupported)


def _plain(value: Any) -> Any:
    """Built-in dicts, lists and texts in place of the caller's own classes."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _check(document: Document, allow_unsupported: bool) -> LoadedConfig:
    _rename(document)
    known = [*TrainConfig.model_fields, *RENAMED]
    accepted, unsupported = _split_foreign(document, (), known, AXOLOTL_KEYS)
    for name in ("datasets", "test_datasets"):
        entries = document.values.get(name)
        for i, entry in enumerate(entries if isinstance(entries, list) else []):
            if isinstance(entry, dict):
                more = _split_foreign(document, (name, i), list(DatasetConfig.model_fields), AXOLOTL_DATASET_KEYS)
                accepted, unsupported = accepted + more[0], unsupported + more[1]
    if not allow_unsupported:
        for path, text in unsupported:
            document.add_problem(path, text)
        if unsupported:
            document.hint = "keys that Axolotl has and eft has not are ignored with --allow-unsupported"
    document.values = _without_nulls(document.values, TrainConfig)
    config = _validated(document, document.values)
    document.raise_problems()
    return LoadedConfig(config, _origins(document, config), accepted, [dotted(path) for path, _ in unsupported])


def _rename(document: Document) -> None:
    """Give aliases their real names."""
    for alias, name in RENAMED.items():
        if document.values.get(alias) is None:
            document.values.pop(alias, None)
            continue
        if document.values.get(name) is not None:
            document.add_problem((alias,), f"`{alias}` is another name of `{name}`, which is set too; keep one of them")
        else:
            document.values[name] = document.values[alias]
            document.origins[name,] = document.origins[alias,]
        del document.values[alias]


def _split_foreign(
    document: Document, path: KeyPath, known: list[str], table: Mapping[str, Foreign]
) -> tuple[list[str], list[tuple[KeyPath, str]]]:
    """Take the keys that eft lacks out of one mapping; notes a problem for those that nobody knows.

    Returns the keys that ask for nothing, and (path, what to do) for those that ask for something.
    """
    section: Any = document.values
    for part in path:
        section = section[part]
    accepted: list[str] = []
    unsupported: list[tuple[KeyPath, str]] = []
    for name in [name for name in section if name not in known]:
        value = section.pop(name)
        here = (*path, name)
        if name in table and not asks_for_nothing(value, table[name].default):
            unsupported.append((here, _unsupported_text(here, value, table[name])))
        elif name in table or (name in COMPUTED and not path):
            accepted.append(dotted(here))
        else:
            document.add_problem(here, _unknown_text(here, value, known, table))
    return accepted, unsupported


def _unsupported_text(path: KeyPath, value: Any, foreign: Foreign) -> str:
    name = dotted(path)
    return f"`{name}: {show_value(name, value)}`: Axolotl has this key, eft has not: {foreign.advice}"


def _unknown_text(path: KeyPath, value: Any, known: list[str], table: Mapping[str, Foreign]) -> str:
    name, word = dotted(path), str(path[-1])
    text = f"`{name}: {show_value(name, value)}`: unknown key"
    is_entry = len(path) > 1
    if (is_entry and word in TrainConfig.model_fields) or (not is_entry and word in DatasetConfig.model_fields):
        return f"{text} here; it belongs {'at the top level' if is_entry else 'in an entry of `datasets`'}"
    meant = (None if is_entry else ELSEWHERE.get(word)) or nearest(word, known)
    if meant is not None:
        return f"{text}; did you mean `{meant}`?"
    if close := nearest(word, table):
        return f"{text}; Axolotl has `{close}`, eft has not: {table[close].advice}"
    return text


def _without_nulls(values: Any, hint: Any) -> Any:
    """Drop null keys of sections: null means the default. False becomes `no` where that is one of the words."""
    if isinstance(values, list):
        return [_without_nulls(item, child_hint(hint, i)) for i, item in enumerate(values)]
    if isinstance(values, dict) and _is_section(hint):
        return {key: _without_nulls(item, child_hint(hint, key)) for key, item in values.items() if item is not None}
    if values is False and "no" in literal_values(hint):
        return "no"  # what YAML 1.1 readers make of `save_strategy: no`
    return values


def _is_section(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Section)


def _validated(document: Document, values: dict[str, Any]) -> TrainConfig:
    """Types, then rules. Where keys are wrong, the rules see the defaults and are believed only about other keys."""
    broken: set[KeyPath] = set()
    try:
        config = TrainConfig.model_validate(values)
    except ValidationError as error:
        num_before = len(document.problems)
        broken = add_validation_problems(document, error, TrainConfig)
        # A required key that an unknown key was mistaken for is not reported a second time as missing.
        suggested = " ".join(problem.text for problem in document.problems[:num_before])
        mistaken = tuple(f"`{path[-1]}` is missing" for path in broken if f"mean `{path[-1]}`?" in suggested)
        new = document.problems[num_before:]
        document.problems[num_before:] = [problem for problem in new if not problem.text.startswith(mistaken)]
        config = TrainConfig.model_validate(_without_broken(values, broken))
    for path, text in rule_problems(config, ignore=broken):
        document.add_problem(path, text)
    return config


def _without_broken(values: dict[str, Any], broken: set[KeyPath]) -> dict[str, Any]:
    """The values that are right, with placeholders for required keys."""
    usable = {**_PLACEHOLDERS, **{key: value for key, value in values.items() if (key,) not in broken}}
    for name in {str(path[0]) for path in broken if len(path) > 1}:
        usable[name] = [
            _ENTRY_PLACEHOLDERS.get(name, {"path": "?"})
            | {key: value for key, value in entry.items() if (name, i, key) not in broken}
            for i, entry in enumerate(usable[name])
        ]
    return usable


def _apply_override(document: Document, text: str, origin: Origin) -> None:
    """Set one `key=value`; what is wrong with it is noted as a problem of the command line."""
    name, equals, value_text = text.partition("=")
    parts = name.strip().replace("[", ".").replace("]", "").split(".")
    path: KeyPath = tuple(int(part) if part.isdigit() else part for part in parts)
    path = (RENAMED.get(str(path[0]), path[0]), *path[1:])
    if not equals or "" in path:
        document.problems.append(Problem(origin, f"`{text}`: expected `key=value`"))
        return
    target: Any = document.values
    hint: Any = TrainConfig
    for depth, part in enumerate(path):
        here = dotted(path[:depth])
        if isinstance(target, list):
            if not isinstance(part, int) or part >= len(target):
                count = f"{len(target)} entries, numbered from 0"
                document.problems.append(Problem(origin, f"`{name}`: `{here}` has {count}; there is no `{part}`"))
                return
        elif isinstance(target, dict):
            part = str(part)  # a name, even where it is all digits
        else:
            document.problems.append(Problem(origin, f"`{name}`: `{here}` is no mapping, nothing can be set inside"))
            return
        hint = child_hint(hint, part)
        if depth == len(path) - 1:
            _forget_origins(document, path)
            target[part] = parse_override(document, path, value_text, hint, origin)
        elif isinstance(target, dict) and target.get(part) is None:
            target[part] = {}
        target = target[part]


def _forget_origins(document: Document, path: KeyPath) -> None:
    for known in [known for known in document.origins if known[: len(path)] == path]:
        del document.origins[known]


def _origins(document: Document, config: TrainConfig) -> dict[str, str]:
    """The origin of every key, and of every key of each data set entry."""
    origins: dict[str, str] = {}

    def note(path: KeyPath, is_set: bool) -> None:
        origins[dotted(path)] = document.origin_of(path).label if is_set else DEFAULT

    def walk(section: Section, values: dict[str, Any], path: KeyPath) -> None:
        for name, value in section.__dict__.items():
            note((*path, name), values.get(name) is not None)
            for i, entry in enumerate(value if isinstance(value, list) else []):
                if isinstance(entry, Section):
                    walk(entry, values[name][i], (*path, name, i))

    walk(config, document.values, ())
    return origins
