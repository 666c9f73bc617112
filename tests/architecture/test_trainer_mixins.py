"""The trainer is seven mixins over transformers' Trainer: their order, one owner per hook, upstream's signatures."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest
import transformers

from eft.trainer.hooks import HOOK_OWNERS, TrainerHooks
from eft.trainer.trainer import EftTrainer

MIXINS = {
    "PackingMixin": "packing",
    "SchedulerMixin": "scheduler",
    "OptimizerMixin": "optimizer",
    "RngLoaderMixin": "rng",
    "CheckpointSaveMixin": "checkpoint",
    "ActivationOffloadingMixin": "offloading",
    "DistributedParallelMixin": "parallel",
}
"""Class to module of eft.trainer, in the order of the bases (DESIGN §3)."""

SHARED = {"hooks", "parts"}
"""Modules of eft.trainer that a mixin may import: the typed base and the record of parts."""

TRAINER_FOLDER = Path(inspect.getfile(EftTrainer)).parent


def class_node(tree: ast.Module, name: str) -> ast.ClassDef:
    return next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)


def methods(node: ast.ClassDef) -> list[str]:
    return [item.name for item in node.body if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef)]


def mixin_faults(tree: ast.Module, name: str) -> list[str]:
    """What a mixin's module must not hold: an `__init__`, fields of the class, imports of another mixin."""
    faults = []
    node = class_node(tree, name)
    if "__init__" in methods(node):
        faults.append(f"{name} defines __init__")
    if [ast.unparse(base) for base in node.bases] != ["TrainerHooks"]:
        faults.append(f"{name} has other bases than TrainerHooks")
    for item in ast.walk(tree):
        modules = [alias.name for alias in item.names] if isinstance(item, ast.Import) else []
        if isinstance(item, ast.ImportFrom):
            modules = [item.module or ""]
        ours = (module.removeprefix("eft.trainer.") for module in modules if module.startswith("eft.trainer"))
        faults += [f"{name} imports {module}" for module in ours if module not in SHARED]
    return faults


def owners(classes: dict[str, ast.ClassDef], hooks: set[str]) -> dict[str, list[str]]:
    """Hook to the classes that define it."""
    found: dict[str, list[str]] = {}
    for name, node in classes.items():
        for method in methods(node):
            if method in hooks:
                found.setdefault(method, []).append(name)
    return found


def signature_fault(ours: object, upstream: object) -> str | None:
    """How the parameters of an override differ from upstream's in name or order; `**kwargs` of ours takes the rest."""
    mine = inspect.signature(ours).parameters  # type: ignore[arg-type]  # any function
    theirs = inspect.signature(upstream).parameters  # type: ignore[arg-type]  # any function
    keywords = any(parameter.kind is parameter.VAR_KEYWORD for parameter in mine.values())
    wanted = [name for name, parameter in theirs.items() if parameter.kind is not parameter.VAR_KEYWORD]
    named = [name for name, parameter in mine.items() if parameter.kind is not parameter.VAR_KEYWORD]
    if named == wanted or (keywords and named == wanted[: len(named)]):
        return None
    return f"takes {named}, upstream {wanted}"


def sources() -> dict[str, ast.ClassDef]:
    files = {**MIXINS, "EftTrainer": "trainer"}
    return {
        name: class_node(ast.parse((TRAINER_FOLDER / f"{file}.py").read_text()), name) for name, file in files.items()
    }


UPSTREAM_HOOKS = {name for name, _ in inspect.getmembers(transformers.Trainer, callable) if not name.startswith("__")}


def test_bases_are_the_mixins_in_order_then_trainer() -> None:
    assert [base.__name__ for base in EftTrainer.__bases__] == [*MIXINS, "Trainer"]
    order = [cls.__name__ for cls in EftTrainer.__mro__]
    assert order[:8] == ["EftTrainer", *MIXINS]
    assert order.index("TrainerHooks") < order.index("Trainer")
    assert not [name for name in vars(TrainerHooks) if not name.startswith("__")]


def test_every_hook_has_one_owner_and_the_table_says_which() -> None:
    found = owners(sources(), UPSTREAM_HOOKS)
    assert {hook: names for hook, names in found.items() if len(names) > 1} == {}
    table = {hook: [owner] for owner, hooks in HOOK_OWNERS.items() for hook in hooks}
    assert found == table


@pytest.mark.parametrize(("owner", "hook"), [(owner, hook) for owner, hooks in HOOK_OWNERS.items() for hook in hooks])
def test_hook_exists_upstream_with_the_same_parameters(owner: str, hook: str) -> None:
    assert hasattr(transformers.Trainer, hook), f"{hook} is gone from transformers {transformers.__version__}"
    cls = next(cls for cls in EftTrainer.__mro__ if cls.__name__ == owner)
    assert signature_fault(vars(cls)[hook], getattr(transformers.Trainer, hook)) is None


@pytest.mark.parametrize("name", MIXINS)
def test_mixin_is_a_thin_adapter(name: str) -> None:
    tree = ast.parse((TRAINER_FOLDER / f"{MIXINS[name]}.py").read_text())
    assert mixin_faults(tree, name) == []


def test_no_method_of_ours_shadows_another() -> None:
    """Also methods that are no hooks: each name is defined in one class."""
    defined = [(method, name) for name, node in sources().items() for method in methods(node) if method != "__init__"]
    names = [method for method, _ in defined]
    assert [pair for pair in defined if names.count(pair[0]) > 1] == []


def test_planted_faults_are_seen() -> None:
    tree = ast.parse(
        "from eft.trainer.packing import PackingMixin\nfrom eft.trainer.hooks import TrainerHooks\n"
        "class BadMixin(PackingMixin):\n    def __init__(self): ...\n    def log(self, logs): ...\n"
        "class GoodMixin(TrainerHooks):\n    def log(self, logs): ...\n"
    )
    assert mixin_faults(tree, "BadMixin") == [
        "BadMixin defines __init__",
        "BadMixin has other bases than TrainerHooks",
        "BadMixin imports packing",
    ]
    both = {name: class_node(tree, name) for name in ("BadMixin", "GoodMixin")}
    assert owners(both, {"log"}) == {"log": ["BadMixin", "GoodMixin"]}

    def upstream(self: object, logs: object, start_time: object = None) -> None: ...
    def renamed(self: object, rows: object, start_time: object = None) -> None: ...
    def shortened(self: object, logs: object) -> None: ...
    def open_ended(self: object, logs: object, **kwargs: object) -> None: ...

    assert signature_fault(upstream, upstream) is None
    assert signature_fault(open_ended, upstream) is None
    assert signature_fault(renamed, upstream) is not None
    assert signature_fault(shortened, upstream) is not None
