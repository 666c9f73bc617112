"""The public names are frozen here: adding or removing one is a decision, not an accident."""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import pytest

import eft

PUBLIC_NAMES = [
    "DatasetMeta",
    "EftTrainer",
    "HFCausalTrainerBuilder",
    "TrainConfig",
    "load_config",
    "load_datasets",
    "setup_trainer",
    "train",
]

HEAVY = ("torch", "transformers", "accelerate", "peft", "datasets", "numba", "pandas")
"""Packages that take seconds to import."""


def test_public_names_are_frozen() -> None:
    assert eft.__all__ == PUBLIC_NAMES
    assert dir(eft) == sorted(PUBLIC_NAMES)


def test_public_names_resolve_and_hide_no_submodule() -> None:
    for name in PUBLIC_NAMES:
        assert callable(getattr(eft, name)), name
    submodules = {module.name for module in pkgutil.iter_modules(eft.__path__)}
    assert submodules.isdisjoint(PUBLIC_NAMES)


def test_help_and_config_errors_import_nothing_heavy() -> None:
    """What answers at once must not wait for torch."""
    code = (
        "import sys\n"
        "import eft, eft.core.errors, eft.config.load, eft.report.page, eft.report.terminal\n"
        "from eft.cli.app import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as end:\n    assert not end.code\n"
        "try:\n    main(['config', 'show', 'no-such-file.yaml'])\nexcept SystemExit as end:\n    assert end.code == 2\n"
        f"print('HEAVY', [name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "HEAVY []"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        getattr(eft, "no_such" + "_name")
