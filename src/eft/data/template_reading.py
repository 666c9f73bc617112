"""What a chat template may make depend on the words of a text, read off its syntax tree.

Most templates only ever put a text into the output, trimmed or not. Two conversations with the same roles, and texts
that are empty, or have blanks at their ends, in the same places, then come out alike but for the texts themselves
(`skeletons`). A template that looks into texts names what it looks for: those words are its triggers, and a
conversation that contains one is rendered by itself. A template that does anything else with texts is not readable, and
all of its conversations are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache

from jinja2 import nodes

from eft.data.jinja_environment import parse_template

_TRIMMED = {"strip", "lstrip", "rstrip"}
_SEARCHED = {"startswith", "endswith", "split", "replace"}
_CASED = {"lower", "upper", "capitalize", "title"}
_HARMLESS_METHODS = {"get", "items", "keys", "values", *_CASED}
_HARMLESS_FILTERS = {
    "trim", "string", "default", "d", "tojson", "safe", "items", "dictsort", "selectattr", "rejectattr", "reject",
    "map", "join", "list", *_CASED,
}  # fmt: skip
"""A text that goes through one of these comes out as it was, or not at all, or not as a probe text was; a skeleton is
made of texts that come out as they were. Triggers are found in upper and lower case."""
_OF_LISTS = {"length", "count", "first", "last", "reverse"}
_LISTS = {"messages", "loop_messages", "tools", "tool_calls"}
_HARMLESS_TESTS = {
    "defined", "undefined", "none", "string", "mapping", "iterable", "sequence", "true", "false", "boolean", "number",
    "integer", "float",
}  # fmt: skip
_FUNCTIONS = {"raise_exception", "namespace", "strftime_now", "range", "dict", "joiner", "cycler"}
_NOT_TEXTS = {
    "role", "type", "name", "index0", "index", "first", "last", "length", "revindex", "revindex0", "tool_calls",
    "function", "arguments", "id", "tool_call_id",
}  # fmt: skip
_ALWAYS = ("<think>", "</think>")
"""Where a turn's own start is sought, these are looked for in its text, whatever the template says."""


class _UnreadableError(Exception):
    """The template does something with texts that words do not tell."""


@lru_cache(maxsize=64)
def triggers_of(template: str) -> re.Pattern[str] | None:
    """Matches a text that the template may treat in a way of its own; None where that cannot be told for any text."""
    tree = parse_template(template)
    macros = {macro.name for macro in tree.find_all(nodes.Macro)}
    asked_if_empty = {
        id(node.expr)
        for node in tree.find_all(nodes.Compare)
        if isinstance(node.expr, nodes.Filter) and all(_is_zero(operand.expr) for operand in node.ops)
    }
    try:
        others = (node for node in _all_nodes(tree) if id(node) not in asked_if_empty)
        words = {word for node in others for word in _words(node, macros)}
    except _UnreadableError:
        return None
    found = sorted({*words, *_ALWAYS} - {""}, key=lambda word: (-len(word), word))
    return re.compile("|".join(map(re.escape, found)), re.IGNORECASE)


def _is_zero(node: nodes.Node) -> bool:
    return isinstance(node, nodes.Const) and node.value == 0


def _all_nodes(node: nodes.Node) -> Iterator[nodes.Node]:
    yield node
    for child in node.iter_child_nodes():
        yield from _all_nodes(child)


def _words(node: nodes.Node, macros: set[str]) -> Iterator[str]:
    """The words that this node looks for in texts. Raises _UnreadableError."""
    if isinstance(node, nodes.Filter):
        first = node.args[0] if node.args else None
        if node.name == "replace" and isinstance(first, nodes.Const) and isinstance(first.value, str):
            yield first.value
        elif node.name not in _HARMLESS_FILTERS and not (node.name in _OF_LISTS and _is_list(node.node)):
            raise _UnreadableError(node.name)
    elif isinstance(node, nodes.Test):
        if node.name not in _HARMLESS_TESTS:
            raise _UnreadableError(node.name)
    elif isinstance(node, nodes.Call):
        yield from _words_of_call(node, macros)
    elif isinstance(node, nodes.Compare):
        yield from _words_of_comparison(node)
    elif isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice) and not _is_list(node.node):
        raise _UnreadableError("a part of a text")
    elif isinstance(node, (nodes.FilterBlock, nodes.CallBlock, nodes.Include, nodes.Import, nodes.FromImport)):
        raise _UnreadableError(type(node).__name__)


def _words_of_call(call: nodes.Call, macros: set[str]) -> Iterator[str]:
    if isinstance(call.node, nodes.Name):
        if call.node.name not in _FUNCTIONS | macros:
            raise _UnreadableError(call.node.name)
        return
    if not isinstance(call.node, nodes.Getattr):
        raise _UnreadableError("a call")
    name = call.node.attr
    words = [argument.value if isinstance(argument, nodes.Const) else None for argument in call.args]
    first = words[0] if words else None
    if name in _SEARCHED and isinstance(first, str) and first:
        yield first
    elif name in _TRIMMED:
        # Blanks at the ends of a text are part of its shape; what else is trimmed is not.
        if not all(isinstance(word, str) and not word.strip() for word in words):
            raise _UnreadableError(name)
    elif name not in _HARMLESS_METHODS:
        raise _UnreadableError(name)


def _words_of_comparison(node: nodes.Compare) -> Iterator[str]:
    for operand in node.ops:
        left, right = node.expr, operand.expr
        if operand.op in ("eq", "ne", "in", "notin") and not (_is_no_text(left) or _is_no_text(right)):
            is_search = operand.op in ("in", "notin")
            if is_search and isinstance(right, (nodes.List, nodes.Tuple)):
                if not all(isinstance(item, nodes.Const) and isinstance(item.value, str) for item in right.items):
                    raise _UnreadableError("a comparison of texts")
                yield from (item.value for item in right.items if isinstance(item, nodes.Const))
                continue
            sides = [side for side in (left, right) if isinstance(side, nodes.Const) and isinstance(side.value, str)]
            if len(sides) != 1 or (is_search and sides[0] is right):
                raise _UnreadableError("a comparison of texts")
            yield sides[0].value


def _is_no_text(node: nodes.Node) -> bool:
    """Whether an operand is a role, a number, a truth value, a list of names: nothing that words of a text change."""
    if isinstance(node, nodes.Const):
        return not isinstance(node.value, str)
    if isinstance(node, (nodes.Compare, nodes.Test, nodes.Not, nodes.And, nodes.Or)):
        return True
    if isinstance(node, nodes.BinExpr):
        return _is_no_text(node.left) and _is_no_text(node.right)
    if isinstance(node, nodes.Getattr):
        return node.attr in _NOT_TEXTS
    if isinstance(node, nodes.Getitem):
        return isinstance(node.arg, nodes.Const) and node.arg.value in _NOT_TEXTS
    if isinstance(node, nodes.Name):
        return node.name in ("role", "tools") or node.name.endswith(("key", "keys"))
    if isinstance(node, nodes.Call):
        is_get = isinstance(node.node, nodes.Getattr) and node.node.attr == "get" and bool(node.args)
        return is_get and isinstance(node.args[0], nodes.Const) and node.args[0].value in _NOT_TEXTS
    if isinstance(node, nodes.Filter) and node.name in _CASED and node.node is not None:
        return _is_no_text(node.node)
    return isinstance(node, nodes.Filter) and node.name in ("length", "count")


def _is_list(node: nodes.Node | None) -> bool:
    """Whether an expression is a list of turns, tools or calls."""
    if isinstance(node, nodes.Name):
        return node.name in _LISTS
    if isinstance(node, nodes.Getattr):
        return node.attr in _LISTS
    if isinstance(node, nodes.Getitem):
        is_slice = isinstance(node.arg, nodes.Slice)
        return _is_list(node.node) if is_slice else isinstance(node.arg, nodes.Const) and node.arg.value in _LISTS
    return isinstance(node, nodes.Filter) and node.name in _OF_LISTS and _is_list(node.node)
