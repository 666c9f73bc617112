"""YAML text to values, each with the line it came from.

YAML as people write it: `2e-5` and `1e5` are numbers, `yes` and `off` are booleans only where the key is one, a number
is text where the key is text (`revision: 123e4`), duplicate keys are refused, tabs are named. The expected type of each
key, its *hint*, comes from the config classes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from eft.config.section import Section, type_members
from eft.core.errors import ConfigError, nearest

KeyPath = tuple[str | int, ...]
"""Where a value stands in the config: ("datasets", 0, "path")."""

_INT = re.compile(r"[-+]?[0-9][0-9_]*")
_BASED_INT = re.compile(r"[-+]?0(x[0-9a-fA-F_]+|o[0-7_]+|b[01_]+)")
_FLOAT = re.compile(r"[-+]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?")
_SPECIAL_FLOATS = {".inf": "inf", "+.inf": "inf", "-.inf": "-inf", ".nan": "nan"}
_NULLS = ("", "~", "null", "Null", "NULL")
_BOOLS = {"true": True, "false": False}
_BOOLS_OF_YAML_1_1 = {"yes": True, "on": True, "no": False, "off": False}
_TAG = "tag:yaml.org,2002:"
_IMPLICIT_TAGS = ("timestamp", "value", "merge")
"""Tags that the YAML resolver gives to plain text which is plain text to us: `2026-01-01`, `=`."""
_TAG_TYPES = {"str": str, "int": int, "float": float, "bool": bool, "null": type(None)}


class Origin(NamedTuple):
    """Where a value was written: a label such as `run.yaml:12`, and its place in the order of all values."""

    label: str
    rank: int


class Problem(NamedTuple):
    """One thing that is wrong, and where."""

    origin: Origin
    text: str


@dataclass
class Document:
    """Raw values with the origin of each; `problems` were found on the way."""

    source: str
    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[KeyPath, Origin] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    hint: str = ""
    """A last line for the message that lists the problems."""

    def origin_of(self, path: KeyPath) -> Origin:
        """The origin of the value at `path`, or of the nearest value around it."""
        while path:
            if path in self.origins:
                return self.origins[path]
            path = path[:-1]
        return Origin(self.source, 0)

    def add_problem(self, path: KeyPath, text: str) -> None:
        """Note that the value at `path` is wrong."""
        self.problems.append(Problem(self.origin_of(path), text))

    def raise_problems(self) -> None:
        """Raise ConfigError with every problem, in the order of the file; does nothing when there is none."""
        if not self.problems:
            return
        lines = [
            f"{problem.origin.label}: {problem.text}" for problem in sorted(self.problems, key=lambda p: p.origin.rank)
        ]
        hint = f"\n{self.hint}" if self.hint else ""
        if len(lines) == 1:
            raise ConfigError(lines[0] + hint)
        raise ConfigError(f"{self.source}: {len(lines)} problems\n" + "\n".join(f"  {line}" for line in lines) + hint)


def dotted(path: KeyPath) -> str:
    """`datasets[0].path` for ("datasets", 0, "path")."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def read_yaml(path: Path, root: type[Section]) -> Document:
    """Read a config file.

    Raises:
        ConfigError: the file is missing, unreadable, not UTF-8, not YAML, empty or no mapping.
    """
    text = _read_text(path)
    tabs = [number for number, line in enumerate(text.splitlines(), 1) if re.match(r" *\t\s*\S", line)]
    try:
        node = _compose(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark is not None else 1
        if line in tabs:
            raise ConfigError(f"{path}:{line}: indented with a tab; YAML allows spaces only") from error
        if "single document" in str(error.context):
            raise ConfigError(f"{path}:{line}: a second document starts here (`---`); one run, one document") from error
        raise ConfigError(f"{path}:{line}: not valid YAML: {error.problem or error.context}") from error
    except YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if node is None or _is_null(node):
        required = ", ".join(f"`{name}`" for name, info in sorted(root.model_fields.items()) if info.is_required())
        raise ConfigError(f"{path}: the file is empty; it needs at least {required}")
    if not isinstance(node, MappingNode):
        raise ConfigError(f"{path}:{node.start_mark.line + 1}: expected `key: value` lines, found {_kind(node)}")
    document = Document(str(path))
    document.values = _Builder(document).mapping(node, root, ())
    return document


def parse_override(document: Document, path: KeyPath, text: str, hint: Any, origin: Origin) -> Any:
    """The YAML value of one override on the command line; notes a problem and returns None when it is no YAML."""
    document.origins[path] = origin
    try:
        node = _compose(text)
    except YAMLError as error:
        document.add_problem(path, f"`{dotted(path)}`: `{text}` is not valid YAML: {getattr(error, 'problem', error)}")
        return None
    return None if node is None else _Builder(document, fixed_origin=origin).value(node, hint, path)


def child_hint(hint: Any, part: str | int) -> Any:
    """The type expected of one element of a value whose type is `hint`; Any where nothing is known."""
    for member in type_members(hint):
        if isinstance(member, type) and issubclass(member, Section) and part in member.model_fields:
            return member.model_fields[str(part)].annotation
        if get_origin(member) is dict and isinstance(part, str):
            return get_args(member)[1]
        if get_origin(member) is list and isinstance(part, int):
            return get_args(member)[0]
    return Any


def literal_values(hint: Any) -> list[Any]:
    """The values of every Literal among the alternatives of `hint`."""
    return [value for member in type_members(hint) if get_origin(member) is Literal for value in get_args(member)]


def _read_text(path: Path) -> str:
    if path.is_dir():
        raise ConfigError(f"{path}: is a folder; expected a YAML file{_among(path.glob('*.y*ml'))}")
    if not path.exists():
        siblings = [file.name for file in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        close = nearest(path.name, siblings)
        raise ConfigError(f"{path}: no such file" + (f"; did you mean {path.with_name(close)}?" if close else ""))
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path}:{line}: not UTF-8 text (byte {error.object[error.start]:#04x})") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error


def _among(files: Iterable[Path]) -> str:
    names = sorted(str(file) for file in files)[:5]
    return f", such as {', '.join(names)}" if names else ""


def _compose(text: str) -> Node | None:
    node: Node | None = YAML(typ="safe", pure=True).compose(text)
    return node


def _kind(node: Node) -> str:
    if isinstance(node, SequenceNode):
        return "a list"
    return "a mapping" if isinstance(node, MappingNode) else f"`{node.value}`"


def _is_null(node: Node) -> bool:
    return isinstance(node, ScalarNode) and node.style is None and node.value in _NULLS


class _Builder:
    """Turns nodes into values and notes the origin of each in the document."""

    def __init__(self, document: Document, fixed_origin: Origin | None = None) -> None:
        self.document = document
        self.fixed_origin = fixed_origin
        self.open_nodes: list[int] = []

    def origin(self, node: Node) -> Origin:
        line = node.start_mark.line + 1
        return self.fixed_origin or Origin(f"{self.document.source}:{line}", line)

    def value(self, node: Node, hint: Any, path: KeyPath) -> Any:
        self.document.origins.setdefault(path, self.origin(node))
        if isinstance(node, ScalarNode):
            return self.scalar(node, hint, path)
        if id(node) in self.open_nodes:
            self.document.add_problem(path, f"`{dotted(path)}` contains itself (`*{node.anchor}`)")
            return None
        self.open_nodes.append(id(node))
        try:
            if isinstance(node, MappingNode):
                return self.mapping(node, hint, path)
            return [self.value(item, child_hint(hint, i), (*path, i)) for i, item in enumerate(node.value)]
        finally:
            self.open_nodes.pop()

    def mapping(self, node: MappingNode, hint: Any, path: KeyPath) -> dict[str, Any]:
        merged: dict[str, Node] = {}
        own: dict[str, tuple[Node, Node]] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, ScalarNode):
                origin = self.origin(key_node)
                self.document.problems.append(Problem(origin, f"a key must be one word, found {_kind(key_node)}"))
            elif key_node.value == "<<" and key_node.style is None:
                self.merge(value_node, merged)
            elif key_node.value in own:
                first = own[key_node.value][0].start_mark.line + 1
                name = dotted((*path, key_node.value))
                text = f"`{name}` is already set in line {first}; keep one of the two lines"
                self.document.problems.append(Problem(self.origin(key_node), text))
            else:
                own[key_node.value] = (key_node, value_node)
        values: dict[str, Any] = {}
        for name, value_node in (merged | {name: nodes[1] for name, nodes in own.items()}).items():
            if not path and name.startswith("x-") and value_node.anchor is not None:
                continue  # a place to keep anchors, as in compose files
            self.document.origins[*path, name] = self.origin(own[name][0] if name in own else value_node)
            values[name] = self.value(value_node, child_hint(hint, name), (*path, name))
        return values

    def merge(self, node: Node, merged: dict[str, Node]) -> None:
        """Collect the keys of `<<: *anchor`, or of a list of anchors where earlier ones win."""
        if isinstance(node, SequenceNode):
            for item in node.value:
                self.merge(item, merged)
        elif isinstance(node, MappingNode) and id(node) not in self.open_nodes:
            self.open_nodes.append(id(node))
            for key_node, value_node in node.value:
                if key_node.value == "<<":
                    self.merge(value_node, merged)
                else:
                    merged.setdefault(key_node.value, value_node)
            self.open_nodes.pop()
        else:
            self.document.problems.append(Problem(self.origin(node), f"`<<` merges mappings, found {_kind(node)}"))

    def scalar(self, node: ScalarNode, hint: Any, path: KeyPath) -> Any:
        tag = str(node.tag).removeprefix(_TAG)
        if tag not in _TAG_TYPES and tag not in _IMPLICIT_TAGS:
            self.document.add_problem(path, f"`{dotted(path)}`: the tag `{node.tag}` is not allowed in a config")
            return None
        if node.style is not None:
            return node.value if tag == "str" else resolve_plain(node.value, _TAG_TYPES[tag])
        # Of a plain scalar the resolver made another tag, so this one was written: `!!str 12`.
        is_tagged_text = tag == "str" and resolve_plain(node.value, Any) != node.value
        return node.value if is_tagged_text else resolve_plain(node.value, hint)


def resolve_plain(text: str, hint: Any) -> Any:
    """The value of an unquoted scalar where `hint` is expected."""
    members = type_members(hint)
    if text in _NULLS:
        return None
    if text.lower() in _BOOLS:
        return _BOOLS[text.lower()]
    if bool in members and text.lower() in _BOOLS_OF_YAML_1_1 and text not in literal_values(hint):
        return _BOOLS_OF_YAML_1_1[text.lower()]
    if str in members and int not in members and float not in members:
        return text
    if _INT.fullmatch(text):
        return int(text.replace("_", ""))
    if _BASED_INT.fullmatch(text):
        return int(text.replace("_", ""), 0)
    if _FLOAT.fullmatch(text):
        return float(text.replace("_", ""))
    return float(_SPECIAL_FLOATS[text.lower()]) if text.lower() in _SPECIAL_FLOATS else text
