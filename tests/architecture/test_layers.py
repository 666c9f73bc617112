"""The import contracts of pyproject.toml hold, and break when they should (`make check` runs them too)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.architecture.source_rules import REPOSITORY, SOURCE

LAYERS = "Imports point down; siblings never import each other"
FAST = "The config, the ground and the report know no torch, so that they answer at once"


def run_contracts(folder: Path, package_parent: Path) -> str:
    """Output of import-linter, run in `folder` on the `eft` package below `package_parent`."""
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(package_parent)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.stdout + done.stderr


def copy_source(folder: Path) -> Path:
    """A copy of the package and of the contracts."""
    shutil.copytree(SOURCE, folder / "eft", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "pyproject.toml", folder)
    return folder / "eft"


def verdicts(output: str) -> dict[str, str]:
    """Contract to KEPT or BROKEN."""
    lines = [line.rstrip() for line in output.splitlines()]
    return {
        name: word
        for name in (LAYERS, FAST)
        for line in lines
        for word in ("KEPT", "BROKEN")
        if line.startswith(name) and line.endswith(word)
    }


def test_contracts_hold() -> None:
    output = run_contracts(REPOSITORY, SOURCE.parent)
    assert verdicts(output) == {LAYERS: "KEPT", FAST: "KEPT"}, output


def test_planted_imports_break_them(tmp_path: Path) -> None:
    package = copy_source(tmp_path)
    with (package / "core" / "hashing.py").open("a") as file:
        file.write("\nimport torch\n")
    with (package / "optim" / "param_groups.py").open("a") as file:
        file.write("\nimport eft.data.plan\n")
    output = run_contracts(tmp_path, tmp_path)
    assert verdicts(output) == {LAYERS: "BROKEN", FAST: "BROKEN"}, output
    assert "eft.optim.param_groups -> eft.data.plan" in output


def test_a_room_outside_the_layers_breaks_them(tmp_path: Path) -> None:
    package = copy_source(tmp_path)
    (package / "stray.py").write_text("X = 1\n")
    output = run_contracts(tmp_path, tmp_path)
    assert "stray" in output
    assert verdicts(output).get(LAYERS) != "KEPT", output
