"""The command line around the config: exit codes, streams, and nothing heavy imported."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from eft.cli.app import COMMANDS, main
from eft.cli.reference import cli_markdown
from eft.config.load import load_config
from eft.core.errors import ConfigError, PromiseBroken

MINIMAL = "base_model: tiny\nlearning_rate: 2e-5\ndatasets:\n  - path: rows.jsonl\n"
HEAVY = ("torch", "transformers", "datasets", "peft", "accelerate", "pyarrow", "numba")


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """The command line sets up logging for its process, which here is pytest's."""
    root, ours = logging.getLogger(), logging.getLogger("eft")
    before = (root.handlers[:], root.level, ours.level)
    yield
    root.handlers[:], root.level, ours.level = before


def run(*args: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(args)
    code = caught.value.code
    assert isinstance(code, int)
    return code


def test_show_prints_yaml_that_loads_to_the_same_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL + "gptq: false\n")
    assert run("config", "show", str(path), "seed=7") == 0
    captured = capsys.readouterr()
    assert "seed: 7" in captured.out
    assert "# command line" in captured.out
    assert f"# {path}:2" in captured.out
    assert "note: no effect" in captured.err
    (tmp_path / "effective.yaml").write_text(captured.out)
    assert load_config(tmp_path / "effective.yaml").config == load_config(path, ["seed=7"]).config


def test_a_config_error_is_red_on_stderr_with_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL + "sede: [1]\n")
    assert run("config", "show", str(path)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"error: {path}:5: `sede: [1]`: unknown key; did you mean `seed`?\n"


def test_allow_unsupported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL + "deepcompile: true\n")
    assert run("config", "show", str(path)) == 2
    assert "--allow-unsupported" in capsys.readouterr().err
    assert run("config", "show", "--allow-unsupported", str(path)) == 0


@pytest.mark.parametrize(
    ("raised", "code"), [(ConfigError("no"), 2), (PromiseBroken("no"), 1), (KeyboardInterrupt(), 130)]
)
def test_exit_codes(monkeypatch: pytest.MonkeyPatch, raised: BaseException, code: int) -> None:
    def command() -> None:
        raise raised

    monkeypatch.setattr(sys.modules[__name__], "planted", command, raising=False)
    monkeypatch.setitem(COMMANDS, "planted", (__name__, "planted", "A planted command."))
    assert run("planted") == code


def test_a_bug_shows_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def command() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(sys.modules[__name__], "planted", command, raising=False)
    monkeypatch.setitem(COMMANDS, "planted", (__name__, "planted", "A planted command."))
    with pytest.raises(ZeroDivisionError):
        main(["planted"])


def test_a_wrong_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("cnfig") == 2
    assert "config" in capsys.readouterr().err


def test_help_version_and_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    text = capsys.readouterr().out
    assert all(name in text and line[:30] in text for name, (_, _, line) in COMMANDS.items())
    assert run("--version") == 0
    assert capsys.readouterr().out.startswith("eft ")
    assert run("config", "schema") == 0
    assert json.loads(capsys.readouterr().out)["title"] == "eft run"


def test_docs_writes_every_generated_page(tmp_path: Path) -> None:
    assert run("config", "docs", "--folder", str(tmp_path)) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cli.md", "config.md", "optimizers.md", "schedules.md"]


def test_the_committed_page_is_the_generated_one() -> None:
    page = Path(__file__).parents[2] / "docs" / "cli.md"
    assert page.read_text() == cli_markdown(), "run `eft config docs`"


def test_help_and_config_errors_import_nothing_heavy(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL + "sede: 1\n")
    script = f"""
import sys
from eft.cli.app import main
for args in (["--help"], ["config", "show", {str(path)!r}], ["config", "schema"]):
    try:
        main(args)
    except SystemExit:
        pass
print([name for name in {HEAVY!r} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]"
