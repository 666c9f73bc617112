"""No pickle is written to or read from a file: whoever can write a checkpoint must not be able to run code with it."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from tests.architecture import source_rules as rules

PICKLING = {
    "torch": {"load", "save"},
    "pickle": {"load", "dump", "Unpickler", "Pickler"},
    "joblib": {"load", "dump"},
    "shelve": {"open"},
}
"""Module to functions; `pickle.loads(pickle.dumps(x))`, a copy within the process, is no file."""


def pickling(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.attr in PICKLING.get(node.value.id, ()):
                yield node.lineno, f"{node.value.id}.{node.attr}"
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if alias.name in PICKLING.get(node.module or "", ()):
                    yield node.lineno, f"from {node.module} import {alias.name}"
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
            yield node.value.lineno, "allow_pickle"


def test_nothing_is_pickled_into_files() -> None:
    assert rules.findings(rules.SOURCE, pickling) == []


def test_what_would_be_found() -> None:
    planted = "import torch\nfrom pickle import load\ntorch.load('x')\nnp.load(p, allow_pickle=True)\ntorch.loader"
    assert [line for line, _ in sorted(pickling(ast.parse(planted)))] == [2, 3, 4]
