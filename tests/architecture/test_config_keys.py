"""Every declared key is read somewhere outside config/: one that nobody reads would be an empty promise (E8)."""

from __future__ import annotations

import ast
from pathlib import Path

from eft.config.data import DatasetConfig
from eft.config.root import TrainConfig
from eft.config.usage import KEYS_OF_RUN

SOURCE = Path(__file__).parents[2] / "src" / "eft"

LAUNCHERS = ("cli/train.py", "cli/ray_run.py", "parallel/ray_train.py")

NOT_YET: frozenset[str] = frozenset()
"""Declared keys whose reader is still to be written. Only ever made shorter."""


def attributes_read() -> frozenset[str]:
    """Names read as `something.name` outside config/; method calls (`text.split()`) do not count."""
    names: set[str] = set()
    for path in SOURCE.rglob("*.py"):
        if path.is_relative_to(SOURCE / "config"):
            continue
        tree = ast.parse(path.read_text())
        called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        names |= {
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and id(node) not in called
        }
    return frozenset(names)


def test_every_declared_key_is_read() -> None:
    declared = set(TrainConfig.model_fields) | set(DatasetConfig.model_fields)
    assert declared - attributes_read() - NOT_YET == set()


def test_the_list_of_unread_keys_only_shrinks() -> None:
    declared = set(TrainConfig.model_fields) | set(DatasetConfig.model_fields)
    assert declared >= NOT_YET, "no such key"
    assert NOT_YET & attributes_read() == set(), "these keys are read now: take them off NOT_YET"


def test_the_keys_of_the_run_are_read_by_the_run() -> None:
    """Promise E8 takes it on trust that `eft.run` reads them, so here is the proof."""
    trees = [
        ast.parse((SOURCE / name).read_text())
        for name in ("run.py", "run_state.py", "inputs.py", "finish.py", "resume.py", "samples.py", *LAUNCHERS)
    ]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    read = {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}
    assert read >= KEYS_OF_RUN
