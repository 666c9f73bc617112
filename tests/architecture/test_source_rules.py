"""The source keeps its rules, and each rule sees a planted fault."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.architecture import source_rules as rules

SETTINGS: dict[str, str] = {
    "os.environ": "how trackers and libraries take settings",
    "torch.backends.mkldnn.matmul.fp32_precision": "fp32 sums of bf16 operands, inside one attention call",
}
"""Documented settings of other people's modules, each with what it is for. Everything else is a monkeypatch."""


def _monkeypatches(tree: ast.Module) -> Iterator[tuple[int, str]]:
    return rules.monkeypatches(tree, frozenset(SETTINGS))


@pytest.mark.parametrize("root", [rules.SOURCE, rules.COMPAT], ids=["eft", "compat"])
def test_nothing_is_monkeypatched(root: Path) -> None:
    assert rules.findings(root, _monkeypatches) == []


def test_every_allowed_setting_is_used() -> None:
    """The list of exceptions shrinks with the code."""
    used = "\n".join(rules.findings(rules.SOURCE, rules.monkeypatches))
    assert [name for name in SETTINGS if name not in used] == []


@pytest.mark.parametrize("root", [rules.SOURCE, rules.COMPAT], ids=["eft", "compat"])
def test_modules_and_functions_are_short(root: Path) -> None:
    assert rules.long_modules(root) + rules.findings(root, rules.long_functions) == []


def test_names_say_something() -> None:
    # The compat package has the names that Axolotl's programs import.
    assert rules.banned_modules(rules.SOURCE) + rules.findings(rules.SOURCE, rules.banned_definitions) == []


@pytest.mark.parametrize("root", [rules.SOURCE, rules.COMPAT], ids=["eft", "compat"])
def test_suppressions_have_a_reason(root: Path) -> None:
    assert rules.silent_suppressions(root) == []


PATCHES = [
    "import torch\ntorch.nn.Linear.forward = print",
    "import torch.nn.functional as F\nF.cross_entropy = print",
    "from transformers import Trainer\nTrainer.log: object = print",
    "from transformers import Trainer\nsetattr(Trainer, 'log', print)",
    "from transformers import Trainer\ntype.__setattr__(Trainer, 'log', print)",
    "from transformers import Trainer as T\nhook = T\nhook.log = print",
    "import transformers.modeling_utils\ntransformers.modeling_utils.FUNCTIONS['sdpa'] = print",
    "def f():\n    from eft.models import load\n    load.load_model = print",
    "import sys\nsys.modules['torch'] = None",
    "import sys as s\ndel s.modules['torch']",
    "import torch\nwith open('x') as torch.y:\n    pass",
    "import torch\n(torch.a, b) = 1, 2",
    "def f(model):\n    model.forward = print",
    "def f(model):\n    type(model).log = print",
    "def f(model):\n    model.__class__.log = print",
    "def f(model):\n    setattr(type(model), 'log', print)",
    "def f(model):\n    object.__setattr__(model, 'forward', print)",
    "def f(model):\n    model.__dict__.update(log=print)",
    "import types\ndef f(model):\n    model.log = types.MethodType(print, model)",
    "exec('x = 1')",
    "y = eval('1')",
    "import inspect\ns = inspect.getsource(print)",
    "from inspect import getsource\ns = getsource(print)",
    "import importlib, os\nimportlib.reload(os)",
    "from unittest import mock",
    "from unittest.mock import patch",
]
"""One way each to change what is not ours."""

INNOCENT = """
import re
import torch
from eft.core import constants
pattern = re.compile("x")
x = torch.zeros(3)
x.grad = None
items = {}
items["a"] = constants.IGNORE_INDEX
class A:
    def __init__(self, model):
        self.forward = model.forward
        self.model = model.eval()
    def forward_all(self, optimizer):
        for group in optimizer.param_groups:
            group["lr"] = 0.0
"""


@pytest.mark.parametrize("code", PATCHES)
def test_a_planted_patch_is_seen(code: str, tmp_path: Path) -> None:
    (tmp_path / "planted.py").write_text(code)
    assert len(rules.findings(tmp_path, rules.monkeypatches)) >= 1


def test_ordinary_code_is_no_patch(tmp_path: Path) -> None:
    (tmp_path / "innocent.py").write_text(INNOCENT)
    assert rules.findings(tmp_path, rules.monkeypatches) == []


def test_an_allowed_setting_is_allowed_alone() -> None:
    tree = ast.parse("import torch\ntorch.backends.cudnn.benchmark = True\ntorch.backends.cudnn.enabled = True")
    allowed = frozenset({"torch.backends.cudnn.benchmark"})
    assert list(rules.monkeypatches(tree, allowed)) == [(3, "writes torch.backends.cudnn.enabled")]


def test_planted_sizes_names_and_suppressions_are_seen(tmp_path: Path) -> None:
    (tmp_path / "long.py").write_text("def f():\n" + "    pass\n" * rules.FUNCTION_LINES + "\n" * rules.MODULE_LINES)
    (tmp_path / "data_utils.py").write_text("class ModelManager: ...\ndef fine(): ...\ndef misc_things(): ...\n")
    (tmp_path / "quiet.py").write_text(
        "a = 1  # type: ignore\n"
        "b = 2  # type: ignore[assignment]\n"
        "c = 3  # noqa\n"
        "d = 4  # noqa: E501\n"
        "e = 5  # type: ignore[assignment]  # the stub is wrong\n"
        "f = 6  # noqa: E501  # a table is read across\n"
        "g = '# type: ignore'\n"
    )
    assert len(rules.long_modules(tmp_path)) == 1
    assert len(rules.findings(tmp_path, rules.long_functions)) == 1
    assert len(rules.banned_modules(tmp_path)) == 1
    assert [line.split(":")[1] for line in rules.findings(tmp_path, rules.banned_definitions)] == ["1", "3"]
    assert [line.split(":")[1] for line in rules.silent_suppressions(tmp_path)] == ["1", "2", "3", "4"]
