"""Rules about the source: functions from a folder to findings, so that tests can also run them on planted faults.

A finding is `path:line: what is wrong`.
"""

from __future__ import annotations

import ast
import re
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
SOURCE = REPOSITORY / "src" / "eft"
COMPAT = REPOSITORY / "compat" / "axolotl" / "src" / "axolotl"

MODULE_LINES = 450
FUNCTION_LINES = 80
BANNED_WORDS = frozenset({"utils", "util", "helpers", "helper", "manager", "misc", "common"})
"""Words that say nothing about what is inside."""
UPSTREAM_NAMES = frozenset({"compute_loss_context_manager"})
"""Hooks of transformers.Trainer keep their names."""

PATCHED_ATTRIBUTES = frozenset({"forward", "__call__", "__class__", "__code__", "__dict__", "__bases__"})
"""Attributes that nobody sets on another object unless to change what foreign code does."""
SPEAKING_CODES = frozenset({"no-untyped-call", "untyped-decorator", "no-any-return", "import-untyped"})
"""Codes of mypy that are their own reason: the library has no types."""
FORBIDDEN_CALLS = frozenset({"exec", "eval", "compile", "getsource", "getsourcelines", "reload", "MethodType"})
PATCHING_MODULES = frozenset({"unittest.mock", "wrapt", "gorilla", "forbiddenfruit", "monkeytype"})


def findings(root: Path, check: Callable[[ast.Module], Iterator[tuple[int, str]]]) -> list[str]:
    """What `check` finds in every Python file below `root`."""
    found = []
    for path in sorted(root.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
        found += [f"{path.relative_to(root.parent)}:{line}: {what}" for line, what in check(tree)]
    return found


def monkeypatches(tree: ast.Module, allowed: frozenset[str] = frozenset()) -> Iterator[tuple[int, str]]:
    """Whatever changes code that is not this module's own.

    Writing an attribute or an item of something imported (directly, by an alias, or by setattr), of a class reached
    through an instance, or one of PATCHED_ATTRIBUTES of any object but `self`; exec and the like; mock libraries.
    `allowed` holds dotted names of documented settings.
    """
    imported = _imported_names(tree)
    for node in ast.walk(tree):
        for target in _written(node):
            name = _dotted(target, imported)
            if name is not None and name not in allowed:
                yield target.lineno, f"writes {name}"
            elif _is_class_of_instance(target) or _is_patched_attribute(target):
                yield target.lineno, f"writes {ast.unparse(target)}"
        if isinstance(node, ast.Call):
            yield from _suspicious_call(node, imported, allowed)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            names = [f"{module}.{alias.name}" for module in modules for alias in node.names] + modules
            if PATCHING_MODULES.intersection(names):
                yield node.lineno, f"imports {', '.join(modules)}"


def long_functions(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Functions that do not fit a screen."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > FUNCTION_LINES:
                yield node.lineno, f"{node.name} has {lines} lines, at most {FUNCTION_LINES} fit"


def banned_definitions(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Classes and functions whose name says nothing."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and _is_banned(node.name):
            if node.name in UPSTREAM_NAMES:
                continue
            yield node.lineno, f"the name {node.name} says nothing"


def long_modules(root: Path) -> list[str]:
    """Files that hold more than one thing."""
    counts = ((path, len(path.read_text(encoding="utf-8").splitlines())) for path in sorted(root.rglob("*.py")))
    long = ((path, count) for path, count in counts if count > MODULE_LINES)
    return [f"{path.relative_to(root.parent)}: {count} lines, at most {MODULE_LINES}" for path, count in long]


def banned_modules(root: Path) -> list[str]:
    """Files and packages whose name says nothing."""
    paths = (path for path in sorted(root.rglob("*")) if path.suffix == ".py" or path.is_dir())
    return [f"{path.relative_to(root.parent)}: the name says nothing" for path in paths if _is_banned(path.stem)]


def silent_suppressions(root: Path) -> list[str]:
    """`type: ignore` and `noqa` without a code, or without a reason after them."""
    directive = re.compile(r"#\s*(?:type:\s*ignore|noqa)\b")
    code = r"(?:type:\s*ignore\[(?P<kind>[\w-]+)\]|noqa:\s*[A-Z]+\d+)"
    complete = re.compile(rf"#\s*{code}\s*#?\s*(?P<reason>.*)")
    found = []
    for path in sorted(root.rglob("*.py")):
        with path.open("rb") as file:
            comments = [token for token in tokenize.tokenize(file.readline) if token.type == tokenize.COMMENT]
        for token in comments:
            match = complete.match(token.string)
            explained = match and (len(match["reason"]) > 3 or match["kind"] in SPEAKING_CODES)
            if directive.match(token.string) and not explained:
                found.append(f"{path.relative_to(root.parent)}:{token.start[0]}: say why: {token.string}")
    return found


def _imported_names(tree: ast.Module) -> dict[str, str]:
    """Name in this module to the dotted name of what it is: imports, and plain aliases of imported things."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom):
            names.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            source = _dotted(node.value, names)
            if source is not None and isinstance(node.value, ast.Name | ast.Attribute):
                names.setdefault(node.targets[0].id, source)
    return names


def _dotted(node: ast.expr, imported: dict[str, str]) -> str | None:
    """`torch.backends.cudnn.benchmark` for an expression that starts at an imported name, else None."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute | ast.Subscript):
        if isinstance(node, ast.Attribute):
            parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name) or node.id not in imported:
        return None
    return ".".join([imported[node.id], *reversed(parts)])


def _written(node: ast.AST) -> Iterator[ast.Attribute | ast.Subscript]:
    """Attributes and items that a statement assigns or deletes."""
    targets: list[ast.expr] = []
    if isinstance(node, ast.Assign | ast.Delete):
        targets = list(node.targets)
    elif isinstance(node, ast.AugAssign | ast.AnnAssign | ast.For | ast.AsyncFor):
        targets = [node.target]
    elif isinstance(node, ast.withitem) and node.optional_vars is not None:
        targets = [node.optional_vars]
    while targets:
        target = targets.pop()
        if isinstance(target, ast.Tuple | ast.List):
            targets += target.elts
        elif isinstance(target, ast.Starred):
            targets.append(target.value)
        elif isinstance(target, ast.Attribute | ast.Subscript):
            yield target


def _is_class_of_instance(node: ast.expr) -> bool:
    """`type(x).y` and `x.__class__.y`."""
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
        if isinstance(node, ast.Attribute) and node.attr in ("__class__", "__dict__"):
            return True
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("type", "vars"):
            return True
    return False


def _is_patched_attribute(node: ast.expr) -> bool:
    own = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
    return isinstance(node, ast.Attribute) and node.attr in PATCHED_ATTRIBUTES and not own


def _suspicious_call(node: ast.Call, imported: dict[str, str], allowed: frozenset[str]) -> Iterator[tuple[int, str]]:
    function = node.func
    if isinstance(function, ast.Name):
        name = imported.get(function.id, function.id)
    else:
        name = _dotted(function, imported) or ast.unparse(function)
    last = name.split(".")[-1]
    # `model.eval()` and `re.compile()` are other things: only the built-ins, and functions of inspect and the like.
    is_method = isinstance(function, ast.Attribute) and last in ("exec", "eval", "compile", "reload")
    if last in FORBIDDEN_CALLS and (not is_method or name.startswith(("builtins.", "importlib."))):
        yield node.lineno, f"calls {name}"
    if last in ("setattr", "delattr", "__setattr__") and node.args:
        target = _dotted(node.args[0], imported)
        key = str(node.args[1].value) if len(node.args) > 1 and isinstance(node.args[1], ast.Constant) else "?"
        on_class = _is_class_of_instance(ast.Attribute(value=node.args[0], attr="_"))
        if (target is not None and f"{target}.{key}" not in allowed) or on_class or key in PATCHED_ATTRIBUTES:
            yield node.lineno, f"calls {last} on {target or ast.unparse(node.args[0])} ({key})"
    if last == "update" and isinstance(function, ast.Attribute):
        owner = function.value
        if isinstance(owner, ast.Attribute) and owner.attr == "__dict__":
            yield node.lineno, f"calls {ast.unparse(function)}"


def _is_banned(name: str) -> bool:
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)
    return any(word.lower() in BANNED_WORDS for word in words)
